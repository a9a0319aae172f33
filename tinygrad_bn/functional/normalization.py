"""BatchNorm from primitive operations, in nine named steps; its siblings; and the ops that fuse it."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from tinygrad_bn import ops
from tinygrad_bn.autograd import OPS, Operand, primitive, run
from tinygrad_bn.device import device_of, full
from tinygrad_bn.functional.statistics import expect_floats, mean_composed, values
from tinygrad_bn.ops import astype, reshape, rsqrt, sqrt
from tinygrad_bn.sample import POSITIVE, REAL, Draw
from tinygrad_bn.tensor import Axis, Tensor

Blocks: TypeAlias = tuple[int, int, int, int]


class Normalization(NamedTuple):
    """Every step of a normalisation, by its customary name (Ioffe & Szegedy 2015, Algorithm 1; Kratzert 2016)."""

    mu: Tensor  #      mean over the axes
    xmu: Tensor  #     x − mu
    sq: Tensor  #      xmu²
    var: Tensor  #     mean of sq: the biased variance
    sqrtvar: Tensor  # √(var + eps)
    ivar: Tensor  #    1 / sqrtvar
    xhat: Tensor  #    xmu · ivar: mean 0, variance var / (var + eps)
    gammax: Tensor  #  weight · xhat
    out: Tensor  #     gammax + bias, in x's dtype


def _expect_eps(eps: float) -> None:
    if not isinstance(eps, Real):
        raise TypeError(f"eps has to be a number; got {eps!r}")
    if not eps >= 0:
        raise ValueError(f"eps has to be 0 or more; got {eps}")


def _expect_channels(x: Operand, **vectors: Operand | None) -> None:
    """Raise unless x is (N, C, ...) of floats, and each vector (C,) or None."""
    expect_floats(x, "normalisation")
    if x.ndim < 2:
        raise ValueError(f"x has to be of shape (N, C, ...); got {x.shape}")
    channels = x.shape[1:2]
    for name, v in vectors.items():
        if v is not None and (v.shape if isinstance(v, Tensor) else np.shape(v)) != channels:
            raise ValueError(f"{name} has shape {np.shape(values(v))}, for {x.shape[1]} channels of x {x.shape}")


def _widened(x: Operand) -> Operand:
    """`x` in the precision that its statistics are computed in."""
    expect_floats(x, "normalisation")
    return astype(x, dtype=np.float32 if x.dtype == np.float16 else np.float64)


def normalization_steps(
    x: Operand, weight: Operand | None = None, bias: Operand | None = None, *, axis: Axis, eps: float
) -> Normalization:
    """Normalise `x` over `axis`, scale by `weight` and shift by `bias`, step by step.

    This is the definition of BatchNorm and its siblings; faster ways of computing it are measured against it.
    float16 is computed in float32, float32 in float64. So the statistics are exact at any mean, a constant
    channel gives exactly `bias`, and derivatives of every order follow from the steps.

    Args:
        x: any shape.
        weight, bias: shapes that broadcast with `x`; None is 1 and 0.
        axis: the axes over which mean and variance are taken.
        eps: added to the variance.
    """
    wide = _widened(x)
    mu = mean_composed(wide, axis=axis, keepdims=True)
    # What rounding left of the mean. It is 0 in exact arithmetic, so a constant to derivatives of every order.
    mu = mu + values(mean_composed(values(wide) - values(mu), axis=axis, keepdims=True))
    xmu = wide - mu
    sq = xmu * xmu
    var = mean_composed(sq, axis=axis, keepdims=True)
    sqrtvar = sqrt(var + eps)
    ivar = 1 / sqrtvar
    xhat = xmu * ivar
    gammax = xhat if weight is None else xhat * weight
    out = astype(gammax if bias is None else gammax + bias, dtype=x.dtype)
    return Normalization(mu, xmu, sq, var, sqrtvar, ivar, xhat, gammax, out)


def per_channel(v: Operand, ndim: int) -> Operand:
    """A vector (C,) in the shape that broadcasts along axis 1 of `ndim` axes: (C, 1, 1) for (N, C, H, W)."""
    return v if v is None or ndim <= 2 else reshape(v, shape=(-1, *(1,) * (ndim - 2)))


def batch_norm_steps(
    x: Operand, weight: Operand | None = None, bias: Operand | None = None, *, eps: float = 1e-5
) -> Normalization:
    """BatchNorm with the batch's statistics, every step by name: x (N, C, ...), weight and bias (C,)."""
    _expect_channels(x, weight=weight, bias=bias)
    axis = (0, *range(2, x.ndim))
    return normalization_steps(x, per_channel(weight, x.ndim), per_channel(bias, x.ndim), axis=axis, eps=eps)


