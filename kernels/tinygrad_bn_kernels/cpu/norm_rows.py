"""Loops of BatchNorm over rows: x (N, C). They work on chunks of rows. See `norm`.

Four rows at a time: the sums of a column are loaded and stored once for four elements. The values of a column lie in
the rows of one small array k: with an array for each, LLVM needs too many overlap checks and does not vectorise.
"""

import numpy as np

from tinygrad_bn_kernels.cpu import threads
from tinygrad_bn_kernels.cpu.arrays import Array
from tinygrad_bn_kernels.cpu.jit import SUMS, inlined, njit
from tinygrad_bn_kernels.cpu.moments import moments
from tinygrad_bn_kernels.cpu.norm_terms import (
    PROBES,
    are_finite,
    common_shift,
    four_terms,
    gradient,
    is_bad_shift,
    is_ordinary,
    lower_bound,
    normalizer,
    relu_gradient,
    term,
)
from tinygrad_bn_kernels.cpu.threads import split

# Rows of a chunk. Each chunk has its own sums, so results do not depend on the number of threads.
CHUNK = 256


@njit()
def clear(sums):
    """Set both sums (2, C) of each column to 0."""
    for j in range(sums.shape[1]):
        sums[0, j] = sums[1, j] = 0.0


@inlined(fastmath=SUMS)
def _first_row_shift(x, shift):
    """The first row, and 0 where it is not finite."""
    for j in range(shift.size):
        shift[j] = np.float64(x[0, j]) if np.isfinite(x[0, j]) else 0.0


@inlined(fastmath=SUMS)
def _rows_sums(x, shift, sums, start, stop):
    """Σ (x − shift) and Σ (x − shift)² of each column of the chunks [start, stop), into sums (chunks, 2, C)."""
    for t in range(start, stop):
        clear(sums[t])
        i, last = t * CHUNK, min((t + 1) * CHUNK, x.shape[0])
        while i + 4 <= last:
            r0, r1, r2, r3 = x[i], x[i + 1], x[i + 2], x[i + 3]
            for j in range(shift.size):
                d0, d1, d2, d3 = r0[j] - shift[j], r1[j] - shift[j], r2[j] - shift[j], r3[j] - shift[j]
                sums[t, 0, j] += (d0 + d1) + (d2 + d3)
                sums[t, 1, j] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)
            i += 4
        while i < last:
            row = x[i]
            for j in range(shift.size):
                d = row[j] - shift[j]
                sums[t, 0, j] += d
                sums[t, 1, j] += d * d
            i += 1


@inlined(fastmath=SUMS)
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
        shift[j] = mean[j] if np.isfinite(mean[j]) else 0.0
        good = good and not far
    return good


@inlined(fastmath=SUMS)
def rows_constants(x, weight, bias, mean, var, eps):
    """k (7, C): m, a and b with y = (x − m) · a + b, ivar, and space for the shift of g, p and q."""
    k = np.empty((7, mean.size), x.dtype)
    for j in range(mean.size):
        m, ivar, r = normalizer(x, mean[j], var[j], eps)
        k[0, j], k[1, j], k[2, j], k[3, j] = m, ivar * weight[j], r * weight[j] + bias[j], ivar
    return k


@inlined(fastmath={"contract"})
def _gradient_shift(g, x, relu, k):
    """Choose the shift of g for each column, into k[4]."""
    for j in range(k.shape[1]):
        low = high = relu_gradient(g[0, j], x[0, j] - k[0, j], k[1, j], k[2, j], relu)
        for t in range(1, PROBES):
            i = t * (len(g) - 1) // (PROBES - 1)
            v = relu_gradient(g[i, j], x[i, j] - k[0, j], k[1, j], k[2, j], relu)
            low, high = min(low, v), max(high, v)
        k[4, j] = common_shift(low, high)


@inlined(fastmath=SUMS)
def rows_normalize(x, k, relu, y, start, stop):
    """The output for the chunks [start, stop) of rows, into y (N, C); k as of `rows_constants`."""
    lowest = lower_bound(x, relu)
    for i in range(start * CHUNK, min(stop * CHUNK, x.shape[0])):
        row, out = x[i], y[i]
        for j in range(row.size):
            v = (row[j] - k[0, j]) * k[1, j] + k[2, j]
            out[j] = lowest if v < lowest else v


