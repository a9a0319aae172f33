"""BatchNorm over (N, C, S): statistics, output and gradients, a channel or a block of channels at a time.

S = 1 is a batch of vectors (`_rows_…`), of which a part is a block of columns; otherwise the planes of images
(`_planes_…`), of which a part is a range of channels, so that a channel is read again while it is in cache.
Statistics are taken of x − shift, with the channel's first element as shift, and summed in float64: exact at any mean,
and 0 for a constant channel.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinygrad_bn_kernels import kernel
from tinygrad_bn_kernels.cpu.arrays import compiled
from tinygrad_bn_kernels.cpu.jit import SUMS, njit
from tinygrad_bn_kernels.cpu.threads import split

Array = NDArray[Any]

# Columns of a batch of vectors are cut into parts of whole blocks, as narrower ones waste cache lines.
BLOCK = 64

# Of a shift that is further from the mean than this many deviations the sums are taken again, from a better one.
FAR = 16.0


@njit()
def _floor(x, relu):
    """What the output is not below: one loop then serves with and without a ReLU, at half the compilation."""
    return x.dtype.type(0) if relu else x.dtype.type(-np.inf)


# ---- planes: (N, C, S) ----------------------------------------------------------------------------------


@njit(fastmath=SUMS)
def _plane_statistics(x, c):
    n, _, size = x.shape
    shift = np.float64(x[0, c, 0])
    var = 0.0
    for _ in range(2):
        s1 = 0.0
        s2 = 0.0
        for i in range(n):
            plane = x[i, c]
            for j in range(size):
                d = plane[j] - shift
                s1 += d
                s2 += d * d
        off = s1 / (n * size)
        var = max(s2 / (n * size) - off * off, 0.0)
        shift += off
        if not off * off > FAR * FAR * var:
            break
    return shift, var


@njit(fastmath=SUMS)
def _plane_normalize(x, c, mean, scale, bias, relu, y):
    """y = (x − mean) · scale + bias, with the part of the mean that x's dtype cannot hold moved into the bias."""
    n, _, size = x.shape
    floor = _floor(x, relu)
    m = x.dtype.type(mean)
    a = x.dtype.type(scale)
    b = x.dtype.type(bias - (mean - m) * scale)
    for i in range(n):
        source, target = x[i, c], y[i, c]
        for j in range(size):
            v = (source[j] - m) * a + b
            target[j] = floor if v < floor else v


@njit(fastmath=SUMS)
def _planes_forward(x, weight, bias, eps, relu, y, mean, var, start, stop):
    for c in range(start, stop):
        mean[c], var[c] = _plane_statistics(x, c)
        _plane_normalize(x, c, mean[c], weight[c] / np.sqrt(var[c] + eps), bias[c], relu, y)


@njit(fastmath=SUMS)
def _planes_inference(x, weight, bias, eps, relu, y, mean, var, start, stop):
    for c in range(start, stop):
        _plane_normalize(x, c, mean[c], weight[c] / np.sqrt(var[c] + eps), bias[c], relu, y)


@njit(fastmath=SUMS)
def _plane_backward(g, x, c, weight, bias, mean, var, eps, relu, gx, gweight, gbias):
    n, _, size = x.shape
    count = n * size
    zero, floor = x.dtype.type(0), _floor(x, relu)
    ivar = 1 / np.sqrt(var[c] + eps)
    m = x.dtype.type(mean[c])
    rest = mean[c] - m
    a = x.dtype.type(weight[c] * ivar)
    b = x.dtype.type(bias[c] - rest * weight[c] * ivar)
    s1 = 0.0
    s2 = 0.0
    for i in range(n):
        gs, xs = g[i, c], x[i, c]
        for j in range(size):
            d = xs[j] - m
            gj = zero if d * a + b <= floor else gs[j]
            s1 += np.float64(gj)
            s2 += np.float64(gj) * np.float64(d)
    gbias[c] = s1
    s2 = (s2 - rest * s1) * ivar
    gweight[c] = s2
    by_x = -weight[c] * ivar * ivar * s2 / count
    p = x.dtype.type(by_x)
    q = x.dtype.type(-weight[c] * ivar * s1 / count - rest * by_x)
    for i in range(n):
        gs, xs, out = g[i, c], x[i, c], gx[i, c]
        for j in range(size):
            d = xs[j] - m
            gj = zero if d * a + b <= floor else gs[j]
            out[j] = a * gj + p * d + q


@njit(fastmath=SUMS)
def _planes_backward(g, x, weight, bias, mean, var, eps, relu, gx, gweight, gbias, start, stop):
    for c in range(start, stop):
        _plane_backward(g, x, c, weight, bias, mean, var, eps, relu, gx, gweight, gbias)