# ---- fused -----------------------------------------------------------------------------------------------


def _sample_batch_norm(d: Draw) -> Any:
    shape = d.integer(1, 9), *d.shape(min_dims=1, max_dims=3, min_side=1, max_side=3)
    weight, bias = d.array(REAL, shape[1:2]), d.array(REAL, shape[1:2])
    x = d.distinct(shape) if d.choice([True, False]) else d.array(REAL, shape)
    return (x, weight, bias), {"eps": 0.3}


def _batch_norm_composed(x: Operand, weight: Operand, bias: Operand, *, eps: float) -> Tensor:
    return batch_norm_steps(x, weight, bias, eps=eps).out


@primitive(
    fuses=_batch_norm_composed,
    saves=("mean", "var"),
    formula="y = (x − μ) / √(σ² + eps) · weight + bias;  ∂x = weight / √(σ² + eps) · (g − ḡ − x̂ · mean(g x̂))",
    sample=_sample_batch_norm,
)
def batch_norm_fused(x: Operand, weight: Operand, bias: Operand, *, eps: float) -> Operand:
    """BatchNorm of x (N, C, ...) by the batch's statistics; saves its mean and biased variance, float64 (C,)."""
    steps = batch_norm_steps(x, weight, bias, eps=eps)
    return steps.out, *(np.asarray(v, np.float64).reshape(-1) for v in (steps.mu, steps.var))


def _batch_norm_relu_composed(x: Operand, weight: Operand, bias: Operand, *, eps: float) -> Tensor:
    return ops.relu(batch_norm_steps(x, weight, bias, eps=eps).out)


def _sample_batch_norm_relu(d: Draw) -> Any:
    """Operands whose outputs keep a distance from the kink."""
    n, c, plane = d.integer(3, 9), d.integer(1, 3), d.choice([(), (2,), (1, 2)])
    x = np.stack([d.distinct((n, *plane)) * 10 for _ in range(c)], axis=1)
    channels = x.swapaxes(0, 1).reshape(c, -1)
    xhat = (channels - channels.mean(1, keepdims=True)) / np.sqrt(channels.var(1, keepdims=True) + 0.3)
    between = np.sort(xhat)[:, :2].mean(1)  # the output is 0 half-way between two samples
    weight = np.where(np.arange(c) % 2, -1.5, 1.0)
    return (x, weight, -weight * between), {"eps": 0.3}


@primitive(
    fuses=_batch_norm_relu_composed,
    saves=("mean", "var"),
    formula="y = max((x − μ) / √(σ² + eps) · weight + bias, 0)",
    sample=_sample_batch_norm_relu,
)
def batch_norm_relu_fused(x: Operand, weight: Operand, bias: Operand, *, eps: float) -> Operand:
    """`batch_norm_fused` and the ReLU after it in one go, without an array between them."""
    y, saved = run(OPS["batch_norm_fused"], (x, weight, bias), {"eps": eps})
    return ops.relu(y), *saved


def _batch_norm_inference_composed(
    x: Operand, mean: Operand, var: Operand, weight: Operand, bias: Operand, *, eps: float
) -> Tensor:
    mean, var, weight, bias = (per_channel(v, x.ndim) for v in (mean, var, weight, bias))
    # (x − mean) first: x · a + b would lose as many digits as the mean is larger than the deviation.
    return astype((x - mean) * rsqrt(var + eps) * weight + bias, dtype=x.dtype)


