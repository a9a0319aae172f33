"""BatchNorm over (N, C, S), one channel or one block of channels at a time, so that memory is read once.

S = 1 is a batch of vectors (`_columns_…`: a block of channels at a time, as a row holds them side by side), otherwise
the planes of images (`_planes_…`). Statistics are taken of x − shift, with the channel's first element as shift, and
summed in float64: exact at any mean, and 0 for a constant channel. A channel has one writer, so results do not depend
on the number of threads.
"""

from typing import Any

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from tinygrad_bn_kernels import kernel
from tinygrad_bn_kernels.cpu.threads import use_threads

Array = NDArray[Any]

# reassoc lets sums use vector registers; nnan and ninf are left out, as they would break NaN and Inf.
OPTIONS: dict[str, Any] = {
    "cache": True,
    "error_model": "numpy",
    "fastmath": {"reassoc", "contract", "nsz", "arcp"},
    "nogil": True,
}

# Channels of a block of vectors: 64 float32 are four cache lines of a row, and a block of some thousand rows stays in
# the second-level cache between the passes.
BLOCK = 64

# Of a shift that is further from the mean than this many deviations the sums are taken again, from a better one.
FAR = 16.0


# ---- planes: (N, C, S) ----------------------------------------------------------------------------------


@njit(**OPTIONS)
def _plane_statistics(x: Array, c: int) -> tuple[float, float]:
    n, _, size = x.shape
    shift = x[0, c, 0]
    off = 0.0
    var = 0.0
    for _ in range(2):
        s1 = 0.0
        s2 = 0.0
        for i in range(n):
            plane = x[i, c]
            for j in range(size):
                d = np.float64(plane[j] - shift)
                s1 += d
                s2 += d * d
        off = s1 / (n * size)
        var = max(s2 / (n * size) - off * off, 0.0)
        if not off * off > FAR * FAR * var:
            break
        shift = x.dtype.type(shift + off)
    return shift + off, var


@njit(**OPTIONS)
def _plane_forward(
    x: Array, c: int, weight: Array, bias: Array, eps: float, relu: bool, y: Array, mean: Array, var: Array
) -> None:
    mean[c], var[c] = _plane_statistics(x, c)
    _plane_normalize(x, c, mean[c], weight[c] / np.sqrt(var[c] + eps), bias[c], relu, y)


@njit(**OPTIONS)
def _plane_normalize(x: Array, c: int, mean: float, scale: float, bias: float, relu: bool, y: Array) -> None:
    """y = (x − mean) · scale + bias, with the part of the mean that x's dtype cannot hold moved into the bias."""
    n, _, size = x.shape
    zero = x.dtype.type(0)
    m = x.dtype.type(mean)
    a = x.dtype.type(scale)
    b = x.dtype.type(bias - (mean - m) * scale)
    for i in range(n):
        source, target = x[i, c], y[i, c]
        if relu:
            for j in range(size):
                target[j] = max((source[j] - m) * a + b, zero)
        else:
            for j in range(size):
                target[j] = (source[j] - m) * a + b


