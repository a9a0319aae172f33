"""BatchNorm over (N, C, S): statistics, output and gradients, a channel or a block of channels at a time.

S = 1 is a batch of vectors (`_rows_…`), of which a part is a chunk of rows; otherwise the planes of images
(`_planes_…`), of which a part is a range of channels, so that a channel is read again while it is in cache. Statistics
are taken of x − shift, with the channel's first element as shift, and summed in float64: exact at any mean, and 0 for a
constant channel. Gradients far from 0 are computed from g − shift likewise: Σ x̂ is 0, so only the bias feels a shift.
"""

from typing import Any

import numpy as np

from tinygrad_bn_kernels import kernel
from tinygrad_bn_kernels.cpu import threads
from tinygrad_bn_kernels.cpu.arrays import Array, compiled
from tinygrad_bn_kernels.cpu.jit import SUMS, njit
from tinygrad_bn_kernels.cpu.memory import empty_like
from tinygrad_bn_kernels.cpu.moments import moments
from tinygrad_bn_kernels.cpu.norm_terms import floor_of, four_terms, gradient, in_common, passed, rounded, term, too_far
from tinygrad_bn_kernels.cpu.reduce_loops import make_finite
from tinygrad_bn_kernels.cpu.threads import split

# Rows of a batch of vectors whose sums are added up before those of the next.
CHUNK = 256

# Gradients of a channel that are looked at for what they have in common. With three of them one channel in a hundred
# would have something by chance, and all the sums would be taken again.
PROBES = 8


# ---- planes: (N, C, S) ----------------------------------------------------------------------------------


@njit(fastmath=SUMS)
def plane_statistics(x, c):
    """Mean and biased variance of channel c."""
    n, _, size = x.shape
    mean = np.float64(x[0, c, 0] if np.isfinite(x[0, c, 0]) else 0)  # or an infinite mean would be NaN
    var = 0.0
    for _ in range(2):
        s1 = 0.0
        s2 = 0.0
        for i in range(n):
            plane = x[i, c]
            for j in range(size):
                d = plane[j] - mean
                s1 += d
                s2 += d * d
        mean, var, far = moments(mean, s1, s2, n * size)
        if not far:
            break
    return mean, var


@njit(fastmath=SUMS)
def _plane_normalize(x, c, mean, var, weight, bias, eps, relu, y):
    n, _, size = x.shape
    floor = floor_of(x, relu)
    m, ivar, r = rounded(x, mean, var, eps)
    a, b = x.dtype.type(ivar * weight), x.dtype.type(r * weight + bias)
    for i in range(n):
        source, target = x[i, c], y[i, c]
        for j in range(size):
            v = (source[j] - m) * a + b
            target[j] = floor if v < floor else v


@njit(fastmath=SUMS)
def _planes_forward(x, weight, bias, eps, relu, y, mean, var, start, stop):
    for c in range(start, stop):
        mean[c], var[c] = plane_statistics(x, c)
        _plane_normalize(x, c, mean[c], var[c], weight[c], bias[c], eps, relu, y)


@njit(fastmath=SUMS)
def _planes_inference(x, weight, bias, eps, relu, y, mean, var, start, stop):
    for c in range(start, stop):
        _plane_normalize(x, c, mean[c], var[c], weight[c], bias[c], eps, relu, y)


@njit(fastmath=SUMS)
def _plane_gradient_sums(g, x, c, m, a, b, ivar, shift, relu):
    """Σ d and Σ d (x − m) · ivar of channel c."""
    n, _, size = x.shape
    s1 = 0.0
    s2 = 0.0
    i = 0
    while i + 4 <= n:
        g0, g1, g2, g3 = g[i, c], g[i + 1, c], g[i + 2, c], g[i + 3, c]
        x0, x1, x2, x3 = x[i, c], x[i + 1, c], x[i + 2, c], x[i + 3, c]
        for j in range(size):
            d, h = four_terms(
                g0[j], g1[j], g2[j], g3[j], x0[j], x1[j], x2[j], x3[j], m, a, b, ivar, shift, relu
            )  # fmt: skip
            s1 += d
            s2 += h
        i += 4
    while i < n:
        g0, x0 = g[i, c], x[i, c]
        for j in range(size):
            d, h = term(g0[j], x0[j], m, a, b, ivar, shift, relu)
            s1 += np.float64(d)
            s2 += np.float64(h)
        i += 1
    return s1, s2