def _sample_batch_norm_inference(d: Draw) -> Any:
    (x, weight, _), params = _sample_batch_norm(d)
    return (x, *(d.array(POSITIVE, weight.shape) for _ in range(4))), params


@primitive(
    fuses=_batch_norm_inference_composed,
    formula="y = (x − mean) / √(var + eps) · weight + bias",
    sample=_sample_batch_norm_inference,
)
def batch_norm_inference(
    x: Operand, mean: Operand, var: Operand, weight: Operand, bias: Operand, *, eps: float
) -> Operand:
    """BatchNorm of x (N, C, ...) by a mean and variance that are given, (C,) like weight and bias."""
    return _batch_norm_inference_composed(x, mean, var, weight, bias, eps=eps)


def _block_norm_composed(
    x: Operand, weight: Operand, bias: Operand, *, blocks: Blocks, eps: float, centered: bool
) -> Tensor:
    wide = reshape(_widened(x), shape=blocks)
    weight, bias = (reshape(v, shape=(*blocks[1:3], 1)) for v in (weight, bias))
    if centered:
        y = normalization_steps(wide, weight, bias, axis=(2, 3), eps=eps).out
    else:
        y = wide * rsqrt(mean_composed(wide * wide, axis=(2, 3), keepdims=True) + eps) * weight + bias
    return astype(reshape(y, shape=x.shape), dtype=x.dtype)


def _sample_block_norm(d: Draw) -> Any:
    blocks = d.shape(min_dims=4, max_dims=4, min_side=1, max_side=3)
    weight, bias = d.array(REAL, (blocks[1] * blocks[2],)), d.array(REAL, (blocks[1] * blocks[2],))
    x = d.array(REAL, (blocks[0], math.prod(blocks[1:])))
    return (x, weight, bias), {"blocks": blocks, "eps": 0.3, "centered": d.choice([True, False])}


@primitive(
    fuses=_block_norm_composed,
    saves=("mean", "var"),
    formula="y = (x − μ) / √(σ² + eps) · weight + bias, block by block;  not centered, μ = 0",
    sample=_sample_block_norm,
)
def block_norm_fused(
    x: Operand, weight: Operand, bias: Operand, *, blocks: Blocks, eps: float, centered: bool = True
) -> Operand:
    """Normalise each of the N · G blocks of P planes of S elements that x consists of: `blocks` is (N, G, P, S).

    Weight and bias have G · P elements, one for each plane. Saves mean and variance of each block, float64 (N · G,).
    """
    wide = _widened(x).reshape(blocks[0] * blocks[1], blocks[2] * blocks[3])
    mu = wide.mean(axis=1, dtype=np.float64) if centered else np.zeros(len(wide))
    var = np.square(wide - mu[:, None]).mean(axis=1)
    return _block_norm_composed(x, weight, bias, blocks=blocks, eps=eps, centered=centered), mu, var


def batch_norm_with_statistics(
    x: Operand, weight: Operand | None = None, bias: Operand | None = None, *, eps: float = 1e-5, relu: bool = False
) -> tuple[Tensor, Any, Any]:
    """BatchNorm by the batch's statistics, and those: the output, and mean and biased variance as arrays (C,)."""
    _expect_channels(x, weight=weight, bias=bias)
    weight = full(x.shape[1:2], 1, x.dtype, device_of(x)) if weight is None else weight
    bias = full(x.shape[1:2], 0, x.dtype, device_of(x)) if bias is None else bias
    op = OPS["batch_norm_relu_fused" if relu else "batch_norm_fused"]
    y, (mean, var) = run(op, (x, weight, bias), {"eps": eps})
    return y, mean, var


# ---- functions -------------------------------------------------------------------------------------------


