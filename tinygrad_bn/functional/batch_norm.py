"""BatchNorm from primitive operations, in nine named steps, and the ops that run them in one pass over memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from tinygrad_bn import sample
from tinygrad_bn.arguments import all_or_none, expect_channels, expect_eps, expect_flags, expect_several, expect_vectors
from tinygrad_bn.functional.statistics import mean
from tinygrad_bn.ops import astype, relu, reshape, rsqrt, sqrt
from tinygrad_bn.tensor import Operand, Tensor, fused, primitive, widened


class Normalization(NamedTuple):
    """Every step of a normalisation, by its customary name (Ioffe & Szegedy 2015, Algorithm 1; Kratzert 2016)."""

    mu: Tensor  #      mean of each channel
    xmu: Tensor  #     x − mu
    sq: Tensor  #      xmu²
    var: Tensor  #     mean of sq: the biased variance
    sqrtvar: Tensor  # √(var + eps)
    ivar: Tensor  #    1 / sqrtvar
    xhat: Tensor  #    xmu · ivar: mean 0, variance var / (var + eps)
    gammax: Tensor  #  weight · xhat
    out: Tensor  #     gammax + bias, in x's dtype


def batch_norm_steps(
    x: Operand, weight: Operand | None = None, bias: Operand | None = None, *, eps: float = 1e-5
) -> Normalization:
    """Normalise each channel of x by the mean and biased variance of the batch, step by step.

    This is the definition of BatchNorm; the kernels are tested against it. So that the statistics are accurate at any
    mean, all steps but `out` are in float64, whatever x is. A layer that goes on from them takes `out`, in x's dtype:
    without weight and bias it is `xhat`, rounded once. Any other step is cast: `steps.xmu.astype(x.dtype)`.

    Args:
        x: (N, C, ...), floating-point, with more than one value per channel.
        weight, bias: (C,) each; None for 1 and 0.
        eps: added to the variance.
    """
    expect_channels(x, weight=weight, bias=bias)
    expect_eps(eps)
    expect_several(x, x.shape[1], "channel")
    wide, axis = widened(x), (0, *range(2, x.ndim))
    mu = mean(wide, axis=axis, keepdims=True)
    mu = mu + mean(wide - mu, axis=axis, keepdims=True)  # the mean's rounding error, 0 in exact arithmetic
    xmu = wide - mu
    sq = xmu * xmu
    var = mean(sq, axis=axis, keepdims=True)
    sqrtvar = sqrt(var + eps)
    ivar = 1 / sqrtvar
    xhat = xmu * ivar
    gammax = xhat if weight is None else xhat * per_channel(weight, x.ndim)
    out = gammax if bias is None else gammax + per_channel(bias, x.ndim)
    return Normalization(mu, xmu, sq, var, sqrtvar, ivar, xhat, gammax, astype(out, dtype=x.dtype))


def per_channel(v: Operand, ndim: int) -> Operand:
    """A vector (C,) in the shape that broadcasts along axis 1 of `ndim` axes: (C, 1, 1) for (N, C, H, W)."""
    return v if v is None or ndim <= 2 else reshape(v, shape=(-1, *(1,) * (ndim - 2)))


# ---- ops that run all steps at once ---------------------------------------------------------------------


@fused(
    saves=("mean", "var"),
    formula="y = (x − μ) / √(σ² + eps) · weight + bias;  ∂x = weight / √(σ² + eps) · (g − ḡ − x̂ · mean(g x̂))",
    sample=sample.for_batch_norm,
    widens=False,  # the steps do
)
def batch_norm_training(x: Operand, weight: Operand, bias: Operand, *, eps: float) -> Any:
    """BatchNorm of x (N, C, ...) by the statistics of the batch.

    By-products: its mean and biased variance, float64 (C,).
    """
    steps = batch_norm_steps(x, weight, bias, eps=eps)
    return steps.out, reshape(steps.mu, shape=-1), reshape(steps.var, shape=-1)


@fused(
    saves=("mean", "var"),
    formula="y = max((x − μ) / √(σ² + eps) · weight + bias, 0)",
    sample=sample.for_batch_norm_relu,
    widens=False,
)
def batch_norm_relu(x: Operand, weight: Operand, bias: Operand, *, eps: float) -> Any:
    """`batch_norm_training` and the ReLU after it, without an array between them."""
    steps = batch_norm_steps(x, weight, bias, eps=eps)
    return relu(steps.out), reshape(steps.mu, shape=-1), reshape(steps.var, shape=-1)


@fused(formula="y = (x − mean) / √(var + eps) · weight + bias", sample=sample.for_batch_norm_inference)
def batch_norm_inference(
    x: Operand, mean: Operand, var: Operand, weight: Operand, bias: Operand, *, eps: float
) -> Operand:
    """BatchNorm of x (N, C, ...) by a given mean and variance, (C,) each."""
    expect_vectors(x, mean=mean, var=var, weight=weight, bias=bias)
    expect_eps(eps)
    mean, var, weight, bias = (per_channel(v, x.ndim) for v in (mean, var, weight, bias))
    # (x − mean) first: x · a + b would lose as many digits as the mean is larger than the deviation.
    xmu, ivar = x - mean, rsqrt(var + eps)
    xhat = xmu * ivar
    gammax = xhat if weight is None else xhat * weight
    return gammax if bias is None else gammax + bias


@primitive(
    *[None] * 5,
    saves=("new_var", "new_tracked", "finite"),
    formula="y = (1 − momentum) · running_mean + momentum · mean;  likewise the variance, of var · unbias",
    sample=sample.for_running_statistics,
)
def running_statistics(
    running_mean: Operand, running_var: Operand, tracked: Operand, mean: Operand, var: Operand, *, momentum: float,
    unbias: float,
) -> Any:  # fmt: skip
    """The new running mean (C,). By-products: the new variance, `tracked` + 1, and whether all numbers are finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        new_mean = ((1 - momentum) * running_mean + momentum * mean).astype(running_mean.dtype)
        new_var = ((1 - momentum) * running_var + momentum * (var * unbias)).astype(running_var.dtype)
    return new_mean, new_var, np.asarray(tracked + 1), bool(np.isfinite(new_mean).all() and np.isfinite(new_var).all())


# ---- the function ---------------------------------------------------------------------------------------


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
        ValueError: x has no channels, or one value per channel to take statistics of; a vector does not have the
            shape (C,); or eps is negative.
        TypeError: x is not floating-point, or eps is not a number.

    >>> batch_norm(Tensor([[1.0], [2.0], [3.0]]), training=True)
    Tensor([[-1.2247357],
            [ 0.       ],
            [ 1.2247357]], shape=(3, 1), dtype=float32, leaf)
    """
    expect_flags(training=training)
    expect_channels(x, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    expect_eps(eps)
    all_or_none("running_mean and running_var", running_mean, running_var)
    if training or running_mean is None:
        return batch_norm_training(x, weight, bias, eps=eps)
    return batch_norm_inference(x, running_mean, running_var, weight, bias, eps=eps)
