"""Layer, group, instance and RMS normalisation: each block of neighbouring elements has its own statistics.

A block is P planes of S elements: all features of a sample for layer and RMS norm (S = 1), the channels of a group for
group norm, one channel for instance norm (P = 1). Weight and bias have one number for each plane. As in BatchNorm,
statistics and sums of gradients are shifted and summed in float64, so they are accurate at any mean.
"""

from typing import Any

import numpy as np

from tinygrad_bn_kernels import kernel
from tinygrad_bn_kernels.cpu.arrays import Array, compiled
from tinygrad_bn_kernels.cpu.jit import SUMS, inlined, njit
from tinygrad_bn_kernels.cpu.memory import empty_like
from tinygrad_bn_kernels.cpu.norm_planes import plane_statistics
from tinygrad_bn_kernels.cpu.norm_terms import common_shift, is_ordinary, normalizer
from tinygrad_bn_kernels.cpu.threads import split

Blocks = tuple[int, int, int, int]  # samples N, groups G, planes P, elements S: x has N · G · P · S elements

# Most parts of a batch; each has its own sums for the gradients of weight and bias.
PARTS = 16


@inlined(fastmath=SUMS)
def _mean_square(block):
    total = 0.0
    for j in range(block.size):
        total += np.float64(block[j]) * np.float64(block[j])
    return total / block.size


@njit(allocates=False, fastmath=SUMS)
def _forward(x, weight, bias, eps, centered, y, mean, var, start, stop):
    groups, planes = weight.shape
    size = x.shape[1] // planes
    channels = x.reshape(1, *x.shape)
    for i in range(start, stop):
        block, out, g = x[i], y[i], i % groups
        mean[i], var[i] = plane_statistics(channels, i) if centered else (0.0, _mean_square(block))
        m, ivar, shift = normalizer(x, mean[i], var[i], eps)
        a, r = x.dtype.type(ivar), x.dtype.type(shift)
        if size == 1:
            w, b = weight[g], bias[g]
            for j in range(planes):
                out[j] = ((block[j] - m) * a + r) * w[j] + b[j]
        else:
            for p in range(planes):
                source, target = block[p * size : (p + 1) * size], out[p * size : (p + 1) * size]
                scale, shift = x.dtype.type(ivar * weight[g, p]), x.dtype.type(r * weight[g, p] + bias[g, p])
                for j in range(size):
                    target[j] = (source[j] - m) * scale + shift


@inlined(fastmath={"contract"})
def _xhat(x, m, a, r):
    return (x - m) * a + r


@inlined(fastmath={"contract"})
def _shifted(g, shift, w, extra):
    """g · w − shift · w₀, where w₀ is the block's first weight and extra = shift · (w − w₀)."""
    return (g - shift) * w + extra


