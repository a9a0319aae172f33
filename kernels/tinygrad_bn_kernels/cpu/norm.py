"""BatchNorm over (N, C, S), one channel or one block of channels at a time, so that memory is read once.

S = 1 is a batch of vectors (`_rows_…`: a block of channels at a time, as a row holds them side by side), otherwise
the planes of images (`_planes_…`). Statistics are taken of x − shift, with the channel's first element as shift, and
summed in float64: exact at any mean, and 0 for a constant channel. A channel has one writer, so results do not depend
on the number of threads.
"""

from typing import Any

import numpy as np
from numba import prange
from numpy.typing import NDArray

from tinygrad_bn_kernels import kernel
from tinygrad_bn_kernels.cpu.arrays import compiled
from tinygrad_bn_kernels.cpu.jit import SUMS, njit
from tinygrad_bn_kernels.cpu.threads import use_threads

Array = NDArray[Any]

# Rows that one thread takes at a time of a batch of vectors.
CHUNK = 64

# Of a shift that is further from the mean than this many deviations the sums are taken again, from a better one.
FAR = 16.0


@njit()
def _floor(x: Array, relu: bool) -> float:
    """What the output is not below: one loop then serves with and without a ReLU, at half the compilation."""
    return x.dtype.type(0) if relu else x.dtype.type(-np.inf)


# ---- planes: (N, C, S) ----------------------------------------------------------------------------------


@njit(fastmath=SUMS)
def _plane_statistics(x: Array, c: int) -> tuple[float, float]:
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
def _plane_forward(
    x: Array, c: int, weight: Array, bias: Array, eps: float, relu: bool, y: Array, mean: Array, var: Array
) -> None:
    mean[c], var[c] = _plane_statistics(x, c)
    _plane_normalize(x, c, mean[c], weight[c] / np.sqrt(var[c] + eps), bias[c], relu, y)


@njit(fastmath=SUMS)
def _plane_normalize(x: Array, c: int, mean: float, scale: float, bias: float, relu: bool, y: Array) -> None:
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
def _planes_forward_serial(x, weight, bias, eps, relu, y, mean, var):
    for c in range(x.shape[1]):
        _plane_forward(x, c, weight, bias, eps, relu, y, mean, var)


@njit(parallel=True, fastmath=SUMS)
def _planes_forward_parallel(x, weight, bias, eps, relu, y, mean, var):
    for c in prange(x.shape[1]):
        _plane_forward(x, c, weight, bias, eps, relu, y, mean, var)


@njit(fastmath=SUMS)
def _planes_backward_serial(g, x, weight, bias, mean, var, eps, relu, gx, gweight, gbias):
    for c in range(x.shape[1]):
        _plane_backward(g, x, c, weight, bias, mean, var, eps, relu, gx, gweight, gbias)


@njit(parallel=True, fastmath=SUMS)
def _planes_backward_parallel(g, x, weight, bias, mean, var, eps, relu, gx, gweight, gbias):
    for c in prange(x.shape[1]):
        _plane_backward(g, x, c, weight, bias, mean, var, eps, relu, gx, gweight, gbias)


# ---- rows: (N, C) ---------------------------------------------------------------------------------------
# A chunk of rows at a time, with the sums of each chunk added up in order: the chunks, and so the results, are the
# same for any number of threads. What is kept for each channel lies in the rows of one small array: with an array for
# each, the compiler would need so many checks for overlap that it gives up on vector registers.


@njit(fastmath=SUMS)
def _chunk_sums(x: Array, t: int, shift: Array, sums: Array) -> None:
    """Σ (x − shift) and Σ (x − shift)² of each channel over chunk t."""
    for i in range(t * CHUNK, min((t + 1) * CHUNK, x.shape[0])):
        row = x[i]
        for j in range(x.shape[1]):
            d = row[j] - shift[j]
            sums[t, 0, j] += d
            sums[t, 1, j] += d * d