@njit(fastmath=SUMS)
def _plane_backward(g, x, c, weight, bias, mean, var, eps, relu, gx, gweight, gbias):
    """gx = ivar w · (d − mean d − x̂ · mean(d x̂)), where d = g − shift, if gx is there to be written."""
    n, _, size = x.shape
    kind = x.dtype.type
    m, ivar, r = rounded(x, mean[c], var[c], eps)
    a, b = kind(ivar * weight[c]), kind(r * weight[c] + bias[c])
    low = high = passed(g[0, c, 0], x[0, c, 0] - m, a, b, relu)
    for t in range(1, PROBES):
        place = t * (n * size - 1) // (PROBES - 1)
        i, j = place // size, place % size
        v = passed(g[i, c, j], x[i, c, j] - m, a, b, relu)
        low, high = min(low, v), max(high, v)
    shift = in_common(low, high)
    s1, s2 = _plane_gradient_sums(g, x, c, m, a, b, kind(ivar), shift, relu)
    if too_far(shift, s1, n * size):
        shift = kind(0)
        s1, s2 = _plane_gradient_sums(g, x, c, m, a, b, kind(ivar), shift, relu)
    s2 += r * s1
    gbias[c], gweight[c] = s1 + n * size * np.float64(shift), s2
    slope = s2 / (n * size)
    p, q = kind(ivar * slope), kind(r * slope + s1 / (n * size))  # x̂ · mean(d x̂) + mean d = (x − m) · p + q
    for i in range(gx.shape[0]):
        gs, xs, out = g[i, c], x[i, c], gx[i, c]
        for j in range(size):
            out[j] = gradient(gs[j], xs[j], m, a, b, shift, p, q, relu)


@njit(fastmath=SUMS)
def _planes_backward(g, x, weight, bias, mean, var, eps, relu, gx, gweight, gbias, start, stop):
    for c in range(start, stop):
        _plane_backward(g, x, c, weight, bias, mean, var, eps, relu, gx, gweight, gbias)


# ---- rows: (N, C) ---------------------------------------------------------------------------------------
# A chunk of rows at a time, with the sums of each chunk added up in one order: chunks follow from the shape alone. Rows
# are taken four at a time, so that the sums of a column are loaded and stored once for four of its elements. What is
# kept for each column lies in the rows of one small array: with an array for each, the compiler would need so many
# checks for overlap that it gives up on vector registers.


@njit()
def _clear(sums):
    for j in range(sums.shape[1]):
        sums[0, j] = sums[1, j] = 0.0


@njit(fastmath=SUMS)
def _rows_sums(x, shift, sums, start, stop):
    """Σ (x − shift) and Σ (x − shift)² of each column, for every chunk from start to stop: sums is (chunks, 2, C)."""
    for t in range(start, stop):
        _clear(sums[t])
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


@njit(fastmath=SUMS)
def _rows_statistics(sums, n, shift, mean, var):
    """Mean and variance from the chunks' sums, and whether the shifts were good enough; each becomes the mean, or 0."""
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


@njit(fastmath=SUMS)
def _rows_constants(x, weight, bias, mean, var, eps):
    """Rows m, a, b, of which y = (x − m) · a + b, and ivar; and room for the shift of g, p and q."""
    k = np.empty((7, mean.size), x.dtype)
    for j in range(mean.size):
        m, ivar, r = rounded(x, mean[j], var[j], eps)
        k[0, j], k[1, j], k[2, j], k[3, j] = m, ivar * weight[j], r * weight[j] + bias[j], ivar
    return k


