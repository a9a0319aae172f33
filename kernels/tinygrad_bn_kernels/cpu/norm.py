"""BatchNorm over (N, C, S): statistics, output and gradients, a channel or a block of channels at a time.

S = 1 is a batch of vectors (`_rows_…`), of which a part is a chunk of rows; otherwise the planes of images
(`_planes_…`), of which a part is a range of channels, so that a channel is read again while it is in cache. Statistics
are taken of x − shift, with the channel's first element as shift, and summed in float64: exact at any mean, and 0 for a
constant channel.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinygrad_bn_kernels import kernel
from tinygrad_bn_kernels.cpu.arrays import compiled
from tinygrad_bn_kernels.cpu.jit import SUMS, njit
from tinygrad_bn_kernels.cpu.threads import split

Array = NDArray[Any]

# Rows of a batch of vectors whose sums are added up before those of the next.
CHUNK = 256

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
    shift = np.float64(x[0, c, 0] if np.isfinite(x[0, c, 0]) else 0)  # or an infinite mean would be NaN
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
def _rounded(x, mean, var, eps):
    """m, a and r in x's dtype, of which x̂ = (x − m) · a + r; r is what rounding took from the mean, m."""
    m, ivar = x.dtype.type(mean), 1 / np.sqrt(var + eps)
    return m, x.dtype.type(ivar), x.dtype.type((m - mean) * ivar)


@njit(fastmath=SUMS)
def _plane_normalize(x, c, mean, var, weight, bias, eps, relu, y):
    n, _, size = x.shape
    floor = _floor(x, relu)
    m, a, r = _rounded(x, mean, var, eps)
    a, b = a * weight, r * weight + bias
    for i in range(n):
        source, target = x[i, c], y[i, c]
        for j in range(size):
            v = (source[j] - m) * a + b
            target[j] = floor if v < floor else v


@njit(fastmath=SUMS)
def _planes_forward(x, weight, bias, eps, relu, y, mean, var, start, stop):
    for c in range(start, stop):
        mean[c], var[c] = _plane_statistics(x, c)
        _plane_normalize(x, c, mean[c], var[c], weight[c], bias[c], eps, relu, y)


@njit(fastmath=SUMS)
def _planes_inference(x, weight, bias, eps, relu, y, mean, var, start, stop):
    for c in range(start, stop):
        _plane_normalize(x, c, mean[c], var[c], weight[c], bias[c], eps, relu, y)


@njit()
def _passed(g, xhat, w, b, zero):
    """g where the output x̂ · w + b is positive; 0 elsewhere."""
    return g if xhat * w + b > zero else zero


@njit(fastmath=SUMS)
def _plane_gradient_sums(g, x, c, m, a, r, w, b, relu):
    """Σ g and Σ g x̂ of channel c.

    Four terms are added in their own precision, which rounds by less than the gradients will be, these in float64.
    """
    n, _, size = x.shape
    zero = x.dtype.type(0)
    s1 = 0.0
    s2 = 0.0
    i = 0
    while i + 4 <= n:
        g0, g1, g2, g3 = g[i, c], g[i + 1, c], g[i + 2, c], g[i + 3, c]
        x0, x1, x2, x3 = x[i, c], x[i + 1, c], x[i + 2, c], x[i + 3, c]
        if relu:
            for j in range(size):
                h0, h1, h2, h3 = (x0[j] - m) * a + r, (x1[j] - m) * a + r, (x2[j] - m) * a + r, (x3[j] - m) * a + r
                e0, e1 = _passed(g0[j], h0, w, b, zero), _passed(g1[j], h1, w, b, zero)
                e2, e3 = _passed(g2[j], h2, w, b, zero), _passed(g3[j], h3, w, b, zero)
                s1 += np.float64((e0 + e1) + (e2 + e3))
                s2 += np.float64((e0 * h0 + e1 * h1) + (e2 * h2 + e3 * h3))
        else:
            for j in range(size):
                h0, h1, h2, h3 = (x0[j] - m) * a + r, (x1[j] - m) * a + r, (x2[j] - m) * a + r, (x3[j] - m) * a + r
                s1 += np.float64((g0[j] + g1[j]) + (g2[j] + g3[j]))
                s2 += np.float64((g0[j] * h0 + g1[j] * h1) + (g2[j] * h2 + g3[j] * h3))
        i += 4
    while i < n:
        g0, x0 = g[i, c], x[i, c]
        for j in range(size):
            h = (x0[j] - m) * a + r
            e = _passed(g0[j], h, w, b, zero) if relu else g0[j]
            s1 += np.float64(e)
            s2 += np.float64(e * h)
        i += 1
    return s1, s2


