"""Layer, group, instance and RMS normalisation: each block of neighbouring elements by its own statistics.

A block is P planes of S elements: all features of a sample for layer and RMS norm (S = 1), the channels of a group for
group norm, one channel for instance norm (P = 1). Weight and bias have one number for each plane, and are the same for
every sample. Statistics are summed in float64 about the block's first element: exact at any mean.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinygrad_bn_kernels import kernel
from tinygrad_bn_kernels.cpu.arrays import compiled
from tinygrad_bn_kernels.cpu.jit import SUMS, njit
from tinygrad_bn_kernels.cpu.threads import split

Array = NDArray[Any]
Blocks = tuple[int, int, int, int]  # samples N, groups G, planes P, elements S: x has N · G · P · S elements

# Of a shift that is further from the mean than this many deviations the sums are taken again, from a better one.
FAR = 16.0

# Into how many parts the samples are cut at most, each with its own sums of the gradients of weight and bias.
PARTS = 16


@njit(fastmath=SUMS)
def _statistics(block, centered):
    """Mean and biased variance; not centered, 0 and the mean square."""
    shift, var = np.float64(block[0]) if centered and np.isfinite(block[0]) else 0.0, 0.0
    for _ in range(2):
        s1 = 0.0
        s2 = 0.0
        for j in range(block.size):
            d = np.float64(block[j]) - shift
            s1 += d
            s2 += d * d
        if not centered:
            return 0.0, s2 / block.size
        off = s1 / block.size
        var = max(s2 / block.size - off * off, 0.0)
        shift += off
        if not off * off > FAR * FAR * var:
            break
    return shift, var


@njit(fastmath=SUMS)
def _forward(x, weight, bias, eps, centered, y, mean, var, start, stop):
    groups, planes = weight.shape
    size = x.shape[1] // planes
    for i in range(start, stop):
        block, out, g = x[i], y[i], i % groups
        mean[i], var[i] = _statistics(block, centered)
        m = x.dtype.type(mean[i])
        ivar = 1 / np.sqrt(var[i] + eps)
        a = x.dtype.type(ivar)
        r = x.dtype.type((m - mean[i]) * ivar)  # x̂ = (x − m) · a + r: what rounding took from m comes back
        if size == 1:
            w, b = weight[g], bias[g]
            for j in range(planes):
                out[j] = ((block[j] - m) * a + r) * w[j] + b[j]
        else:
            for p in range(planes):
                source, target = block[p * size : (p + 1) * size], out[p * size : (p + 1) * size]
                scale, shift = a * weight[g, p], r * weight[g, p] + bias[g, p]
                for j in range(size):
                    target[j] = (source[j] - m) * scale + shift


@njit(fastmath=SUMS - {"contract"})  # so that g · w − mean(g · w) is 0 for a block of one element
def _backward(g, x, weight, eps, centered, mean, var, gx, sums, start, stop):
    """`sums` is (parts, 2, G, P): of g · x̂ and of g, over the samples of each part."""
    groups, planes = weight.shape
    count, parts, samples = x.shape[1], sums.shape[0], x.shape[0] // groups
    size = count // planes
    for part in range(start, stop):
        for i in range(part * samples // parts * groups, (part + 1) * samples // parts * groups):
            gs, block, out, group = g[i], x[i], gx[i], i % groups
            m = x.dtype.type(mean[i])
            ivar = 1 / np.sqrt(var[i] + eps)
            a, r = x.dtype.type(ivar), x.dtype.type((m - mean[i]) * ivar)
            s1 = 0.0
            s2 = 0.0
            if size == 1:
                w, to_weight, to_bias = weight[group], sums[part, 0, group], sums[part, 1, group]
                for j in range(planes):
                    gw, xhat = gs[j] * w[j], (block[j] - m) * a + r
                    s1 += np.float64(gw)
                    s2 += np.float64(gw) * np.float64(xhat)
                for j in range(planes):
                    to_weight[j] += np.float64(gs[j]) * np.float64((block[j] - m) * a + r)
                    to_bias[j] += np.float64(gs[j])
                shift, slope = x.dtype.type(s1 / count if centered else 0.0), x.dtype.type(s2 / count)
                for j in range(planes):
                    xhat = (block[j] - m) * a + r
                    out[j] = a * (gs[j] * w[j] - shift - xhat * slope)
            else:
                for p in range(planes):
                    g0, x0 = gs[p * size : (p + 1) * size], block[p * size : (p + 1) * size]
                    t1 = 0.0
                    t2 = 0.0
                    for j in range(size):
                        t1 += np.float64(g0[j])
                        t2 += np.float64(g0[j]) * np.float64((x0[j] - m) * a + r)
                    sums[part, 0, group, p] += t2
                    sums[part, 1, group, p] += t1
                    s1 += t1 * weight[group, p]
                    s2 += t2 * weight[group, p]
                shift, slope = x.dtype.type(s1 / count if centered else 0.0), x.dtype.type(s2 / count)
                for p in range(planes):
                    g0, x0 = gs[p * size : (p + 1) * size], block[p * size : (p + 1) * size]
                    o0, w0 = out[p * size : (p + 1) * size], weight[group, p]
                    for j in range(size):
                        o0[j] = a * (g0[j] * w0 - shift - ((x0[j] - m) * a + r) * slope)


def _as_blocks(x: Array, weight: Array, blocks: Blocks) -> tuple[Array, Array]:
    """x as (N · G, P · S) and weight as (G, P), checked, since the loops would read beyond them."""
    n, groups, planes, size = blocks
    if x.size != n * groups * planes * size or weight.size != groups * planes:
        raise ValueError(f"x {x.shape} and weight {weight.shape} do not make blocks (N, G, P, S) of {blocks}")
    return x.reshape(n * groups, planes * size), weight.reshape(groups, planes)


@kernel("block_norm_fused", "cpu")
def block_norm_fused(
    x: Array, weight: Array, bias: Array, *, blocks: Blocks, eps: float, centered: bool
) -> tuple[Array, Array, Array]:
    """The output, in x's shape, and mean and variance of each block in float64, (N · G,)."""
    source = compiled(x)
    rows, w = _as_blocks(source, compiled(weight, source.dtype), blocks)
    b = compiled(bias, source.dtype).reshape(w.shape)
    y, mean, var = np.empty_like(source), np.empty(len(rows)), np.empty(len(rows))
    if x.size:
        split(_forward, len(rows), x.size, rows, w, b, eps, centered, y.reshape(rows.shape), mean, var)
    return y.astype(x.dtype, copy=False), mean, var


@kernel("block_norm_fused.vjp", "cpu")
def block_norm_fused_vjp(
    g: Array,
    y: Array,
    x: Array,
    weight: Array,
    bias: Array,
    *,
    needs: list[bool],
    blocks: Blocks,
    eps: float,
    centered: bool,
    mean: Array,
    var: Array,
) -> tuple[Array, Array, Array]:
    """Gradients with respect to x, weight and bias, from the statistics that the forward pass saved."""
    source = compiled(x)
    rows, w = _as_blocks(source, compiled(weight, source.dtype), blocks)
    gx, parts = np.empty_like(source), max(1, min(PARTS, blocks[0]))
    sums = np.zeros((parts, 2, *w.shape))
    if x.size:
        gs, out = compiled(g, source.dtype).reshape(rows.shape), gx.reshape(rows.shape)
        split(_backward, parts, x.size, gs, rows, w, eps, centered, mean, var, out, sums)
    gweight, gbias = sums.sum(axis=0)
    return gx, gweight.reshape(weight.shape), gbias.reshape(bias.shape)