# ---- rows: (N, C) ---------------------------------------------------------------------------------------
# Rows are taken four at a time, so that the sums of a column are loaded and stored once for four of its elements.
# What is kept for each column lies in the rows of one small array: with an array for each, the compiler would need so
# many checks for overlap that it gives up on vector registers.


@njit(fastmath=SUMS)
def _row_sums(x, first, shift, sums):
    """Σ (x − shift) and Σ (x − shift)² of the columns from `first` on."""
    n, width = x.shape[0], shift.size
    i = 0
    while i + 4 <= n:
        r0, r1, r2, r3 = x[i, first:], x[i + 1, first:], x[i + 2, first:], x[i + 3, first:]
        for j in range(width):
            d0, d1, d2, d3 = r0[j] - shift[j], r1[j] - shift[j], r2[j] - shift[j], r3[j] - shift[j]
            sums[0, j] += (d0 + d1) + (d2 + d3)
            sums[1, j] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)
        i += 4
    while i < n:
        row = x[i, first:]
        for j in range(width):
            d = row[j] - shift[j]
            sums[0, j] += d
            sums[1, j] += d * d
        i += 1


@njit(fastmath=SUMS)
def _row_statistics(x, first, mean, var):
    n, width = x.shape[0], mean.size
    shift = x[0, first : first + width].astype(np.float64)
    for _ in range(2):
        sums = np.zeros((2, width))
        _row_sums(x, first, shift, sums)
        good = True
        for j in range(width):
            off = sums[0, j] / n
            mean[j] = shift[j] + off
            var[j] = max(sums[1, j] / n - off * off, 0.0)
            if off * off > FAR * FAR * var[j]:
                good = False
        if good:
            break
        shift = mean.copy()


@njit(fastmath=SUMS)
def _row_constants(x, weight, bias, mean, var, eps):
    """Rows m, a, b, of which y = (x − m) · a + b, and two more for the backward pass."""
    k = np.empty((5, mean.size), x.dtype)
    for j in range(mean.size):
        scale = weight[j] / np.sqrt(var[j] + eps)
        k[0, j] = mean[j]
        k[1, j] = scale
        k[2, j] = bias[j] - (mean[j] - k[0, j]) * scale
    return k


@njit(fastmath=SUMS)
def _rows_normalize(x, first, k, relu, y):
    floor = _floor(x, relu)
    for i in range(x.shape[0]):
        row, out = x[i, first:], y[i, first:]
        for j in range(k.shape[1]):
            v = (row[j] - k[0, j]) * k[1, j] + k[2, j]
            out[j] = floor if v < floor else v


@njit(fastmath=SUMS)
def _rows_forward(x, weight, bias, eps, relu, y, mean, var, start, stop):
    first, last = start * BLOCK, min(stop * BLOCK, x.shape[1])
    mean, var = mean[first:last], var[first:last]
    _row_statistics(x, first, mean, var)
    _rows_normalize(x, first, _row_constants(x, weight[first:last], bias[first:last], mean, var, eps), relu, y)


@njit(fastmath=SUMS)
def _rows_inference(x, weight, bias, eps, relu, y, mean, var, start, stop):
    first, last = start * BLOCK, min(stop * BLOCK, x.shape[1])
    mean, var = mean[first:last], var[first:last]
    _rows_normalize(x, first, _row_constants(x, weight[first:last], bias[first:last], mean, var, eps), relu, y)


@njit(fastmath=SUMS)
def _row_gradient_sums(g, x, first, k, relu, sums):
    """Σ g and Σ g (x − m) of the columns from `first` on."""
    n, width = x.shape[0], k.shape[1]
    zero, floor = x.dtype.type(0), _floor(x, relu)
    i = 0
    while i + 2 <= n:
        g0, g1, r0, r1 = g[i, first:], g[i + 1, first:], x[i, first:], x[i + 1, first:]
        for j in range(width):
            d0, d1 = r0[j] - k[0, j], r1[j] - k[0, j]
            e0 = zero if d0 * k[1, j] + k[2, j] <= floor else g0[j]
            e1 = zero if d1 * k[1, j] + k[2, j] <= floor else g1[j]
            sums[0, j] += np.float64(e0) + np.float64(e1)
            sums[1, j] += np.float64(e0) * np.float64(d0) + np.float64(e1) * np.float64(d1)
        i += 2
    if i < n:
        g0, r0 = g[i, first:], x[i, first:]
        for j in range(width):
            d0 = r0[j] - k[0, j]
            e0 = zero if d0 * k[1, j] + k[2, j] <= floor else g0[j]
            sums[0, j] += np.float64(e0)
            sums[1, j] += np.float64(e0) * np.float64(d0)