@njit(fastmath=SUMS)
def _rows_forward_serial(x, weight, bias, eps, relu, y, mean, var):
    """`rows_forward` on one thread, in one compiled call."""
    chunks = -(-len(x) // CHUNK)
    shift, sums = np.empty(mean.size), np.empty((chunks, 2, mean.size))
    _first_row_shift(x, shift)
    for _ in range(2):
        _rows_sums(x, shift, sums, 0, chunks)
        if _rows_statistics(sums, len(x), shift, mean, var):
            break
    rows_normalize(x, rows_constants(x, weight, bias, mean, var, eps), relu, y, 0, chunks)
    return is_ordinary(weight, mean, var, eps)


def rows_forward(x: Array, weight: Array, bias: Array, eps: float, relu: bool, *out: Array) -> bool:
    """Output, mean and variance, into `out`. Whether they are right: see `is_ordinary`."""
    if x.size < threads.PARALLEL_FROM:
        return bool(_rows_forward_serial(x, weight, bias, eps, relu, *out))
    y, mean, var = out
    n, channels = x.shape
    chunks = -(-n // CHUNK)
    shift, sums = np.empty(channels), np.empty((chunks, 2, channels))
    _first_row_shift(x, shift)
    for _ in range(2):
        split(_rows_sums, chunks, x.size, x, shift, sums)
        if _rows_statistics(sums, n, shift, mean, var):
            break
    split(rows_normalize, chunks, x.size, x, rows_constants(x, weight, bias, mean, var, eps), relu, y)
    return bool(is_ordinary(weight, mean, var, eps))


@inlined(fastmath=SUMS)
def _rows_gradient_sums(g, x, k, relu, sums, start, stop):
    """Σ d and Σ d (x − m) · ivar of each column of the chunks [start, stop), into sums (chunks, 2, C)."""
    for t in range(start, stop):
        clear(sums[t])
        i, last = t * CHUNK, min((t + 1) * CHUNK, x.shape[0])
        while i + 4 <= last:
            g0, g1, g2, g3 = g[i], g[i + 1], g[i + 2], g[i + 3]
            x0, x1, x2, x3 = x[i], x[i + 1], x[i + 2], x[i + 3]
            for j in range(k.shape[1]):
                m, a, b, ivar, shift = k[0, j], k[1, j], k[2, j], k[3, j], k[4, j]
                d, h = four_terms(
                    g0[j], g1[j], g2[j], g3[j], x0[j], x1[j], x2[j], x3[j], m, a, b, ivar, shift, relu
                )  # fmt: skip
                sums[t, 0, j] += d
                sums[t, 1, j] += h
            i += 4
        while i < last:
            g0, x0 = g[i], x[i]
            for j in range(k.shape[1]):
                d, h = term(g0[j], x0[j], k[0, j], k[1, j], k[2, j], k[3, j], k[4, j], relu)
                sums[t, 0, j] += np.float64(d)
                sums[t, 1, j] += np.float64(h)
            i += 1


@inlined(fastmath=SUMS)
def _rows_gradients(sums, n, k, mean, var, eps, gweight, gbias):
    """Gradients of weight and bias from the chunks' sums; p and q into k. False if a shift was bad; it becomes 0."""
    good = True
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
        if is_bad_shift(k[4, j], s1, n):
            k[4, j], good = 0.0, False
    return good


@inlined(fastmath=SUMS)
def _rows_gradient(g, x, k, relu, gx, start, stop):
    for i in range(start * CHUNK, min(stop * CHUNK, x.shape[0])):
        gs, row, out = g[i], x[i], gx[i]
        for j in range(row.size):
            out[j] = gradient(gs[j], row[j], k[0, j], k[1, j], k[2, j], k[4, j], k[5, j], k[6, j], relu)


@njit(fastmath=SUMS)
def _rows_backward_serial(g, x, weight, bias, mean, var, eps, relu, gx, gweight, gbias):
    """`rows_backward` on one thread, in one compiled call."""
    chunks = -(-len(x) // CHUNK)
    sums = np.empty((chunks, 2, mean.size))
    k = rows_constants(x, weight, bias, mean, var, eps)
    _gradient_shift(g, x, relu, k)
    for _ in range(2):
        _rows_gradient_sums(g, x, k, relu, sums, 0, chunks)
        if _rows_gradients(sums, len(x), k, mean, var, eps, gweight, gbias):
            break
    if gx.size:
        _rows_gradient(g, x, k, relu, gx, 0, chunks)
    return is_ordinary(weight, mean, var, eps), are_finite(gweight, gbias)


def rows_backward(
    g: Array, x: Array, weight: Array, bias: Array, mean: Array, var: Array, eps: float, relu: bool, *out: Array
) -> tuple[bool, bool]:
    """Gradients of x, weight and bias, into `out`. Whether they are right (see `is_ordinary`), and finite."""
    gx, gweight, gbias = out
    if x.size < threads.PARALLEL_FROM:
        return _rows_backward_serial(g, x, weight, bias, mean, var, eps, relu, *out)
    chunks = -(-len(x) // CHUNK)
    sums = np.empty((chunks, 2, x.shape[1]))
    k = rows_constants(x, weight, bias, mean, var, eps)
    _gradient_shift(g, x, relu, k)
    for _ in range(2):
        split(_rows_gradient_sums, chunks, x.size, g, x, k, relu, sums)
        if _rows_gradients(sums, len(x), k, mean, var, eps, gweight, gbias):
            break
    if gx.size:
        split(_rows_gradient, chunks, x.size, g, x, k, relu, gx)
    return is_ordinary(weight, mean, var, eps), are_finite(gweight, gbias)