@njit(**OPTIONS)
def _plane_backward(
    g: Array,
    x: Array,
    c: int,
    weight: Array,
    bias: Array,
    mean: Array,
    var: Array,
    eps: float,
    relu: bool,
    gx: Array,
    gweight: Array,
    gbias: Array,
) -> None:
    n, _, size = x.shape
    count = n * size
    zero = x.dtype.type(0)
    ivar = 1 / np.sqrt(var[c] + eps)
    m = x.dtype.type(mean[c])
    rest = mean[c] - m
    a = x.dtype.type(weight[c] * ivar)
    b = x.dtype.type(bias[c] - rest * weight[c] * ivar)
    s1 = 0.0
    s2 = 0.0
    for i in range(n):
        gs, xs = g[i, c], x[i, c]
        if relu:
            for j in range(size):
                d = xs[j] - m
                gj = gs[j] if d * a + b > zero else zero
                s1 += np.float64(gj)
                s2 += np.float64(gj) * np.float64(d)
        else:
            for j in range(size):
                s1 += np.float64(gs[j])
                s2 += np.float64(gs[j]) * np.float64(xs[j] - m)
    gbias[c] = s1
    s2 = (s2 - rest * s1) * ivar
    gweight[c] = s2
    by_x = -weight[c] * ivar * ivar * s2 / count
    p = x.dtype.type(by_x)
    q = x.dtype.type(-weight[c] * ivar * s1 / count - rest * by_x)
    for i in range(n):
        gs, xs, out = g[i, c], x[i, c], gx[i, c]
        if relu:
            for j in range(size):
                d = xs[j] - m
                gj = gs[j] if d * a + b > zero else zero
                out[j] = a * gj + p * d + q
        else:
            for j in range(size):
                out[j] = a * gs[j] + p * (xs[j] - m) + q


@njit(**OPTIONS)
def _planes_forward_serial(x, weight, bias, eps, relu, y, mean, var):
    for c in range(x.shape[1]):
        _plane_forward(x, c, weight, bias, eps, relu, y, mean, var)


@njit(parallel=True, **OPTIONS)
def _planes_forward_parallel(x, weight, bias, eps, relu, y, mean, var):
    for c in prange(x.shape[1]):
        _plane_forward(x, c, weight, bias, eps, relu, y, mean, var)


@njit(**OPTIONS)
def _planes_backward_serial(g, x, weight, bias, mean, var, eps, relu, gx, gweight, gbias):
    for c in range(x.shape[1]):
        _plane_backward(g, x, c, weight, bias, mean, var, eps, relu, gx, gweight, gbias)


@njit(parallel=True, **OPTIONS)
def _planes_backward_parallel(g, x, weight, bias, mean, var, eps, relu, gx, gweight, gbias):
    for c in prange(x.shape[1]):
        _plane_backward(g, x, c, weight, bias, mean, var, eps, relu, gx, gweight, gbias)


# ---- columns: (N, C) ------------------------------------------------------------------------------------
# What is kept for each channel of a block lies in the rows of one small array: with an array for each, the compiler
# would need so many checks for overlap that it gives up on vector registers.


@njit(**OPTIONS)
def _block_statistics(x: Array, lo: int, hi: int, mean: Array, var: Array) -> None:
    n = x.shape[0]
    width = hi - lo
    shift = x[0, lo:hi].copy()
    for _ in range(2):
        sums = np.zeros((2, width))
        for i in range(n):
            row = x[i, lo:hi]
            for j in range(width):
                d = np.float64(row[j] - shift[j])
                sums[0, j] += d
                sums[1, j] += d * d
        far = False
        for j in range(width):
            off = sums[0, j] / n
            spread = max(sums[1, j] / n - off * off, 0.0)
            mean[lo + j] = shift[j] + off
            var[lo + j] = spread
            far = far or off * off > FAR * FAR * spread
            shift[j] = x.dtype.type(mean[lo + j])
        if not far:
            break


@njit(**OPTIONS)
def _block_constants(
    dtype_of: Array, lo: int, hi: int, weight: Array, bias: Array, mean: Array, var: Array, eps: float
) -> Array:
    """Rows m, a, b, of which y = (x − m) · a + b, and two more for the backward pass."""
    k = np.empty((5, hi - lo), dtype_of.dtype)
    for j in range(hi - lo):
        scale = weight[lo + j] / np.sqrt(var[lo + j] + eps)
        k[0, j] = mean[lo + j]
        k[1, j] = scale
        k[2, j] = bias[lo + j] - (mean[lo + j] - k[0, j]) * scale
    return k