@njit(fastmath=SUMS)
def _plane_backward(g, x, c, weight, bias, mean, var, eps, relu, gx, gweight, gbias):
    """gx = a w · (g − mean g − x̂ · mean(g x̂)), if gx is there to be written."""
    n, _, size = x.shape
    zero = x.dtype.type(0)
    m, a, r = _rounded(x, mean[c], var[c], eps)
    w, b = weight[c], bias[c]
    gbias[c], gweight[c] = _plane_gradient_sums(g, x, c, m, a, r, w, b, relu)
    scale, shift, slope = a * w, x.dtype.type(gbias[c] / (n * size)), x.dtype.type(gweight[c] / (n * size))
    for i in range(gx.shape[0]):
        gs, xs, out = g[i, c], x[i, c], gx[i, c]
        if relu:
            for j in range(size):
                h = (xs[j] - m) * a + r
                out[j] = scale * (_passed(gs[j], h, w, b, zero) - shift - h * slope)
        else:
            for j in range(size):
                out[j] = scale * (gs[j] - shift - ((xs[j] - m) * a + r) * slope)


@njit(fastmath=SUMS)
def _planes_backward(g, x, weight, bias, mean, var, eps, relu, gx, gweight, gbias, start, stop):
    for c in range(start, stop):
        _plane_backward(g, x, c, weight, bias, mean, var, eps, relu, gx, gweight, gbias)


# ---- rows: (N, C) ---------------------------------------------------------------------------------------
# A chunk of rows at a time, with the sums of each chunk added up in one order: chunks follow from the shape alone. Rows
# are taken four at a time, so that the sums of a column are loaded and stored once for four of its elements. What is
# kept for each column lies in the rows of one small array: with an array for each, the compiler would need so many
# checks for overlap that it gives up on vector registers.


@njit(fastmath=SUMS)
def _rows_sums(x, shift, sums, start, stop):
    """Σ (x − shift) and Σ (x − shift)² of each column, for every chunk from start to stop: sums is (chunks, 2, C)."""
    for t in range(start, stop):
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
    """Mean and variance from the chunks' sums; whether the shift was good enough, else it is set to the mean."""
    good = True
    for j in range(shift.size):
        s1 = 0.0
        s2 = 0.0
        for t in range(sums.shape[0]):
            s1 += sums[t, 0, j]
            s2 += sums[t, 1, j]
        off = s1 / n
        mean[j] = shift[j] + off
        var[j] = max(s2 / n - off * off, 0.0)
        if off * off > FAR * FAR * var[j]:
            good = False
        shift[j] = mean[j]
    return good


@njit(fastmath=SUMS)
def _rows_constants(x, weight, bias, mean, var, eps):
    """Rows m, a, r, w, b, of which x̂ = (x − m) · a + r and y = x̂ · w + b; and two more for the backward pass."""
    k = np.empty((7, mean.size), x.dtype)
    for j in range(mean.size):
        k[0, j], k[1, j], k[2, j] = _rounded(x, mean[j], var[j], eps)
        k[3, j], k[4, j] = weight[j], bias[j]
    return k


@njit(fastmath=SUMS)
def _rows_normalize(x, k, relu, y, start, stop):
    floor = _floor(x, relu)
    for i in range(start * CHUNK, min(stop * CHUNK, x.shape[0])):
        row, out = x[i], y[i]
        for j in range(row.size):
            v = ((row[j] - k[0, j]) * k[1, j] + k[2, j]) * k[3, j] + k[4, j]
            out[j] = floor if v < floor else v


