"""BatchNorm's siblings: layer, group, instance and root-mean-square normalisation, as normalisations of blocks."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np

from tinygrad_bn.arguments import (
    at_least_single,
    each_axis,
    expect_channels,
    expect_eps,
    expect_fits_memory,
    expect_floats,
    expect_several,
    expect_size,
)
from tinygrad_bn.functional.batch_norm import batch_norm_steps
from tinygrad_bn.functional.statistics import mean, values
from tinygrad_bn.ops import reshape, rsqrt, where
from tinygrad_bn.sample import REAL, Draw, Drawn
from tinygrad_bn.tensor import Operand, Tensor, fused

Blocks: TypeAlias = tuple[int, int, int, int]


def _sample_block_norm(d: Draw) -> Drawn:
    blocks = d.shape(min_dims=4, max_dims=4, min_side=1, max_side=3)
    planes = (blocks[1] * blocks[2],)
    weight, bias = (d.array(REAL, planes) if d.choice([True, True, False]) else None for _ in range(2))
    x = d.array(REAL, (blocks[0], math.prod(blocks[1:])))
    return (x, weight, bias), {"blocks": blocks, "eps": d.choice([0.3, 0.7]), "centered": d.choice([True, False])}


@fused(
    saves=("mean", "var"),
    formula="y = (x − μ) / √(σ² + eps) · weight + bias, block by block;  not centered, μ = 0",
    sample=_sample_block_norm,
)
def block_norm(x: Operand, weight: Operand, bias: Operand, *, blocks: Blocks, eps: float, centered: bool = True) -> Any:
    """Normalise each of the N · G blocks of P planes of S elements in x, where `blocks` is (N, G, P, S).

    Weight and bias have G · P elements, one for each plane, or are None. By-products: mean and variance of each block,
    float64 (N · G,); without `centered` the mean is taken as 0.
    """
    n, groups, planes, size = blocks
    channels = reshape(x, shape=(1, n * groups, planes * size))  # each block is a channel of BatchNorm
    if centered and planes * size != 1:
        steps = batch_norm_steps(channels, eps=eps)
        xhat, mu, var = steps.xhat, steps.mu, steps.var
    else:  # one value is its own mean
        xmu = channels - channels if centered else channels
        var = mean(xmu * xmu, axis=2, keepdims=True)
        xhat, mu = xmu * rsqrt(var + eps), channels if centered else where(var == var, 0.0, var)
    y = reshape(xhat, shape=blocks)
    y = y if weight is None else y * reshape(weight, shape=(groups, planes, 1))
    y = y if bias is None else y + reshape(bias, shape=(groups, planes, 1))
    return reshape(y, shape=x.shape), reshape(mu, shape=-1), reshape(var, shape=-1)


# ---- functions -------------------------------------------------------------------------------------------


def layer_norm(
    x: Operand,
    normalized_shape: int | tuple[int, ...],
    weight: Operand | None = None,
    bias: Operand | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Layer normalisation (Ba et al. 2016): over the last axes, which have the shape `normalized_shape`."""
    return _last_axes_norm(x, normalized_shape, weight, bias, eps, centered=True)


def group_norm(
    x: Operand, num_groups: int, weight: Operand | None = None, bias: Operand | None = None, eps: float = 1e-5
) -> Tensor:
    """Group normalisation (Wu & He 2018) of x (N, C, ...): each sample over groups of C / num_groups channels.

    Raises ValueError if the channels do not divide into the groups, or a group has one value.
    """
    expect_channels(x)
    num_groups = expect_size("num_groups", num_groups)
    if x.shape[1] % num_groups:
        raise ValueError(f"the channels of shape {x.shape} do not divide into {num_groups} groups")
    expect_several(x, x.shape[0] * num_groups, "group")
    planes = x.shape[1] // num_groups
    blocks = x.shape[0], num_groups, planes, math.prod(x.shape[2:])
    return _block_norm(x, weight, bias, x.shape[1:2], blocks, eps)


def instance_norm(x: Operand, weight: Operand | None = None, bias: Operand | None = None, eps: float = 1e-5) -> Tensor:
    """Instance normalisation (Ulyanov et al. 2016) of x (N, C, ...): each channel of each sample by itself.

    Raises ValueError if these have one value each.
    """
    expect_channels(x)
    expect_several(x, x.shape[0] * x.shape[1], "channel of a sample")
    blocks = x.shape[0], x.shape[1], 1, math.prod(x.shape[2:])
    return _block_norm(x, weight, bias, x.shape[1:2], blocks, eps)


def rms_norm(
    x: Operand, normalized_shape: int | tuple[int, ...], weight: Operand | None = None, eps: float | None = None
) -> Tensor:
    """Root-mean-square normalisation (Zhang & Sennrich 2019) over the last axes: no mean, no bias.

    As in PyTorch `eps` is by default the machine epsilon of x's dtype, but of float32 for half precision.
    """
    return _last_axes_norm(x, normalized_shape, weight, None, eps, centered=False)


def last_axes(normalized_shape: int | tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the axes to normalise over. Raises ValueError unless it is one size of 1 or more, or several."""
    shape = each_axis(normalized_shape, np.size(normalized_shape), "normalized_shape", 1)
    if not shape:
        raise ValueError("normalized_shape is empty: there is no axis to normalise over")
    expect_fits_memory("the block to normalise", shape)
    return shape


def _block_norm(
    x: Operand,
    weight: Operand | None,
    bias: Operand | None,
    shape: tuple[int, ...],
    blocks: Blocks,
    eps: Any,
    centered: bool = True,
) -> Tensor:
    """Normalise the blocks of x; `shape` is that of weight and bias."""
    expect_eps(eps)
    for name, v in (("weight", weight), ("bias", bias)):
        if v is not None and np.shape(values(v)) != shape:
            raise ValueError(f"{name} has shape {np.shape(values(v))}; for x {x.shape} it has to be {shape}")
    return block_norm(x, weight, bias, blocks=blocks, eps=eps, centered=centered)


def _last_axes_norm(
    x: Operand, normalized_shape: int | tuple[int, ...], weight: Any, bias: Any, eps: float | None, centered: bool
) -> Tensor:
    """Normalise each sample of x over its last axes, which have the shape `normalized_shape`, checked."""
    expect_floats(x, "normalisation")
    shape = last_axes(normalized_shape)
    samples = x.shape[: x.ndim - len(shape)]
    if (*samples, *shape) != x.shape:
        raise ValueError(f"the last axes of the input have to be the normalized_shape {shape}; got shape {x.shape}")
    eps = float(np.finfo(at_least_single(x.dtype)).eps) if eps is None and not centered else eps
    blocks = math.prod(samples), 1, math.prod(shape), 1
    return _block_norm(x, weight, bias, shape, blocks, eps, centered)