@njit(**OPTIONS)
def _block_normalize(
    x: Array, lo: int, hi: int, weight: Array, bias: Array, mean: Array, var: Array, eps: float, relu: bool, y: Array
) -> None:
    k = _block_constants(x, lo, hi, weight, bias, mean, var, eps)
    zero = x.dtype.type(0)
    for i in range(x.shape[0]):
        source, target = x[i, lo:hi], y[i, lo:hi]
        if relu:
            for j in range(hi - lo):
                target[j] = max((source[j] - k[0, j]) * k[1, j] + k[2, j], zero)
        else:
            for j in range(hi - lo):
                target[j] = (source[j] - k[0, j]) * k[1, j] + k[2, j]


@njit(**OPTIONS)
def _block_backward(
    g: Array,
    x: Array,
    lo: int,
    hi: int,
    weight: Array,
    bias: Array,
    mean: Array,
    var: Array,
    eps: float,
    relu: bool,
    gx: Array,
    gweight: Array,
    gbias: Array,
) -> None:
    n = x.shape[0]
    zero = x.dtype.type(0)
    k = _block_constants(x, lo, hi, weight, bias, mean, var, eps)
    sums = np.zeros((2, hi - lo))
    for i in range(n):
        gs, xs = g[i, lo:hi], x[i, lo:hi]
        if relu:
            for j in range(hi - lo):
                d = xs[j] - k[0, j]
                gj = gs[j] if d * k[1, j] + k[2, j] > zero else zero
                sums[0, j] += np.float64(gj)
                sums[1, j] += np.float64(gj) * np.float64(d)
        else:
            for j in range(hi - lo):
                sums[0, j] += np.float64(gs[j])
                sums[1, j] += np.float64(gs[j]) * np.float64(xs[j] - k[0, j])
    for j in range(hi - lo):
        c = lo + j
        ivar = 1 / np.sqrt(var[c] + eps)
        rest = mean[c] - k[0, j]
        by_weight = (sums[1, j] - rest * sums[0, j]) * ivar
        gbias[c] = sums[0, j]
        gweight[c] = by_weight
        by_x = -weight[c] * ivar * ivar * by_weight / n
        k[3, j] = by_x
        k[4, j] = -weight[c] * ivar * sums[0, j] / n - rest * by_x
    for i in range(n):
        gs, xs, out = g[i, lo:hi], x[i, lo:hi], gx[i, lo:hi]
        if relu:
            for j in range(hi - lo):
                d = xs[j] - k[0, j]
                gj = gs[j] if d * k[1, j] + k[2, j] > zero else zero
                out[j] = k[1, j] * gj + k[3, j] * d + k[4, j]
        else:
            for j in range(hi - lo):
                out[j] = k[1, j] * gs[j] + k[3, j] * (xs[j] - k[0, j]) + k[4, j]


@njit(**OPTIONS)
def _columns_forward_serial(x, weight, bias, eps, relu, y, mean, var):
    for lo in range(0, x.shape[1], BLOCK):
        hi = min(lo + BLOCK, x.shape[1])
        _block_statistics(x, lo, hi, mean, var)
        _block_normalize(x, lo, hi, weight, bias, mean, var, eps, relu, y)