def batch_norm(
    x: Operand,
    running_mean: Operand | None = None,
    running_var: Operand | None = None,
    weight: Operand | None = None,
    bias: Operand | None = None,
    training: bool = False,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """Batch normalisation (Ioffe & Szegedy 2015, Algorithm 1) of x (N, C, ...), each channel over all other axes.

    In training, or without running statistics, the batch's own mean and biased variance normalise it; otherwise
    the running ones do. The function is pure: unlike PyTorch's it updates nothing; `nn.BatchNorm1d` does that.

    Args:
        x: (N, C, ...).
        running_mean, running_var, weight, bias: (C,) each, or None.
        training: use the batch's statistics.
        eps: added to the variance.

    Raises:
        ValueError: x has no channels, or a vector has not the shape (C,).
        TypeError: x is not floating-point.

    >>> batch_norm(Tensor([[1.0], [2.0], [3.0]]), training=True)
    Tensor([[-1.2247357],
            [ 0.       ],
            [ 1.2247357]], shape=(3, 1), dtype=float32, leaf)
    """
    _expect_channels(x, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    _expect_eps(eps)
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var go together: give both, or neither")
    if training or running_mean is None:
        return batch_norm_with_statistics(x, weight, bias, eps=eps)[0]
    if weight is None:
        weight = full(x.shape[1:2], 1, x.dtype, device_of(x))
    if bias is None:
        bias = full(x.shape[1:2], 0, x.dtype, device_of(x))
    return batch_norm_inference(x, running_mean, running_var, weight, bias, eps=eps)


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
    """Group normalisation (Wu & He 2018) of x (N, C, ...): each sample over groups of C / num_groups channels."""
    _expect_channels(x)
    if num_groups < 1 or x.shape[1] % num_groups:
        raise ValueError(f"the channels of shape {x.shape} do not divide into {num_groups} groups")
    planes = x.shape[1] // num_groups
    blocks = x.shape[0], num_groups, planes, math.prod(x.shape[2:])
    return _block_norm(x, weight, bias, x.shape[1:2], blocks, eps)


def instance_norm(x: Operand, weight: Operand | None = None, bias: Operand | None = None, eps: float = 1e-5) -> Tensor:
    """Instance normalisation (Ulyanov et al. 2016) of x (N, C, ...): each channel of each sample by itself."""
    _expect_channels(x)
    return group_norm(x, x.shape[1], weight, bias, eps)


def rms_norm(
    x: Operand, normalized_shape: int | tuple[int, ...], weight: Operand | None = None, eps: float | None = None
) -> Tensor:
    """Root-mean-square normalisation (Zhang & Sennrich 2019) over the last axes: no mean, no bias.

    As in PyTorch `eps` is by default the machine epsilon of x's dtype.
    """
    expect_floats(x, "normalisation")
    eps = float(np.finfo(x.dtype).eps) if eps is None else eps
    return _last_axes_norm(x, normalized_shape, weight, None, eps, centered=False)


def _block_norm(
    x: Operand,
    weight: Operand | None,
    bias: Operand | None,
    shape: tuple[int, ...],
    blocks: Blocks,
    eps: float,
    centered: bool = True,
) -> Tensor:
    """Normalise the blocks of x; `shape` is that of weight and bias."""
    expect_floats(x, "normalisation")
    _expect_eps(eps)
    for name, v in (("weight", weight), ("bias", bias)):
        if v is not None and np.shape(values(v)) != shape:
            raise ValueError(f"{name} has shape {np.shape(values(v))}; for x {x.shape} it has to be {shape}")
    weight = full(shape, 1, x.dtype, device_of(x)) if weight is None else weight
    bias = full(shape, 0, x.dtype, device_of(x)) if bias is None else bias
    return block_norm_fused(x, weight, bias, blocks=blocks, eps=eps, centered=centered)


def _last_axes_norm(
    x: Operand, normalized_shape: int | tuple[int, ...], weight: Any, bias: Any, eps: float, centered: bool
) -> Tensor:
    """Normalise each sample of x over its last axes, which have the shape `normalized_shape`, checked."""
    expect_floats(x, "normalisation")
    shape = tuple(int(n) for n in np.atleast_1d(normalized_shape))
    samples = x.shape[: x.ndim - len(shape)]
    if (*samples, *shape) != x.shape:
        raise ValueError(f"the last axes of {x.shape} are not the normalized_shape {shape}")
    blocks = math.prod(samples), 1, math.prod(shape), 1
    return _block_norm(x, weight, bias, shape, blocks, eps, centered)