def _rows_forward(x: Array, weight: Array, bias: Array, eps: float, relu: bool, *out: Array) -> None:
    y, mean, var = out
    chunks, shift = -(-len(x) // CHUNK), x[0].astype(np.float64)
    shift[~np.isfinite(shift)] = 0.0
    for _ in range(2):
        sums = np.zeros((chunks, 2, x.shape[1]))
        split(_rows_sums, chunks, x.size, x, shift, sums)
        if _rows_statistics(sums, len(x), shift, mean, var):
            break
    split(_rows_normalize, chunks, x.size, x, _rows_constants(x, weight, bias, mean, var, eps), relu, y)


@njit(fastmath=SUMS)
def _rows_inference(x, weight, bias, eps, relu, y, mean, var, start, stop):
    _rows_normalize(x, _rows_constants(x, weight, bias, mean, var, eps), relu, y, start, stop)


@njit(fastmath=SUMS)
def _rows_gradient_sums(g, x, k, relu, sums, start, stop):
    """Σ g and Σ g x̂ of each column, for every chunk from start to stop; four terms at a time as for planes."""
    zero = x.dtype.type(0)
    for t in range(start, stop):
        i, last = t * CHUNK, min((t + 1) * CHUNK, x.shape[0])
        while i + 4 <= last:
            g0, g1, g2, g3 = g[i], g[i + 1], g[i + 2], g[i + 3]
            x0, x1, x2, x3 = x[i], x[i + 1], x[i + 2], x[i + 3]
            if relu:
                for j in range(k.shape[1]):
                    m, a, r, w, b = k[0, j], k[1, j], k[2, j], k[3, j], k[4, j]
                    h0, h1 = (x0[j] - m) * a + r, (x1[j] - m) * a + r
                    h2, h3 = (x2[j] - m) * a + r, (x3[j] - m) * a + r
                    e0, e1 = _passed(g0[j], h0, w, b, zero), _passed(g1[j], h1, w, b, zero)
                    e2, e3 = _passed(g2[j], h2, w, b, zero), _passed(g3[j], h3, w, b, zero)
                    sums[t, 0, j] += np.float64((e0 + e1) + (e2 + e3))
                    sums[t, 1, j] += np.float64((e0 * h0 + e1 * h1) + (e2 * h2 + e3 * h3))
            else:
                for j in range(k.shape[1]):
                    m, a, r = k[0, j], k[1, j], k[2, j]
                    h0, h1 = (x0[j] - m) * a + r, (x1[j] - m) * a + r
                    h2, h3 = (x2[j] - m) * a + r, (x3[j] - m) * a + r
                    sums[t, 0, j] += np.float64((g0[j] + g1[j]) + (g2[j] + g3[j]))
                    sums[t, 1, j] += np.float64((g0[j] * h0 + g1[j] * h1) + (g2[j] * h2 + g3[j] * h3))
            i += 4
        while i < last:
            g0, x0 = g[i], x[i]
            for j in range(k.shape[1]):
                h = (x0[j] - k[0, j]) * k[1, j] + k[2, j]
                e = _passed(g0[j], h, k[3, j], k[4, j], zero) if relu else g0[j]
                sums[t, 0, j] += np.float64(e)
                sums[t, 1, j] += np.float64(e * h)
            i += 1


@njit(fastmath=SUMS)
def _rows_gradients(sums, n, k, gweight, gbias):
    """Those of weight and bias from the chunks' sums, and their means into k."""
    for j in range(gweight.size):
        s1 = 0.0
        s2 = 0.0
        for t in range(sums.shape[0]):
            s1 += sums[t, 0, j]
            s2 += sums[t, 1, j]
        gbias[j], gweight[j] = s1, s2
        k[5, j], k[6, j] = s1 / n, s2 / n


@njit(fastmath=SUMS)
def _rows_gradient(g, x, k, relu, gx, start, stop):
    zero = x.dtype.type(0)
    for i in range(start * CHUNK, min(stop * CHUNK, x.shape[0])):
        gs, row, out = g[i], x[i], gx[i]
        if relu:
            for j in range(row.size):
                h = (row[j] - k[0, j]) * k[1, j] + k[2, j]
                e = _passed(gs[j], h, k[3, j], k[4, j], zero)
                out[j] = k[1, j] * k[3, j] * (e - k[5, j] - h * k[6, j])
        else:
            for j in range(row.size):
                h = (row[j] - k[0, j]) * k[1, j] + k[2, j]
                out[j] = k[1, j] * k[3, j] * (gs[j] - k[5, j] - h * k[6, j])


def _rows_backward(
    g: Array, x: Array, weight: Array, bias: Array, mean: Array, var: Array, eps: float, relu: bool, *out: Array
) -> None:
    gx, gweight, gbias = out
    chunks = -(-len(x) // CHUNK)
    k, sums = _rows_constants(x, weight, bias, mean, var, eps), np.zeros((chunks, 2, x.shape[1]))
    split(_rows_gradient_sums, chunks, x.size, g, x, k, relu, sums)
    _rows_gradients(sums, len(x), k, gweight, gbias)
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
    return x.reshape(x.shape[:2]) if x.size == x.shape[0] * x.shape[1] else x.reshape(*x.shape[:2], -1)


def _expect_channels(x: Array, *vectors: Array) -> None:
    """Raise ValueError unless each vector is (C,): the loops would read beyond it."""
    for v in vectors:
        if v.shape != x.shape[1:2]:
            raise ValueError(f"vectors of shape {v.shape} do not fit the channels of x {x.shape}")


def _forward(x: Array, weight: Array, bias: Array, eps: float, relu: bool) -> tuple[Array, Array, Array]:
    _expect_channels(x, weight, bias)
    source = compiled(x)
    y, (mean, var) = np.empty_like(source), np.empty((2, x.shape[1])) if x.size else np.full((2, x.shape[1]), np.nan)
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
    source = compiled(x)
    gx = np.empty_like(source) if needs[0] else None
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
    source = compiled(x)
    y, statistics = np.empty_like(source), (compiled(mean, np.float64), compiled(var, np.float64))
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
    old = compiled(running_mean), compiled(running_var)
    return new_mean, new_var, _track(*old, compiled(mean), compiled(var), momentum, unbias, new_mean, new_var)