@njit(parallel=True, **OPTIONS)
def _columns_forward_parallel(x, weight, bias, eps, relu, y, mean, var):
    for block in prange((x.shape[1] + BLOCK - 1) // BLOCK):
        lo, hi = block * BLOCK, min((block + 1) * BLOCK, x.shape[1])
        _block_statistics(x, lo, hi, mean, var)
        _block_normalize(x, lo, hi, weight, bias, mean, var, eps, relu, y)


@njit(**OPTIONS)
def _columns_backward_serial(g, x, weight, bias, mean, var, eps, relu, gx, gweight, gbias):
    for lo in range(0, x.shape[1], BLOCK):
        hi = min(lo + BLOCK, x.shape[1])
        _block_backward(g, x, lo, hi, weight, bias, mean, var, eps, relu, gx, gweight, gbias)


@njit(parallel=True, **OPTIONS)
def _columns_backward_parallel(g, x, weight, bias, mean, var, eps, relu, gx, gweight, gbias):
    for block in prange((x.shape[1] + BLOCK - 1) // BLOCK):
        lo, hi = block * BLOCK, min((block + 1) * BLOCK, x.shape[1])
        _block_backward(g, x, lo, hi, weight, bias, mean, var, eps, relu, gx, gweight, gbias)


# ---- the ops --------------------------------------------------------------------------------------------


def _as_channels(x: Array) -> Array:
    """Contiguous, in a precision that is compiled, as (N, C) or (N, C, S)."""
    x = np.require(x, np.result_type(x, np.float32), ["C", "W"])
    return x if x.ndim == 2 else x.reshape(*x.shape[:2], -1)


def _forward(x: Array, weight: Array, bias: Array, eps: float, relu: bool) -> tuple[Array, Array, Array]:
    channels = _as_channels(x)
    y, mean, var = np.empty_like(channels), np.full(x.shape[1], np.nan), np.full(x.shape[1], np.nan)
    if x.size:
        serial, parallel = (
            (_columns_forward_serial, _columns_forward_parallel)
            if channels.ndim == 2
            else (_planes_forward_serial, _planes_forward_parallel)
        )
        run = parallel if use_threads(x.size) else serial
        run(
            channels,
            np.require(weight, np.float64, ["C", "W"]),
            np.require(bias, np.float64, ["C", "W"]),
            eps,
            relu,
            y,
            mean,
            var,
        )
    return y.reshape(x.shape).astype(x.dtype, copy=False), mean, var


def _backward(
    g: Array, x: Array, weight: Array, bias: Array, eps: float, mean: Array, var: Array, relu: bool
) -> tuple[Array, Array, Array]:
    channels = _as_channels(x)
    gx, gweight, gbias = np.empty_like(channels), np.zeros(x.shape[1]), np.zeros(x.shape[1])
    if x.size:
        serial, parallel = (
            (_columns_backward_serial, _columns_backward_parallel)
            if channels.ndim == 2
            else (_planes_backward_serial, _planes_backward_parallel)
        )
        run = parallel if use_threads(x.size) else serial
        g = np.require(g, channels.dtype, ["C", "W"]).reshape(channels.shape)
        weight, bias = np.require(weight, np.float64, ["C", "W"]), np.require(bias, np.float64, ["C", "W"])
        run(g, channels, weight, bias, mean, var, eps, relu, gx, gweight, gbias)
    return gx.reshape(x.shape), gweight, gbias


@kernel("batch_norm_fused", "cpu")
def batch_norm_fused(x: Array, weight: Array, bias: Array, *, eps: float) -> tuple[Array, Array, Array]:
    """x (N, C, ...), weight and bias (C,): the output, and mean and biased variance in float64 (C,)."""
    return _forward(x, weight, bias, eps, False)


@kernel("batch_norm_relu_fused", "cpu")
def batch_norm_relu_fused(x: Array, weight: Array, bias: Array, *, eps: float) -> tuple[Array, Array, Array]:
    """`batch_norm_fused`, and the ReLU of its output."""
    return _forward(x, weight, bias, eps, True)


@kernel("batch_norm_fused.vjp", "cpu")
def batch_norm_fused_vjp(
    g: Array, y: Array, x: Array, weight: Array, bias: Array, *, eps: float, mean: Array, var: Array
) -> tuple[Array, Array, Array]:
    """Gradients with respect to x, weight and bias, from the statistics that the forward pass saved."""
    return _backward(g, x, weight, bias, eps, mean, var, False)


@kernel("batch_norm_relu_fused.vjp", "cpu")
def batch_norm_relu_fused_vjp(
    g: Array, y: Array, x: Array, weight: Array, bias: Array, *, eps: float, mean: Array, var: Array
) -> tuple[Array, Array, Array]:
    """The same behind a ReLU; which outputs were positive is computed again, which is cheaper than reading them."""
    return _backward(g, x, weight, bias, eps, mean, var, True)