@njit(fastmath=SUMS)
def _statistics_of_sums(sums: Array, n: int, shift: Array, mean: Array, var: Array) -> bool:
    """Whether the shift was good enough; if not, it is set to the mean for another try."""
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
def _constants(x: Array, weight: Array, bias: Array, mean: Array, var: Array, eps: float) -> Array:
    """Rows m, a, b, of which y = (x − m) · a + b, and two more for the backward pass."""
    k = np.empty((5, x.shape[1]), x.dtype)
    for j in range(x.shape[1]):
        scale = weight[j] / np.sqrt(var[j] + eps)
        k[0, j] = mean[j]
        k[1, j] = scale
        k[2, j] = bias[j] - (mean[j] - k[0, j]) * scale
    return k


@njit(fastmath=SUMS)
def _chunk_normalize(x: Array, t: int, k: Array, relu: bool, y: Array) -> None:
    floor = _floor(x, relu)
    for i in range(t * CHUNK, min((t + 1) * CHUNK, x.shape[0])):
        row, out = x[i], y[i]
        for j in range(x.shape[1]):
            v = (row[j] - k[0, j]) * k[1, j] + k[2, j]
            out[j] = floor if v < floor else v


@njit(fastmath=SUMS)
def _chunk_backward_sums(g: Array, x: Array, t: int, k: Array, relu: bool, sums: Array) -> None:
    """Σ g and Σ g (x − m) of each channel over chunk t."""
    zero, floor = x.dtype.type(0), _floor(x, relu)
    for i in range(t * CHUNK, min((t + 1) * CHUNK, x.shape[0])):
        gs, row = g[i], x[i]
        for j in range(x.shape[1]):
            d = row[j] - k[0, j]
            gj = zero if d * k[1, j] + k[2, j] <= floor else gs[j]
            sums[t, 0, j] += np.float64(gj)
            sums[t, 1, j] += np.float64(gj) * np.float64(d)


@njit(fastmath=SUMS)
def _gradients_of_sums(
    sums: Array, n: int, weight: Array, mean: Array, var: Array, eps: float, k: Array, gweight: Array, gbias: Array
) -> None:
    for j in range(weight.size):
        s1 = 0.0
        s2 = 0.0
        for t in range(sums.shape[0]):
            s1 += sums[t, 0, j]
            s2 += sums[t, 1, j]
        ivar = 1 / np.sqrt(var[j] + eps)
        rest = mean[j] - k[0, j]
        gbias[j] = s1
        gweight[j] = (s2 - rest * s1) * ivar
        by_x = -weight[j] * ivar * ivar * gweight[j] / n
        k[3, j] = by_x
        k[4, j] = -weight[j] * ivar * s1 / n - rest * by_x


@njit(fastmath=SUMS)
def _chunk_backward(g: Array, x: Array, t: int, k: Array, relu: bool, gx: Array) -> None:
    zero, floor = x.dtype.type(0), _floor(x, relu)
    for i in range(t * CHUNK, min((t + 1) * CHUNK, x.shape[0])):
        gs, row, out = g[i], x[i], gx[i]
        for j in range(x.shape[1]):
            d = row[j] - k[0, j]
            gj = zero if d * k[1, j] + k[2, j] <= floor else gs[j]
            out[j] = k[1, j] * gj + k[3, j] * d + k[4, j]


@njit(fastmath=SUMS)
def _rows_forward_serial(x, weight, bias, eps, relu, y, mean, var):
    n, chunks = x.shape[0], (x.shape[0] + CHUNK - 1) // CHUNK
    shift = x[0].astype(np.float64)
    for _ in range(2):
        sums = np.zeros((chunks, 2, x.shape[1]))
        for t in range(chunks):
            _chunk_sums(x, t, shift, sums)
        if _statistics_of_sums(sums, n, shift, mean, var):
            break
    k = _constants(x, weight, bias, mean, var, eps)
    for t in range(chunks):
        _chunk_normalize(x, t, k, relu, y)