@njit(fastmath=SUMS)
def _rows_backward(g, x, weight, bias, mean, var, eps, relu, gx, gweight, gbias, start, stop):
    first, last = start * BLOCK, min(stop * BLOCK, x.shape[1])
    n, width = x.shape[0], last - first
    weight, mean, var = weight[first:last], mean[first:last], var[first:last]
    k = _row_constants(x, weight, bias[first:last], mean, var, eps)
    sums = np.zeros((2, width))
    _row_gradient_sums(g, x, first, k, relu, sums)
    for j in range(width):
        ivar = 1 / np.sqrt(var[j] + eps)
        rest = mean[j] - k[0, j]
        dot = (sums[1, j] - rest * sums[0, j]) * ivar
        gbias[first + j] = sums[0, j]
        gweight[first + j] = dot
        by_x = -weight[j] * ivar * ivar * dot / n
        k[3, j] = by_x
        k[4, j] = -weight[j] * ivar * sums[0, j] / n - rest * by_x
    zero, floor = x.dtype.type(0), _floor(x, relu)
    for i in range(n):
        gs, row, out = g[i, first:], x[i, first:], gx[i, first:]
        for j in range(width):
            d = row[j] - k[0, j]
            gj = zero if d * k[1, j] + k[2, j] <= floor else gs[j]
            out[j] = k[1, j] * gj + k[3, j] * d + k[4, j]


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
    """(N, C) as it is, anything longer as (N, C, S)."""
    return x if x.ndim == 2 else x.reshape(*x.shape[:2], -1)


def _parts(x: Array) -> int:
    """How many parts the work on x can be cut into."""
    return -(-x.shape[1] // BLOCK) if x.ndim == 2 else x.shape[1]


def _normalized(
    loop: Any, x: Array, weight: Array, bias: Array, eps: float, relu: bool, mean: Array, var: Array
) -> Array:
    if not weight.shape == bias.shape == mean.shape == var.shape == x.shape[1:2]:  # or the loops would read beyond them
        raise ValueError(f"weight {weight.shape} and bias {bias.shape} do not fit the channels of x {x.shape}")
    source = compiled(x)
    y = np.empty_like(source)
    if x.size:
        weight, bias = compiled(weight, source.dtype), compiled(bias, source.dtype)
        split(loop, _parts(x), x.size, _channels(source), weight, bias, eps, relu, _channels(y), mean, var)
    return y.astype(x.dtype, copy=False)


def _forward(x: Array, weight: Array, bias: Array, eps: float, relu: bool) -> tuple[Array, Array, Array]:
    mean, var = np.full((2, *x.shape[1:2]), np.nan)
    loop = _rows_forward if x.ndim == 2 else _planes_forward
    return _normalized(loop, x, weight, bias, eps, relu, mean, var), mean, var


def _backward(
    g: Array, x: Array, weight: Array, bias: Array, eps: float, mean: Array, var: Array, relu: bool
) -> tuple[Array, Array, Array]:
    source = compiled(x)
    gx, (gweight, gbias) = np.empty_like(source), np.zeros((2, x.shape[1]))
    if x.size:
        loop = _rows_backward if x.ndim == 2 else _planes_backward
        g, weight, bias = (compiled(a, source.dtype) for a in (g, weight, bias))
        arrays = _channels(g), _channels(source), weight, bias, mean, var, eps, relu, _channels(gx), gweight, gbias
        split(loop, _parts(x), x.size, *arrays)
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
    loop = _rows_inference if x.ndim == 2 else _planes_inference
    return _normalized(loop, x, weight, bias, eps, False, compiled(mean, np.float64), compiled(var, np.float64))


@kernel("batch_norm_fused.vjp", "cpu")
def batch_norm_fused_vjp(
    g: Array, y: Array, x: Array, weight: Array, bias: Array, *, needs: list[bool], eps: float, mean: Array, var: Array
) -> tuple[Array, Array, Array]:
    """Gradients with respect to x, weight and bias, from the statistics that the forward pass saved."""
    return _backward(g, x, weight, bias, eps, mean, var, False)


@kernel("batch_norm_relu_fused.vjp", "cpu")
def batch_norm_relu_fused_vjp(
    g: Array, y: Array, x: Array, weight: Array, bias: Array, *, needs: list[bool], eps: float, mean: Array, var: Array
) -> tuple[Array, Array, Array]:
    """The same behind a ReLU; which outputs were positive is computed again, which is cheaper than reading them."""
    return _backward(g, x, weight, bias, eps, mean, var, True)


@kernel("nn.running_statistics", "cpu")
def running_statistics(
    running_mean: Array, running_var: Array, mean: Array, var: Array, *, momentum: float, unbias: float
) -> tuple[Array, Array, bool]:
    """(1 − momentum) · running + momentum · batch of mean and unbias · variance, (C,); and whether all are finite."""
    new_mean, new_var = np.empty_like(running_mean), np.empty_like(running_var)
    arrays = (compiled(a) for a in (running_mean, running_var, mean, var))
    return new_mean, new_var, _track(*arrays, momentum, unbias, new_mean, new_var)
