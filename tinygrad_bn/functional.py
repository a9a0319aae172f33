"""Compositions: ordinary functions of tensors, whose gradients need no code. Beside each, the op that fuses it.

The primitives of `tinygrad_bn.ops` can be had from here too. Called with arrays, a function gives an array.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from tinygrad_bn import ops
from tinygrad_bn.autograd import OPS, Operand, primitive, run
from tinygrad_bn.random import generator
from tinygrad_bn.sample import REAL, Draw
from tinygrad_bn.tensor import Axis, Tensor

# isort: off
from tinygrad_bn.ops import (
    abs, add, argmax, astype, broadcast_to, clip, div, erf, exp, expm1, log, matmul, max, maximum, min, minimum, mul,
    neg, pad, pow, relu, reshape, rsqrt, sigmoid, sign, softplus, sqrt, sub, sum, tanh, transpose, where,
)  # fmt: skip
# isort: on

__all__ = [
    "Normalization", "abs", "add", "argmax", "astype", "batch_norm", "batch_norm_steps", "batch_norm_with_statistics",
    "binary_cross_entropy_with_logits", "broadcast_to", "clip", "concatenate", "cross_entropy", "div", "dropout", "elu",
    "erf", "exp", "expm1", "flatten", "gelu", "group_norm", "huber_loss", "instance_norm", "l1_loss", "layer_norm",
    "leaky_relu", "linear", "log", "log_softmax", "logsumexp", "matmul", "max", "maximum", "mean", "min", "minimum",
    "mse_loss", "mul", "neg", "nll_loss", "normalization_steps", "pad", "pow", "relu", "reshape", "rms_norm", "rsqrt",
    "sigmoid", "sign", "silu", "softmax", "softplus", "sqrt", "stack", "std", "sub", "sum", "tanh", "transpose", "var",
    "where",
]  # fmt: skip

Reduction: TypeAlias = Literal["mean", "sum", "none"]

# ---- statistics -----------------------------------------------------------------------------------------


def _values(x: Operand) -> Any:
    """The array of a tensor: a constant to every gradient."""
    return x._data if isinstance(x, Tensor) else np.asarray(x)


def _count(x: Operand, axis: Axis) -> int:
    """How many elements of `x` a reduction over `axis` combines."""
    if axis is None:
        return int(x.size)
    return math.prod(x.shape[i] for i in np.atleast_1d(axis))


def mean(x: Operand, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """Arithmetic mean over `axis` (an int, a tuple, or None for all)."""
    if x.dtype == np.float16:  # whose sum may be too large for it
        return astype(mean(astype(x, dtype=np.float32), axis, keepdims), dtype=np.float16)
    return sum(x, axis=axis, keepdims=keepdims) / _count(x, axis)


def var(x: Operand, axis: Axis = None, keepdims: bool = False, correction: float = 0) -> Tensor:
    """Variance over `axis`: Σ(x − mean)² / (n − correction).

    As in NumPy and the array API the default is the biased estimate; PyTorch's default is `correction=1`.
    """
    if x.dtype == np.float16:
        return astype(var(astype(x, dtype=np.float32), axis, keepdims, correction), dtype=np.float16)
    xmu = x - mean(x, axis, keepdims=True)
    return sum(xmu * xmu, axis=axis, keepdims=keepdims) / (_count(x, axis) - correction)


def std(x: Operand, axis: Axis = None, keepdims: bool = False, correction: float = 0) -> Tensor:
    """Square root of `var`. Its gradient is taken as 0 where the variance is 0 (as in PyTorch)."""
    variance = var(x, axis, keepdims, correction)
    positive = variance > 0
    return where(positive, sqrt(where(positive, variance, 1.0)), 0.0)


def logsumexp(x: Operand, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """log Σ eˣ over `axis`, without overflow.

    The largest element, subtracted and added again, is a constant to the gradient; for any constant the formula
    is the same function of x, so derivatives of every order are right.
    """
    largest = _largest(x, axis)
    y = log(sum(exp(x - largest), axis=axis, keepdims=True)) + largest
    return y if keepdims else reshape(y, shape=np.sum(_values(x), axis=axis).shape)


def _largest(x: Operand, axis: Axis) -> Any:
    """The largest element over `axis`, as an array; 0 where that is not finite."""
    largest = np.max(_values(x), axis=axis, keepdims=True, initial=-np.inf)
    return np.where(np.isfinite(largest), largest, 0).astype(x.dtype)


def log_softmax(x: Operand, axis: int = -1) -> Tensor:
    """Logarithm of `softmax`, without overflow or underflow."""
    shifted = x - _largest(x, axis)  # before the logarithm: x − logsumexp(x) would be rounded at the size of x
    return sub(shifted, log(sum(exp(shifted), axis=axis, keepdims=True)))


def softmax(x: Operand, axis: int = -1) -> Tensor:
    """eˣ / Σ eˣ over `axis`."""
    return exp(log_softmax(x, axis))


# ---- shapes ---------------------------------------------------------------------------------------------


def concatenate(tensors: Sequence[Operand], axis: int = 0) -> Tensor:
    """Join tensors along an axis that they have."""
    return ops.concatenate(*tensors, axis=axis)


def stack(tensors: Sequence[Operand], axis: int = 0) -> Tensor:
    """Join tensors of one shape along a new axis."""
    return ops.stack(*tensors, axis=axis)


def flatten(x: Operand, start_axis: int = 1) -> Tensor:
    """Merge the axes from `start_axis` on into one: (N, C, H, W) to (N, C·H·W)."""
    return reshape(x, shape=(*x.shape[:start_axis], math.prod(x.shape[start_axis:])))


# ---- activations ----------------------------------------------------------------------------------------


def leaky_relu(x: Operand, negative_slope: float = 0.01) -> Tensor:
    """x where x > 0, negative_slope · x elsewhere."""
    return where(x > 0, x, x * negative_slope)


def elu(x: Operand, alpha: float = 1.0) -> Tensor:
    """x where x > 0, alpha · (eˣ − 1) elsewhere."""
    positive = x > 0
    return where(positive, x, alpha * expm1(where(positive, 0.0, x)))  # no overflow in the branch not taken


def silu(x: Operand) -> Tensor:
    """x · sigmoid(x), also called swish."""
    return sigmoid(x) * x


def gelu(x: Operand) -> Tensor:
    """x · Φ(x), with the normal distribution function Φ itself (no tanh approximation)."""
    return (erf(x * math.sqrt(0.5)) + 1) * x * 0.5


# ---- layers' functions ----------------------------------------------------------------------------------


def linear(x: Operand, weight: Operand, bias: Operand | None = None) -> Tensor:
    """x Wᵀ + b: x (..., in), weight (out, in), bias (out,) or None; gives (..., out)."""
    return matmul(x, transpose(weight)) if bias is None else ops.linear(x, weight, bias)


def dropout(x: Operand, p: float = 0.5, training: bool = True, rng: np.random.Generator | None = None) -> Operand:
    """In training, zero each element with probability `p` and scale the others by 1 / (1 − p).

    Draws from `rng`, or else from the package's generator (see `manual_seed`).

    Raises:
        ValueError: `p` is not in [0, 1].
    """
    if not 0 <= p <= 1:
        raise ValueError(f"dropout probability has to be in [0, 1]; got {p}")
    if not training or p == 0:
        return x
    kept = (rng or generator()).random(x.shape, dtype=np.float32) >= p
    return x * kept.astype(x.dtype) * (1 / (1 - p) if p < 1 else 0.0)


# ---- normalisation --------------------------------------------------------------------------------------


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


def _expect_floats(x: Operand) -> None:
    if x.dtype.kind != "f":
        raise TypeError(f"normalisation takes floating-point input; got {x.dtype}")


def _widened(x: Operand) -> Operand:
    """`x` in the precision that its statistics are computed in."""
    _expect_floats(x)
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
    mu = mean(wide, axis, keepdims=True)
    # What rounding left of the mean. It is 0 in exact arithmetic, so a constant to derivatives of every order.
    mu = mu + _values(mean(_values(wide) - _values(mu), axis, keepdims=True))
    xmu = wide - mu
    sq = xmu * xmu
    var = mean(sq, axis, keepdims=True)
    sqrtvar = sqrt(var + eps)
    ivar = 1 / sqrtvar
    xhat = xmu * ivar
    gammax = xhat if weight is None else xhat * weight
    out = astype(gammax if bias is None else gammax + bias, dtype=x.dtype)
    return Normalization(mu, xmu, sq, var, sqrtvar, ivar, xhat, gammax, out)


def _sample_batch_norm(d: Draw) -> Any:
    shape = d.shape(min_dims=2, max_dims=4, min_side=1, max_side=3)
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
    return relu(batch_norm_steps(x, weight, bias, eps=eps).out)


def _sample_batch_norm_relu(d: Draw) -> Any:
    """Operands whose outputs keep a distance from the kink."""
    n, c = d.integer(3, 4), d.integer(1, 3)
    x = np.stack([d.distinct((n,)) * 10 for _ in range(c)], axis=1)
    xhat = (x - x.mean(0)) / np.sqrt(x.var(0) + 0.3)
    between = np.sort(xhat, axis=0)[:2].mean(0)  # the output is 0 half-way between two samples
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
    return relu(y), *saved


def batch_norm_with_statistics(
    x: Operand, weight: Operand | None = None, bias: Operand | None = None, *, eps: float = 1e-5, relu: bool = False
) -> tuple[Tensor, Any, Any]:
    """BatchNorm by the batch's statistics, and those: the output, and mean and biased variance as arrays (C,)."""
    _expect_floats(x)
    if x.ndim < 2:
        raise ValueError(f"batch_norm needs an x of shape (N, C, ...); got {x.shape}")
    weight = np.ones(x.shape[1], x.dtype) if weight is None else weight
    bias = np.zeros(x.shape[1], x.dtype) if bias is None else bias
    op = OPS["batch_norm_relu_fused" if relu else "batch_norm_fused"]
    y, (mean, var) = run(op, (x, weight, bias), {"eps": eps})
    return y, mean, var