@njit(parallel=True, fastmath=SUMS)
def _rows_forward_parallel(x, weight, bias, eps, relu, y, mean, var):
    n, chunks = x.shape[0], (x.shape[0] + CHUNK - 1) // CHUNK
    shift = x[0].astype(np.float64)
    for _ in range(2):
        sums = np.zeros((chunks, 2, x.shape[1]))
        for t in prange(chunks):
            _chunk_sums(x, t, shift, sums)
        if _statistics_of_sums(sums, n, shift, mean, var):
            break
    k = _constants(x, weight, bias, mean, var, eps)
    for t in prange(chunks):
        _chunk_normalize(x, t, k, relu, y)


@njit(fastmath=SUMS)
def _rows_backward_serial(g, x, weight, bias, mean, var, eps, relu, gx, gweight, gbias):
    n, chunks = x.shape[0], (x.shape[0] + CHUNK - 1) // CHUNK
    k = _constants(x, weight, bias, mean, var, eps)
    sums = np.zeros((chunks, 2, x.shape[1]))
    for t in range(chunks):
        _chunk_backward_sums(g, x, t, k, relu, sums)
    _gradients_of_sums(sums, n, weight, mean, var, eps, k, gweight, gbias)
    for t in range(chunks):
        _chunk_backward(g, x, t, k, relu, gx)


@njit(parallel=True, fastmath=SUMS)
def _rows_backward_parallel(g, x, weight, bias, mean, var, eps, relu, gx, gweight, gbias):
    n, chunks = x.shape[0], (x.shape[0] + CHUNK - 1) // CHUNK
    k = _constants(x, weight, bias, mean, var, eps)
    sums = np.zeros((chunks, 2, x.shape[1]))
    for t in prange(chunks):
        _chunk_backward_sums(g, x, t, k, relu, sums)
    _gradients_of_sums(sums, n, weight, mean, var, eps, k, gweight, gbias)
    for t in prange(chunks):
        _chunk_backward(g, x, t, k, relu, gx)


# ---- the ops --------------------------------------------------------------------------------------------


# The drivers by whether x is (N, C) and whether threads are used.
FORWARD = {
    (True, False): _rows_forward_serial,
    (True, True): _rows_forward_parallel,
    (False, False): _planes_forward_serial,
    (False, True): _planes_forward_parallel,
}
BACKWARD = {
    (True, False): _rows_backward_serial,
    (True, True): _rows_backward_parallel,
    (False, False): _planes_backward_serial,
    (False, True): _planes_backward_parallel,
}


def _channels(x: Array) -> Array:
    """(N, C) as it is, anything longer as (N, C, S)."""
    return x if x.ndim == 2 else x.reshape(*x.shape[:2], -1)


def _forward(x: Array, weight: Array, bias: Array, eps: float, relu: bool) -> tuple[Array, Array, Array]:
    if not weight.shape == bias.shape == x.shape[1:2]:  # or the loops would read beyond them
        raise ValueError(f"weight {weight.shape} and bias {bias.shape} do not fit the channels of x {x.shape}")
    source = compiled(x)
    y, mean, var = np.empty_like(source), np.full(x.shape[1], np.nan), np.full(x.shape[1], np.nan)
    if x.size:
        run = FORWARD[x.ndim == 2, use_threads(x.size)]
        weight, bias = compiled(weight, np.float64), compiled(bias, np.float64)
        run(_channels(source), weight, bias, eps, relu, _channels(y), mean, var)
    return y.astype(x.dtype, copy=False), mean, var


def _backward(
    g: Array, x: Array, weight: Array, bias: Array, eps: float, mean: Array, var: Array, relu: bool
) -> tuple[Array, Array, Array]:
    source = compiled(x)
    gx, gweight, gbias = np.empty_like(source), np.zeros(x.shape[1]), np.zeros(x.shape[1])
    if x.size:
        run = BACKWARD[x.ndim == 2, use_threads(x.size)]
        g, weight, bias = compiled(g, source.dtype), compiled(weight, np.float64), compiled(bias, np.float64)
        run(_channels(g), _channels(source), weight, bias, mean, var, eps, relu, _channels(gx), gweight, gbias)
    return gx, gweight, gbias


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
