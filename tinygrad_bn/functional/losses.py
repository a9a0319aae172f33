"""Losses, with PyTorch's names and options, and softmax cross-entropy as one fused op."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np

from tinygrad_bn.autograd import Operand, primitive
from tinygrad_bn.functional.basics import log_softmax, mean, values
from tinygrad_bn.ops import abs, astype, clip, mul, reshape, softplus, sum, transpose, where
from tinygrad_bn.sample import REAL, Draw
from tinygrad_bn.tensor import Tensor

Reduction: TypeAlias = Literal["mean", "sum", "none"]


def _reduced(loss: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return loss
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is one of 'mean', 'sum' and 'none'; got {reduction!r}")
    return mean(loss) if reduction == "mean" else sum(loss)


def _difference(x: Operand, target: Operand) -> Operand:
    if x.shape != np.shape(values(target)):
        raise ValueError(f"prediction and target differ in shape: {x.shape} and {np.shape(values(target))}")
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
    classes = np.asarray(values(target))
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
    if values(weight).shape != (x.shape[1],):
        raise ValueError(f"weight has shape {values(weight).shape}, for {x.shape[1]} classes")
    return values(weight).astype(x.dtype)


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
    return _weighted(loss, classes, counts, weight, reduction, values(target).shape)


def softmax_cross_entropy_composed(x: Operand, target: Operand, weight: Operand, *, smoothing: float) -> Tensor:
    """−Σ_c q_c · weight_c · log softmax(x)_c, where q is 1 − smoothing at the target plus smoothing / C everywhere."""
    log_p = log_softmax(x, axis=1) * weight
    at_target = log_p[np.arange(x.shape[0]), values(target)]
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
    return _weighted(loss, classes, counts, weight, reduction, values(target).shape)