def per_channel(v: Operand, ndim: int) -> Operand:
    """A vector (C,) in the shape that broadcasts along axis 1 of `ndim` axes: (C, 1, 1) for (N, C, H, W)."""
    return v if v is None or ndim <= 2 else reshape(v, shape=(-1, *(1,) * (ndim - 2)))


def batch_norm_steps(
    x: Operand, weight: Operand | None = None, bias: Operand | None = None, *, eps: float = 1e-5
) -> Normalization:
    """BatchNorm with the batch's statistics, every step by name: x (N, C, ...), weight and bias (C,)."""
    if x.ndim < 2:
        raise ValueError(f"batch_norm needs an x of shape (N, C, ...); got {x.shape}")
    axis = (0, *range(2, x.ndim))
    return normalization_steps(x, per_channel(weight, x.ndim), per_channel(bias, x.ndim), axis=axis, eps=eps)


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

    >>> batch_norm(Tensor([[1.0], [2.0], [3.0]]), training=True)
    Tensor([[-1.2247357],
            [ 0.       ],
            [ 1.2247357]], shape=(3, 1), dtype=float32, leaf)
    """
    _expect_floats(x)
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var go together: give both, or neither")
    if training or running_mean is None:
        return batch_norm_with_statistics(x, weight, bias, eps=eps)[0]
    mu, variance = per_channel(running_mean, x.ndim), per_channel(running_var, x.ndim)
    weight, bias = per_channel(weight, x.ndim), per_channel(bias, x.ndim)
    # (x − mu) first: x · a + b would lose as many digits as the mean is larger than the deviation.
    y = (x - mu) * rsqrt(variance + eps)
    y = y if weight is None else y * weight
    return astype(y if bias is None else y + bias, dtype=x.dtype)


def layer_norm(
    x: Operand,
    normalized_shape: int | tuple[int, ...],
    weight: Operand | None = None,
    bias: Operand | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Layer normalisation (Ba et al. 2016): over the last axes, which have the shape `normalized_shape`."""
    axis = _last_axes(x, normalized_shape)
    return normalization_steps(x, weight, bias, axis=axis, eps=eps).out