@njit(fastmath={"contract"})
def _rows_shifts(g, x, relu, k):
    """The shift of g, into k."""
    for j in range(k.shape[1]):
        low = high = passed(g[0, j], x[0, j] - k[0, j], k[1, j], k[2, j], relu)
        for t in range(1, PROBES):
            i = t * (len(g) - 1) // (PROBES - 1)
            v = passed(g[i, j], x[i, j] - k[0, j], k[1, j], k[2, j], relu)
            low, high = min(low, v), max(high, v)
        k[4, j] = in_common(low, high)


@njit(fastmath=SUMS)
def _rows_normalize(x, k, relu, y, start, stop):
    floor = floor_of(x, relu)
    for i in range(start * CHUNK, min(stop * CHUNK, x.shape[0])):
        row, out = x[i], y[i]
        for j in range(row.size):
            v = (row[j] - k[0, j]) * k[1, j] + k[2, j]
            out[j] = floor if v < floor else v


@njit(fastmath=SUMS)
def _few_rows_forward(x, weight, bias, eps, relu, y, mean, var, shift, sums):
    """What `_rows_forward` does, by one thread in one call."""
    chunks = len(sums)
    for _ in range(2):
        _rows_sums(x, shift, sums, 0, chunks)
        if _rows_statistics(sums, len(x), shift, mean, var):
            break
    _rows_normalize(x, _rows_constants(x, weight, bias, mean, var, eps), relu, y, 0, chunks)


