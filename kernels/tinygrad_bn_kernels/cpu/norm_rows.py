"""Loops of BatchNorm over rows: x (N, C). They work on chunks of rows. See `norm`.

Four rows at a time: the sums of a column are loaded and stored once for four elements. The values of a column lie in
the rows of one small array k: with an array for each, LLVM needs too many overlap checks and does not vectorise.

Small x is computed by one compiled call, into which Numba copies the source of all steps (`inline="always"`). A step is
compiled alone only when large x comes, whose steps are split between threads. The usual way, compiling each step and
linking it, optimises it twice: BatchNorm then took twice as long to compile.
"""

import numpy as np

from tinygrad_bn_kernels.cpu import threads
from tinygrad_bn_kernels.cpu.arrays import Array
from tinygrad_bn_kernels.cpu.jit import SUMS, njit
from tinygrad_bn_kernels.cpu.moments import is_finite, moments
from tinygrad_bn_kernels.cpu.norm_terms import (
    PROBES,
    common_shift,
    four_terms,
    gradient,
    has_digits,
    is_bad_shift,
    is_ordinary_channel,
    lower_bound,
    normalizer,
    relu_gradient,
    term,
)
from tinygrad_bn_kernels.cpu.threads import split

# Rows of a chunk. Each chunk has its own sums, so results do not depend on the number of threads.
CHUNK = 256

step = njit(allocates=False, fastmath=SUMS, inline="always")


@step
def _first_row_shift(x, shift):
    """The first row, and 0 where it is not finite."""
    for j in range(shift.size):
        shift[j] = np.float64(x[0, j]) if is_finite(x[0, j]) else 0.0


@step
def _rows_sums(x, shift, sums, start, stop):
    """Σ (x − shift) and Σ (x − shift)² of each column of the chunks [start, stop), into sums (chunks, 2, C)."""
    for t in range(start, stop):
        for j in range(sums.shape[2]):
            sums[t, 0, j] = sums[t, 1, j] = 0.0
        i, last = t * CHUNK, (t + 1) * CHUNK
        last = last if last < x.shape[0] else x.shape[0]
        while i + 4 <= last:
            for j in range(shift.size):
                m = shift[j]
                d0, d1, d2, d3 = x[i, j] - m, x[i + 1, j] - m, x[i + 2, j] - m, x[i + 3, j] - m
                sums[t, 0, j] += (d0 + d1) + (d2 + d3)
                sums[t, 1, j] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)
            i += 4
        while i < last:
            for j in range(shift.size):
                d = x[i, j] - shift[j]
                sums[t, 0, j] += d
                sums[t, 1, j] += d * d
            i += 1


@step
def _rows_statistics(sums, n, shift, mean, var):
    """Mean and variance from the chunks' sums; False if a shift was too far from its mean. Shifts become the means."""
    good = True
    for j in range(shift.size):
        s1 = 0.0
        s2 = 0.0
        for t in range(sums.shape[0]):
            s1 += sums[t, 0, j]
            s2 += sums[t, 1, j]
        mean[j], var[j], far = moments(shift[j], s1, s2, n)
        shift[j] = mean[j] if is_finite(mean[j]) else 0.0
        good = good and not far
    return good


@njit(allocates=False, fastmath=SUMS, forceinline=True)
def _rows_constants(weight, bias, mean, var, eps, k):
    """m, a and b with y = (x − m) · a + b, and ivar, into k (≥ 4, C) of x's dtype. Whether they `is_ordinary`."""
    good = True
    for j in range(mean.size):
        m, ivar, r = normalizer(k, mean[j], var[j], eps)
        k[0, j], k[1, j], k[2, j], k[3, j] = m, ivar * weight[j], r * weight[j] + bias[j], ivar
        good &= is_ordinary_channel(weight[j], mean[j], ivar, weight.itemsize)
    return good