def group_norm(
    x: Operand, num_groups: int, weight: Operand | None = None, bias: Operand | None = None, eps: float = 1e-5
) -> Tensor:
    """Group normalisation (Wu & He 2018) of x (N, C, ...): each sample over groups of C / num_groups channels."""
    if num_groups < 1 or x.ndim < 2 or x.shape[1] % num_groups:
        raise ValueError(f"the channels of shape {x.shape} do not divide into {num_groups} groups")
    grouped = reshape(x, shape=(x.shape[0], num_groups, math.prod(x.shape[1:]) // num_groups))
    y = reshape(normalization_steps(grouped, axis=2, eps=eps).xhat, shape=x.shape)
    y = y if weight is None else y * per_channel(weight, x.ndim)
    return astype(y if bias is None else y + per_channel(bias, x.ndim), dtype=x.dtype)


def instance_norm(x: Operand, weight: Operand | None = None, bias: Operand | None = None, eps: float = 1e-5) -> Tensor:
    """Instance normalisation (Ulyanov et al. 2016) of x (N, C, ...): each channel of each sample by itself."""
    return group_norm(x, x.shape[1], weight, bias, eps)


def rms_norm(
    x: Operand, normalized_shape: int | tuple[int, ...], weight: Operand | None = None, eps: float | None = None
) -> Tensor:
    """Root-mean-square normalisation (Zhang & Sennrich 2019) over the last axes: no mean, no bias.

    As in PyTorch `eps` is by default the machine epsilon of x's dtype.
    """
    eps = float(np.finfo(x.dtype).eps) if eps is None else eps
    axis = _last_axes(x, normalized_shape)
    wide = _widened(x)
    y = wide * rsqrt(mean(wide * wide, axis, keepdims=True) + eps)
    return astype(y if weight is None else y * weight, dtype=x.dtype)


def _last_axes(x: Operand, normalized_shape: int | tuple[int, ...]) -> tuple[int, ...]:
    """The axes of x that have the shape `normalized_shape`, checked."""
    wanted = tuple(int(n) for n in np.atleast_1d(normalized_shape))
    if wanted != x.shape[x.ndim - len(wanted) :]:
        raise ValueError(f"the last axes of {x.shape} are not the normalized_shape {wanted}")
    return tuple(range(x.ndim - len(wanted), x.ndim))


# ---- losses ---------------------------------------------------------------------------------------------


def _reduced(loss: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return loss
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is one of 'mean', 'sum' and 'none'; got {reduction!r}")
    return mean(loss) if reduction == "mean" else sum(loss)


def _difference(x: Operand, target: Operand) -> Operand:
    if x.shape != np.shape(_values(target)):
        raise ValueError(f"prediction and target differ in shape: {x.shape} and {np.shape(_values(target))}")
    return x - target


def mse_loss(x: Operand, target: Operand, reduction: Reduction = "mean") -> Tensor:
    """Squared error (x − target)². Raises ValueError where the shapes differ."""
    difference = _difference(x, target)
    return _reduced(difference * difference, reduction)


def l1_loss(x: Operand, target: Operand, reduction: Reduction = "mean") -> Tensor:
    """Absolute error |x − target|. Raises ValueError where the shapes differ."""
    return _reduced(abs(_difference(x, target)), reduction)


def huber_loss(x: Operand, target: Operand, delta: float = 1.0, reduction: Reduction = "mean") -> Tensor:
    """½ d² where |d| ≤ delta, delta · (|d| − ½ delta) elsewhere, with d = x − target (Huber 1964)."""
    if not delta > 0:
        raise ValueError(f"delta has to be greater than 0; got {delta}")
    distance = abs(_difference(x, target))
    inner = clip(distance, max=delta)
    return _reduced(inner * (distance - 0.5 * inner), reduction)


def binary_cross_entropy_with_logits(
    x: Operand,
    target: Operand,
    weight: Operand | None = None,
    pos_weight: Operand | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """−(p · t · log σ(x) + (1 − t) · log σ(−x)), for targets in [0, 1] of x's shape, without overflow.

    `weight` scales each element's loss and `pos_weight` (p above) the positive part; both broadcast with x.
    """
    _difference(x, target)  # for its check of the shapes
    positive = softplus(-x) * target if pos_weight is None else softplus(-x) * target * pos_weight
    loss = positive + softplus(x) * (1 - target)
    return _reduced(loss if weight is None else loss * weight, reduction)


def _as_rows(x: Operand, target: Operand, ignore_index: int) -> tuple[Operand, Any, Any]:
    """Class scores (N, C, ...) as rows (M, C), targets as (M,), and which rows count; checked."""
    classes = np.asarray(_values(target))
    if x.dtype.kind != "f":
        raise TypeError(f"scores have to be floating-point; got {x.dtype}")
    if x.ndim < 2 or classes.shape != (x.shape[0], *x.shape[2:]):
        raise ValueError(f"scores have shape (N, C, ...) and targets (N, ...); got {x.shape} and {classes.shape}")
    if classes.dtype.kind not in "iu":
        raise TypeError(f"targets are class indices, of an integer dtype; got {classes.dtype}")
    counts = classes != ignore_index
    wrong = classes[counts & ((classes < 0) | (classes >= x.shape[1]))]
    if wrong.size:
        raise ValueError(f"target {wrong[0]} is not one of the {x.shape[1]} classes 0 to {x.shape[1] - 1}")
    if x.ndim > 2:
        x = reshape(transpose(x, axes=(0, *range(2, x.ndim), 1)), shape=(-1, x.shape[1]))
    return x, np.where(counts, classes, 0).astype(np.int64).reshape(-1), counts.reshape(-1)


def _weighted(loss: Tensor, classes: Any, counts: Any, weight: Any, reduction: Reduction, shape: Any) -> Tensor:
    loss = where(counts, loss, 0.0)
    if reduction == "mean":
        wide = astype(loss, dtype=np.result_type(loss.dtype, np.float32))
        return astype(sum(wide) / np.sum(weight[classes], where=counts, dtype=np.float64), dtype=loss.dtype)
    return _reduced(reshape(loss, shape=shape) if reduction == "none" else loss, reduction)


def _class_weight(weight: Operand | None, x: Operand) -> Any:
    if weight is None:
        return np.ones(x.shape[1], x.dtype)
    if isinstance(weight, Tensor) and weight.requires_grad:
        raise ValueError("class weights are constants here; pass weight.detach()")
    if _values(weight).shape != (x.shape[1],):
        raise ValueError(f"weight has shape {_values(weight).shape}, for {x.shape[1]} classes")
    return _values(weight).astype(x.dtype)


def nll_loss(
    x: Operand,
    target: Operand,
    weight: Operand | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    """Negative log-likelihood: x (N, C, ...) are log-probabilities, target (N, ...) class indices.

    Arguments and errors are those of `cross_entropy`.
    """
    rows, classes, counts = _as_rows(x, target, ignore_index)
    weight = _class_weight(weight, x)
    loss = mul(rows[np.arange(len(classes)), classes], -weight[classes])
    return _weighted(loss, classes, counts, weight, reduction, _values(target).shape)


def softmax_cross_entropy_composed(x: Operand, target: Operand, weight: Operand, *, smoothing: float) -> Tensor:
    """−Σ_c q_c · weight_c · log softmax(x)_c, where q is 1 − smoothing at the target plus smoothing / C everywhere."""
    log_p = log_softmax(x, axis=1) * weight
    at_target = log_p[np.arange(x.shape[0]), _values(target)]
    if smoothing == 0:  # not a shortcut: 0 · log p would be NaN for a class that is masked by −inf
        return -at_target
    return -(1 - smoothing) * at_target - smoothing * mean(log_p, axis=1)


def _sample_cross_entropy(d: Draw) -> Any:
    n, c = d.integer(0, 4), d.integer(1, 4)
    operands = (d.array(REAL, (n, c)), d.integers(0, c - 1, (n,)), np.linspace(0.5, 1.5, c))
    return operands, {"smoothing": d.choice([0.0, 0.3])}


@primitive(
    fuses=softmax_cross_entropy_composed,
    formula="yᵢ = −Σ_c q_ic · w_c · log softmax(xᵢ)_c;  ∂x_ic = g_i · (softmax(xᵢ)_c · Σ_k q_ik w_k − q_ic w_c)",
    sample=_sample_cross_entropy,
)
def softmax_cross_entropy(x: Operand, target: Operand, weight: Operand, *, smoothing: float) -> Operand:
    """The loss of each row: x (M, C) logits, target (M,) class indices, weight (C,) of the classes; gives (M,)."""
    return softmax_cross_entropy_composed(x, target, weight, smoothing=smoothing)


def cross_entropy(
    x: Operand,
    target: Operand,
    weight: Operand | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Softmax cross-entropy from logits.

    Args:
        x: logits (N, C, ...).
        target: class indices (N, ...), of an integer dtype.
        weight: weight of each class (C,); 'mean' divides by the sum of the targets' weights.
        ignore_index: targets of this value do not count.
        reduction: 'mean', 'sum', or 'none' for (N, ...).
        label_smoothing: in [0, 1]: how much of the target's probability is spread over all classes.

    Raises:
        ValueError: shapes that do not fit, or a target that is not a class.
        TypeError: targets that are not integers.

    >>> cross_entropy(Tensor([[0.0, 0.0]]), np.array([1])).item()  # log 2
    0.6931471824645996
    """
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is in [0, 1]; got {label_smoothing}")
    rows, classes, counts = _as_rows(x, target, ignore_index)
    weight = _class_weight(weight, x)
    loss = softmax_cross_entropy(rows, classes, weight, smoothing=label_smoothing)
    return _weighted(loss, classes, counts, weight, reduction, _values(target).shape)