def _rows_forward(x: Array, weight: Array, bias: Array, eps: float, relu: bool, *out: Array) -> None:
    y, mean, var = out
    chunks, shift = -(-len(x) // CHUNK), x[0].astype(np.float64)
    make_finite(shift)
    sums = np.empty((chunks, 2, x.shape[1]))
    if x.size < threads.PARALLEL_FROM:
        _few_rows_forward(x, weight, bias, eps, relu, y, mean, var, shift, sums)
        return
    for _ in range(2):
        split(_rows_sums, chunks, x.size, x, shift, sums)
        if _rows_statistics(sums, len(x), shift, mean, var):
            break
    split(_rows_normalize, chunks, x.size, x, _rows_constants(x, weight, bias, mean, var, eps), relu, y)


@njit(fastmath=SUMS)
def _rows_inference(x, weight, bias, eps, relu, y, mean, var, start, stop):
    _rows_normalize(x, _rows_constants(x, weight, bias, mean, var, eps), relu, y, start, stop)


@njit(fastmath=SUMS)
def _rows_gradient_sums(g, x, k, relu, sums, start, stop):
    """Σ d and Σ d (x − m) · ivar of each column, for every chunk from start to stop."""
    for t in range(start, stop):
        _clear(sums[t])
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


@njit(fastmath=SUMS)
def _rows_gradients(sums, n, k, mean, var, eps, gweight, gbias):
    """Those of weight and bias from the chunks' sums, and p and q into k, as for planes.

    And whether the shifts were good; one that was not becomes 0.
    """
    good = True
    for j in range(gweight.size):
        s1 = 0.0
        s2 = 0.0
        for t in range(sums.shape[0]):
            s1 += sums[t, 0, j]
            s2 += sums[t, 1, j]
        _, ivar, r = rounded(k, mean[j], var[j], eps)
        s2 += r * s1
        gbias[j], gweight[j] = s1 + n * np.float64(k[4, j]), s2
        k[5, j], k[6, j] = ivar * s2 / n, r * s2 / n + s1 / n
        if too_far(k[4, j], s1, n):
            k[4, j], good = 0.0, False
    return good


@njit(fastmath=SUMS)
def _rows_gradient(g, x, k, relu, gx, start, stop):
    for i in range(start * CHUNK, min(stop * CHUNK, x.shape[0])):
        gs, row, out = g[i], x[i], gx[i]
        for j in range(row.size):
            out[j] = gradient(gs[j], row[j], k[0, j], k[1, j], k[2, j], k[4, j], k[5, j], k[6, j], relu)


@njit(fastmath=SUMS)
def _few_rows_backward(g, x, weight, bias, mean, var, eps, relu, gx, gweight, gbias, sums):
    """What `_rows_backward` does, by one thread in one call."""
    chunks = len(sums)
    k = _rows_constants(x, weight, bias, mean, var, eps)
    _rows_shifts(g, x, relu, k)
    for _ in range(2):
        _rows_gradient_sums(g, x, k, relu, sums, 0, chunks)
        if _rows_gradients(sums, len(x), k, mean, var, eps, gweight, gbias):
            break
    if gx.size:
        _rows_gradient(g, x, k, relu, gx, 0, chunks)


def _rows_backward(
    g: Array, x: Array, weight: Array, bias: Array, mean: Array, var: Array, eps: float, relu: bool, *out: Array
) -> None:
    gx, gweight, gbias = out
    chunks = -(-len(x) // CHUNK)
    sums = np.empty((chunks, 2, x.shape[1]))
    if x.size < threads.PARALLEL_FROM:
        _few_rows_backward(g, x, weight, bias, mean, var, eps, relu, gx, gweight, gbias, sums)
        return
    k = _rows_constants(x, weight, bias, mean, var, eps)
    _rows_shifts(g, x, relu, k)
    for _ in range(2):
        split(_rows_gradient_sums, chunks, x.size, g, x, k, relu, sums)
        if _rows_gradients(sums, len(x), k, mean, var, eps, gweight, gbias):
            break
    if gx.size:
        split(_rows_gradient, chunks, x.size, g, x, k, relu, gx)


# ---- state -----------------------------------------------------------------------------------------------


@njit()
def _track(running_mean, running_var, mean, var, momentum, unbias, new_mean, new_var):
    finite = True
    for c in range(mean.size):
        new_mean[c] = (1 - momentum) * running_mean[c] + momentum * mean[c]
        new_var[c] = (1 - momentum) * running_var[c] + momentum * (var[c] * unbias)
        finite = finite and np.isfinite(new_mean[c]) and np.isfinite(new_var[c])
    return finite


# ---- the ops --------------------------------------------------------------------------------------------


def _channels(x: Array) -> Array:
    """As (N, C, S), or (N, C) where S is 1."""
    if x.ndim == 2:
        return x
    return x.reshape(x.shape[:2]) if x.size == x.shape[0] * x.shape[1] else x.reshape(*x.shape[:2], -1)


def _expect_channels(x: Array, *vectors: Array) -> None:
    """Raise ValueError unless each vector is (C,): the loops would read beyond it."""
    for v in vectors:
        if v.shape != x.shape[1:2]:
            raise ValueError(f"vectors of shape {v.shape} do not fit the channels of x {x.shape}")


def _forward(x: Array, weight: Array, bias: Array, eps: float, relu: bool) -> tuple[Array, Array, Array]:
    eps = float(eps)  # not 0, nor a float32: each would be compiled for
    _expect_channels(x, weight, bias)
    source = compiled(x)
    y, (mean, var) = empty_like(source), np.empty((2, x.shape[1])) if x.size else np.full((2, x.shape[1]), np.nan)
    if x.size:
        xs, ys = _channels(source), _channels(y)
        arrays = xs, compiled(weight, source.dtype), compiled(bias, source.dtype)
        if xs.ndim == 2:
            _rows_forward(*arrays, eps, relu, ys, mean, var)
        else:
            split(_planes_forward, x.shape[1], x.size, *arrays, eps, relu, ys, mean, var)
    return y.astype(x.dtype, copy=False), mean, var


def _backward(
    g: Array,
    x: Array,
    weight: Array,
    bias: Array,
    needs: list[bool],
    eps: float,
    mean: Array,
    var: Array,
    relu: bool,
) -> tuple[Array | None, Array, Array]:
    eps = float(eps)
    source = compiled(x)
    gx = empty_like(source) if needs[0] else None
    gweight, gbias = np.empty((2, x.shape[1])) if x.size else np.zeros((2, x.shape[1]))
    if x.size:
        gs, xs = _channels(compiled(g, source.dtype)), _channels(source)
        out = np.empty((0,) * xs.ndim, source.dtype) if gx is None else _channels(gx)
        arrays = gs, xs, compiled(weight, source.dtype), compiled(bias, source.dtype), mean, var
        if xs.ndim == 2:
            _rows_backward(*arrays, eps, relu, out, gweight, gbias)
        else:
            split(_planes_backward, x.shape[1], x.size, *arrays, eps, relu, out, gweight, gbias)
    return gx, gweight, gbias


@kernel("batch_norm_fused", "cpu")
def batch_norm_fused(x: Array, weight: Array, bias: Array, *, eps: float) -> tuple[Array, Array, Array]:
    """x (N, C, ...), weight and bias (C,): the output, and mean and biased variance in float64 (C,)."""
    return _forward(x, weight, bias, eps, False)


@kernel("batch_norm_relu_fused", "cpu")
def batch_norm_relu_fused(x: Array, weight: Array, bias: Array, *, eps: float) -> tuple[Array, Array, Array]:
    """`batch_norm_fused`, and the ReLU of its output."""
    return _forward(x, weight, bias, eps, True)


@kernel("batch_norm_inference", "cpu")
def batch_norm_inference(x: Array, mean: Array, var: Array, weight: Array, bias: Array, *, eps: float) -> Array:
    """x (N, C, ...) normalised by a mean and variance that are given, (C,) like weight and bias."""
    _expect_channels(x, mean, var, weight, bias)
    eps, source = float(eps), compiled(x)
    y, statistics = empty_like(source), (compiled(mean, np.float64), compiled(var, np.float64))
    if x.size:
        xs, ys = _channels(source), _channels(y)
        loop, items = (_planes_inference, x.shape[1]) if xs.ndim > 2 else (_rows_inference, -(-len(x) // CHUNK))
        vectors = compiled(weight, source.dtype), compiled(bias, source.dtype)
        split(loop, items, x.size, xs, *vectors, eps, False, ys, *statistics)
    return y.astype(x.dtype, copy=False)


@kernel("batch_norm_fused.vjp", "cpu")
def batch_norm_fused_vjp(
    g: Array, y: Array, x: Array, weight: Array, bias: Array, *, needs: list[bool], eps: float, mean: Array, var: Array
) -> tuple[Array | None, Array, Array]:
    """Gradients with respect to x, weight and bias, from the statistics that the forward pass saved."""
    return _backward(g, x, weight, bias, needs, eps, mean, var, False)


@kernel("batch_norm_relu_fused.vjp", "cpu")
def batch_norm_relu_fused_vjp(
    g: Array, y: Array, x: Array, weight: Array, bias: Array, *, needs: list[bool], eps: float, mean: Array, var: Array
) -> tuple[Array | None, Array, Array]:
    """The same behind a ReLU; which outputs were positive is computed again, which is cheaper than reading them."""
    return _backward(g, x, weight, bias, needs, eps, mean, var, True)


@kernel("nn.running_statistics", "cpu")
def running_statistics(
    running_mean: Array, running_var: Array, mean: Array, var: Array, *, momentum: float, unbias: float
) -> Any:
    """(1 − momentum) · running + momentum · batch of mean and unbias · variance, (C,); and whether all are finite."""
    if not running_mean.shape == running_var.shape == mean.shape == var.shape:
        raise ValueError(f"running statistics {running_mean.shape}, {running_var.shape} are not those of {mean.shape}")
    if running_mean.dtype.char not in "fd" or running_var.dtype.char not in "fd":
        return NotImplemented
    new_mean, new_var = np.empty_like(running_mean), np.empty_like(running_var)
    old, numbers = (compiled(running_mean), compiled(running_var)), (float(momentum), float(unbias))
    return new_mean, new_var, _track(*old, compiled(mean), compiled(var), *numbers, new_mean, new_var)