@step
def _gradient_shift(g, x, relu, k):
    """Choose the shift of g for each column, into k[4]."""
    infinity = k.dtype.type(np.inf)
    for j in range(k.shape[1]):
        low, high = infinity, -infinity
        for t in range(PROBES):
            i = t * (len(g) - 1) // (PROBES - 1)
            v = relu_gradient(g[i, j], x[i, j] - k[0, j], k[1, j], k[2, j], relu)
            low, high = v if v < low else low, v if v > high else high
        k[4, j] = common_shift(low, high)


@step
def _rows_normalize(x, k, relu, y, start, stop):
    """The output for the chunks [start, stop) of rows, into y (N, C); k as of `_rows_constants`."""
    lowest = lower_bound(x, relu)
    last = stop * CHUNK if stop * CHUNK < x.shape[0] else x.shape[0]
    for i in range(start * CHUNK, last):
        for j in range(x.shape[1]):
            v = (x[i, j] - k[0, j]) * k[1, j] + k[2, j]
            y[i, j] = lowest if v < lowest else v


@njit(allocates=False, fastmath=SUMS)
def _rows_forward_serial(x, weight, bias, eps, relu, y, mean, var, shift, sums, k):
    """`rows_forward` on one thread, in one compiled call; without a shift it is `rows_inference`."""
    if shift.size:
        _first_row_shift(x, shift)
        for _ in range(2):
            _rows_sums(x, shift, sums, 0, len(sums))
            if _rows_statistics(sums, len(x), shift, mean, var):
                break
    good = _rows_constants(weight, bias, mean, var, eps, k)
    _rows_normalize(x, k, relu, y, 0, (len(x) + CHUNK - 1) // CHUNK)
    return good


def rows_forward(x: Array, weight: Array, bias: Array, eps: float, relu: bool, *out: Array) -> bool:
    """Output, mean and variance, into `out`. Whether they are right: see `is_ordinary`."""
    y, mean, var = out
    n, channels = x.shape
    chunks = -(-n // CHUNK)
    shift, sums, k = np.empty(channels), np.empty((chunks, 2, channels)), np.empty((4, channels), x.dtype)
    if x.size < threads.PARALLEL_FROM:
        return bool(_rows_forward_serial(x, weight, bias, eps, relu, y, mean, var, shift, sums, k))
    _first_row_shift(x, shift)
    for _ in range(2):
        split(_rows_sums, chunks, x.size, x, shift, sums)
        if _rows_statistics(sums, n, shift, mean, var):
            break
    good = _rows_constants(weight, bias, mean, var, eps, k)
    split(_rows_normalize, chunks, x.size, x, k, relu, y)
    return bool(good)


def rows_inference(x: Array, weight: Array, bias: Array, eps: float, y: Array, mean: Array, var: Array) -> bool:
    """The output of given mean and variance, into y. Whether it is right: see `is_ordinary`."""
    channels = x.shape[1]
    k = np.empty((4, channels), x.dtype)
    if x.size < threads.PARALLEL_FROM:  # the loop that training compiles
        nothing = np.empty(0), np.empty((0, 2, channels))
        return bool(_rows_forward_serial(x, weight, bias, eps, False, y, mean, var, *nothing, k))
    good = _rows_constants(weight, bias, mean, var, eps, k)
    split(_rows_normalize, -(-len(x) // CHUNK), x.size, x, k, False, y)
    return bool(good)


@step
def _rows_gradient_sums(g, x, k, relu, sums, start, stop):
    """Σ d and Σ d (x − m) · ivar of each column of the chunks [start, stop), into sums (chunks, 2, C)."""
    for t in range(start, stop):
        for j in range(sums.shape[2]):
            sums[t, 0, j] = sums[t, 1, j] = 0.0
        i, last = t * CHUNK, (t + 1) * CHUNK
        last = last if last < x.shape[0] else x.shape[0]
        while i + 4 <= last:
            for j in range(k.shape[1]):
                d, h = four_terms(
                    g[i, j], g[i + 1, j], g[i + 2, j], g[i + 3, j], x[i, j], x[i + 1, j], x[i + 2, j], x[i + 3, j],
                    k[0, j], k[1, j], k[2, j], k[3, j], k[4, j], relu,
                )  # fmt: skip
                sums[t, 0, j] += d
                sums[t, 1, j] += h
            i += 4
        while i < last:
            for j in range(k.shape[1]):
                d, h = term(g[i, j], x[i, j], k[0, j], k[1, j], k[2, j], k[3, j], k[4, j], relu)
                sums[t, 0, j] += np.float64(d)
                sums[t, 1, j] += np.float64(h)
            i += 1


@step
def _rows_gradients(sums, n, k, mean, var, eps, gweight, gbias):
    """Gradients of weight and bias from the chunks' sums; p and q into k.

    Whether all shifts were good (a bad one becomes 0); whether all are sound: see `are_sound`.
    """
    good = True
    sound = True
    for j in range(gweight.size):
        s1 = 0.0
        s2 = 0.0
        for t in range(sums.shape[0]):
            s1 += sums[t, 0, j]
            s2 += sums[t, 1, j]
        _, ivar, r = normalizer(k, mean[j], var[j], eps)
        s2 += r * s1
        gbias[j], gweight[j] = s1 + n * np.float64(k[4, j]), s2
        k[5, j], k[6, j] = ivar * s2 / n, r * s2 / n + s1 / n
        digits = has_digits(np.float64(k[5, j]), np.sqrt(var[j]) * ivar, k.itemsize)
        sound &= is_finite(gbias[j]) & is_finite(s2) & digits
        if is_bad_shift(k[4, j], s1, n):
            k[4, j], good = 0.0, False
    return good, sound


@step
def _rows_gradient(g, x, k, relu, gx, start, stop):
    last = stop * CHUNK if stop * CHUNK < x.shape[0] else x.shape[0]
    for i in range(start * CHUNK, last):
        for j in range(x.shape[1]):
            gx[i, j] = gradient(g[i, j], x[i, j], k[0, j], k[1, j], k[2, j], k[4, j], k[5, j], k[6, j], relu)


@njit(allocates=False, fastmath=SUMS)
def _rows_backward_serial(g, x, weight, bias, mean, var, eps, relu, gx, gweight, gbias, sums, k):
    """`rows_backward` on one thread, in one compiled call."""
    ordinary = _rows_constants(weight, bias, mean, var, eps, k)
    _gradient_shift(g, x, relu, k)
    sound = True
    for _ in range(2):
        _rows_gradient_sums(g, x, k, relu, sums, 0, len(sums))
        good, sound = _rows_gradients(sums, len(x), k, mean, var, eps, gweight, gbias)
        if good:
            break
    if gx.size:
        _rows_gradient(g, x, k, relu, gx, 0, len(sums))
    return ordinary, sound


def rows_backward(
    g: Array, x: Array, weight: Array, bias: Array, mean: Array, var: Array, eps: float, relu: bool, *out: Array
) -> tuple[bool, bool]:
    """Gradients of x, weight and bias, into `out`. See `is_ordinary` and `are_sound` for what is returned."""
    gx, gweight, gbias = out
    n, channels = x.shape
    chunks = -(-n // CHUNK)
    sums, k = np.empty((chunks, 2, channels)), np.empty((7, channels), x.dtype)
    if x.size < threads.PARALLEL_FROM:
        return _rows_backward_serial(g, x, weight, bias, mean, var, eps, relu, gx, gweight, gbias, sums, k)
    ordinary = _rows_constants(weight, bias, mean, var, eps, k)
    _gradient_shift(g, x, relu, k)
    sound = True
    for _ in range(2):
        split(_rows_gradient_sums, chunks, x.size, g, x, k, relu, sums)
        good, sound = _rows_gradients(sums, n, k, mean, var, eps, gweight, gbias)
        if good:
            break
    if gx.size:
        split(_rows_gradient, chunks, x.size, g, x, k, relu, gx)
    return ordinary, sound
