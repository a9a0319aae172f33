"""BatchNorm in inference: output and gradients, with given mean and variance."""

from typing import Any

import numpy as np

from tinygrad_bn_kernels import kernel
from tinygrad_bn_kernels.cpu.arrays import Array, compiled
from tinygrad_bn_kernels.cpu.jit import SUMS, njit
from tinygrad_bn_kernels.cpu.memory import empty_like
from tinygrad_bn_kernels.cpu.norm import Vector, affine_or_default, by_channel, expect_channels, takes
from tinygrad_bn_kernels.cpu.norm_planes import plane_normalize
from tinygrad_bn_kernels.cpu.norm_rows import CHUNK, rows_inference
from tinygrad_bn_kernels.cpu.norm_terms import is_ordinary
from tinygrad_bn_kernels.cpu.threads import split


@njit(allocates=False, fastmath=SUMS)
def _planes_inference(x, weight, bias, eps, mean, var, y, start, stop):
    for c in range(start, stop):
        plane_normalize(x, c, mean[c], var[c], weight[c], bias[c], eps, False, y)


@njit(allocates=False, fastmath=SUMS)
def _planes_inference_backward(g, x, factor, center, gx, gweight, gbias, start, stop):
    """g · factor, Σ g (x − center) and Σ g of each channel."""
    for c in range(start, stop):
        s1 = 0.0
        s2 = 0.0
        for i in range(x.shape[0]):
            gs, xs, out = g[i, c], x[i, c], gx[i, c]
            for j in range(gs.size):
                out[j] = gs[j] * factor[c]
                s1 += np.float64(gs[j])
                s2 += np.float64(gs[j]) * (np.float64(xs[j]) - center[c])
        gbias[c], gweight[c] = s1, s2


@njit(allocates=False, fastmath=SUMS)
def _rows_inference_backward(g, x, factor, center, gx, sums, start, stop):
    """g · factor; Σ g and Σ g (x − center) of each column, for every chunk from start to stop."""
    for t in range(start, stop):
        for i in range(t * CHUNK, min((t + 1) * CHUNK, x.shape[0])):
            for j in range(x.shape[1]):
                gx[i, j] = g[i, j] * factor[j]
                sums[t, 0, j] += np.float64(g[i, j])
                sums[t, 1, j] += np.float64(g[i, j]) * (np.float64(x[i, j]) - center[j])


@kernel("batch_norm_inference", "cpu")
def batch_norm_inference(x: Array, mean: Array, var: Array, weight: Vector, bias: Vector, *, eps: float) -> Any:
    """x (N, C, ...) normalised by the given mean and variance (C,); weight and bias (C,) or None."""
    statistics = compiled(mean, np.float64), compiled(var, np.float64)
    expect_channels(x, *statistics)
    if not takes(x):
        return NotImplemented
    source = compiled(x)
    affine = affine_or_default(source, weight, bias)
    y = empty_like(source)
    if not x.size:
        return y.astype(x.dtype, copy=False)
    xs, ys = by_channel(source), by_channel(y)
    eps = float(eps)  # another type would compile the loops again
    if xs.ndim == 2:
        good = rows_inference(xs, *affine, eps, ys, *statistics)
    elif good := is_ordinary(affine[0], *statistics, eps):
        split(_planes_inference, x.shape[1], x.size, xs, *affine, eps, *statistics, ys)
    if not good:
        return NotImplemented
    return y.astype(x.dtype, copy=False)


@kernel("batch_norm_inference.vjp", "cpu")
def batch_norm_inference_vjp(
    g: Array,
    y: Array,
    x: Array,
    mean: Array,
    var: Array,
    weight: Vector,
    bias: Vector,
    *,
    needs: list[bool],
    eps: float,
) -> Any:
    """Gradients with respect to x, weight and bias; NotImplemented if those of mean or var are needed."""
    if needs[1] or needs[2] or not x.size:
        return NotImplemented
    source = compiled(x)
    scale, _ = affine_or_default(source, weight, bias)
    center, variance = compiled(mean, np.float64), compiled(var, np.float64)
    if not is_ordinary(scale, center, variance, float(eps)):
        return NotImplemented
    ivar = 1 / np.sqrt(variance + eps)
    gx, gweight, gbias = empty_like(source), np.empty(x.shape[1]), np.empty(x.shape[1])
    xs, gs, gxs = by_channel(source), by_channel(compiled(g, source.dtype)), by_channel(gx)
    factor = (scale * ivar).astype(source.dtype)
    if xs.ndim > 2:
        split(_planes_inference_backward, x.shape[1], x.size, gs, xs, factor, center, gxs, gweight, gbias)
    else:
        sums = np.zeros((-(-len(x) // CHUNK), 2, x.shape[1]))
        split(_rows_inference_backward, len(sums), x.size, gs, xs, factor, center, gxs, sums)
        gbias, gweight = sums.sum(axis=0)
    by_weight = None if weight is None or not needs[3] else (gweight * ivar).astype(weight.dtype)
    return gx, None, None, by_weight, None if bias is None or not needs[4] else gbias.astype(bias.dtype)