@njit(allocates=False, fastmath=SUMS)
def _backward(g, x, weight, eps, centered, mean, var, gx, sums, check, start, stop):
    """gx, and sums (parts, 2, G, P) of g · x̂ and of g over the samples of each part.

    gx = ivar · (d − mean d − x̂ · mean(d x̂)) with d = g · w − constant: the mean removes the constant.
    Not centered, d = g · w and no mean is subtracted. check (parts,) is NaN for a part whose gx is not all finite.
    """
    groups, planes = weight.shape
    count, parts, samples = x.shape[1], sums.shape[0], x.shape[0] // groups
    size = count // planes
    cast = x.dtype.type
    for part in range(start, stop):
        for i in range(part * samples // parts * groups, (part + 1) * samples // parts * groups):
            gs, block, out, group = g[i], x[i], gx[i], i % groups
            m, ivar, rest = normalizer(x, mean[i], var[i], eps)
            a, r, w, w0 = cast(ivar), cast(rest), weight[group], weight[group, 0]
            first, second, third = gs[0], gs[count // 2], gs[count - 1]
            shift = common_shift(min(first, second, third), max(first, second, third)) if centered else cast(0)
            to_weight, to_bias = sums[part, 0, group], sums[part, 1, group]
            s1 = 0.0
            s2 = 0.0
            if size == 1:
                for j in range(planes):
                    d, xhat = _shifted(gs[j], shift, w[j], shift * (w[j] - w0)), _xhat(block[j], m, a, r)
                    s1 += np.float64(d)
                    s2 += np.float64(d) * np.float64(xhat)
                for j in range(planes):
                    to_weight[j] += np.float64(gs[j]) * np.float64(_xhat(block[j], m, a, r))
                    to_bias[j] += np.float64(gs[j])
            else:
                for p in range(planes):
                    g0, x0, extra = gs[p * size : (p + 1) * size], block[p * size : (p + 1) * size], shift * (w[p] - w0)
                    t1 = 0.0
                    t2 = 0.0
                    t3 = 0.0
                    for j in range(size):
                        d, xhat = np.float64(g0[j]) - np.float64(shift), np.float64(_xhat(x0[j], m, a, r))
                        t1 += d
                        t2 += d * xhat
                        t3 += xhat
                    to_weight[p] += t2 + np.float64(shift) * t3 if planes > 1 else t2  # Σ x̂ = 0 over a block
                    to_bias[p] += t1 + size * np.float64(shift)
                    s1 += t1 * w[p] + size * np.float64(extra)
                    s2 += t2 * w[p] + extra * t3
            finite = cast(0)  # stays 0, or becomes NaN
            mean_d, slope = cast(s1 / count if centered else 0.0), cast(s2 / count)
            if size == 1:
                for j in range(planes):
                    d, xhat = _shifted(gs[j], shift, w[j], shift * (w[j] - w0)), _xhat(block[j], m, a, r)
                    out[j] = a * (d - (xhat * slope + mean_d))
                    finite += out[j] * cast(0)
            else:
                for p in range(planes):
                    g0, x0, extra = gs[p * size : (p + 1) * size], block[p * size : (p + 1) * size], shift * (w[p] - w0)
                    o0 = out[p * size : (p + 1) * size]
                    for j in range(size):
                        d, xhat = _shifted(g0[j], shift, w[p], extra), _xhat(x0[j], m, a, r)
                        o0[j] = a * (d - (xhat * slope + mean_d))
                        finite += o0[j] * cast(0)
            check[part] += finite


def _as_blocks(x: Array, weight: Array | None, blocks: Blocks) -> tuple[Array, Array]:
    """x as (N · G, P · S) and weight as (G, P) in x's dtype; None is 1.

    Raises ValueError for other sizes: the loops would read out of bounds.
    """
    n, groups, planes, size = blocks
    w = np.ones((groups, planes), x.dtype) if weight is None else compiled(weight, x.dtype)
    if x.size != n * groups * planes * size or w.size != groups * planes:
        raise ValueError(f"x {x.shape} and weight {w.shape} do not have the size of blocks (N, G, P, S) = {blocks}")
    return x.reshape(n * groups, planes * size), w.reshape(groups, planes)


@kernel("block_norm", "cpu")
def block_norm(
    x: Array, weight: Array | None, bias: Array | None, *, blocks: Blocks, eps: float, centered: bool
) -> Any:
    """The output, in x's shape, and mean and variance of each block in float64, (N · G,)."""
    if x.dtype.kind != "f":
        return NotImplemented
    source = compiled(x)
    rows, w = _as_blocks(source, weight, blocks)
    b = np.zeros(w.shape, source.dtype) if bias is None else compiled(bias, source.dtype).reshape(w.shape)
    y, mean, var = empty_like(source), np.empty(len(rows)), np.empty(len(rows))
    if x.size:
        numbers = float(eps), bool(centered)  # other types would compile the loop again
        split(_forward, len(rows), x.size, rows, w, b, *numbers, y.reshape(rows.shape), mean, var)
        if not is_ordinary(w, mean, var, float(eps)):
            return NotImplemented
    else:
        mean[:] = var[:] = np.nan
    return y.astype(x.dtype, copy=False), mean, var


@kernel("block_norm.vjp", "cpu")
def block_norm_vjp(
    g: Array,
    y: Array,
    x: Array,
    weight: Array | None,
    bias: Array | None,
    *,
    needs: list[bool],
    blocks: Blocks,
    eps: float,
    centered: bool,
    mean: Array,
    var: Array,
) -> Any:
    """Gradients of x, weight and bias, from the saved statistics."""
    source = compiled(x)
    rows, w = _as_blocks(source, weight, blocks)
    gx, parts = empty_like(source), max(1, min(PARTS, blocks[0]))
    sums, check = np.zeros((parts, 2, *w.shape)), np.zeros(parts)
    if x.size:
        if not is_ordinary(w, mean, var, float(eps)):
            return NotImplemented
        gs, out = compiled(g, source.dtype).reshape(rows.shape), gx.reshape(rows.shape)
        split(_backward, parts, x.size, gs, rows, w, float(eps), bool(centered), mean, var, out, sums, check)
        if np.isnan(check).any() and np.isfinite(mean).all() and np.isfinite(g).all():  # a term overflows in x's dtype
            return NotImplemented
    total = np.add.reduce(sums)
    gweight = None if weight is None else total[0].reshape(weight.shape)
    gbias = None if bias is None else total[1].reshape(bias.shape)
    return gx, gweight, gbias
