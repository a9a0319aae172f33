"""Losses, with PyTorch's names and options, and softmax cross-entropy as one fused op."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np

from tinygrad_bn.arguments import (
    at_least_single,
    expect_array,
    expect_floats,
    expect_int64,
    expect_number,
    expect_reduction,
    holds_numbers,
    is_floating,
    python_scalar,
    shown,
)
from tinygrad_bn.backend import device_of
from tinygrad_bn.functional.basics import largest, log_of_sum
from tinygrad_bn.functional.reductions import note
from tinygrad_bn.functional.statistics import mean, values
from tinygrad_bn.keywords import named
from tinygrad_bn.more_ops import abs, clip, concatenate, getitem, softplus
from tinygrad_bn.ops import astype, reshape, sum, transpose, where
from tinygrad_bn.sample import REAL, Draw, Drawn
from tinygrad_bn.tensor import Operand, Tensor, fused, widened

Reduction: TypeAlias = Literal["mean", "sum", "none"]


def _reduced(loss: Tensor, reduction: Reduction, dtype: Any) -> Tensor:
    expect_reduction("reduction", reduction)
    reduced = mean(loss) if reduction == "mean" else sum(loss) if reduction == "sum" else loss
    reduced = reduced if reduced.dtype == dtype else astype(reduced, dtype=dtype)
    note(reduced, reduction, loss.size, None, float, loss.size)
    return reduced


def _target(target: Operand) -> Any:
    """The target as an array. Raises TypeError unless it is a tensor, an array or a list of real numbers."""
    if not holds_numbers(target):
        raise TypeError(f"the target of a loss is a tensor, an array or a list; got a {type(target).__name__}")
    expect_array(array := values(target), "the target of a loss")
    return array


def _working(name: str, x: Operand, target: Operand, *weights: Operand) -> tuple[list[Any], Any]:
    """The operands of a loss in the dtype to compute in, and the dtype of the loss.

    That is the widest floating-point dtype of all operands; half precision is computed in float32.
    Raises ValueError where the shapes of x and target differ.
    """
    expect_floats(x, "a loss")
    if x.shape != (shape := _target(target).shape):
        raise ValueError(
            f"{name}: x and target have to be of one shape; got {x.shape} and {shape}: reshape one of them"
        )
    dtype = x.dtype
    if dtype.char in "fd" and not [o for o in (target, *weights) if o is not None and getattr(o, "dtype", 0) != dtype]:
        return [x, target, *weights], dtype  # the usual case
    operands = [Tensor(o) if isinstance(o, list | tuple) else o for o in (x, target, *map(python_scalar, weights))]
    dtype = np.result_type(*(o.dtype for o in operands if is_floating(o)))
    wide = at_least_single(dtype)
    return [astype(o, dtype=wide) if hasattr(o, "shape") and o.dtype != wide else o for o in operands], dtype


def mse_loss(x: Operand, target: Operand, reduction: Reduction = "mean") -> Tensor:
    """Squared error (x − target)². Raises ValueError where the shapes differ."""
    (x, target), dtype = _working("mse_loss", x, target)
    difference = x - target
    return _reduced(difference * difference, reduction, dtype)


def l1_loss(x: Operand, target: Operand, reduction: Reduction = "mean") -> Tensor:
    """Absolute error |x − target|. Raises ValueError where the shapes differ."""
    (x, target), dtype = _working("l1_loss", x, target)
    return _reduced(abs(x - target), reduction, dtype)


def huber_loss(x: Operand, target: Operand, delta: float = 1.0, reduction: Reduction = "mean") -> Tensor:
    """½ d² where |d| ≤ delta, delta · (|d| − ½ delta) elsewhere, with d = x − target (Huber 1964)."""
    delta = expect_number("delta", delta, finite=False)
    if not delta > 0:
        raise ValueError(f"delta has to be greater than 0; got {shown(delta)}")
    (x, target), dtype = _working("huber_loss", x, target)
    d = x - target
    inner = clip(d, min=-delta, max=delta)  # of d, not of |d|, which has a kink at 0
    return _reduced(inner * (d - inner * 0.5), reduction, dtype)


def _expect_scale(name: str, scale: Operand) -> None:
    """Raise TypeError unless it is a number, or a tensor or an array of real numbers."""
    if not isinstance(scale, int | float):
        expect_array(scale, f"the {name} of a loss")
    elif not isinstance(scale, bool):
        expect_number(name, scale, finite=False)


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
    for name, scale in (("weight", weight), ("pos_weight", pos_weight)):
        if scale is not None:
            _expect_scale(name, scale)
    (x, target, weight, pos_weight), dtype = _working("binary_cross_entropy_with_logits", x, target, weight, pos_weight)
    positive = softplus(-x) * target if pos_weight is None else softplus(-x) * target * pos_weight
    loss = positive + softplus(x) * (1 - target)
    return _reduced(loss if weight is None else loss * weight, reduction, dtype)


def _classes(name: str, x: Operand, target: Operand, ignore_index: int) -> Any:
    """The targets (N, ...) for class scores x (N, C, ...), checked as to shapes and dtypes."""
    expect_int64("ignore_index", ignore_index)
    expect_floats(x, "cross-entropy")
    classes = _target(target)
    if x.ndim < 2 or classes.shape != (x.shape[0], *x.shape[2:]):
        one_hot = ": give class indices, as by target.argmax(1)" if x.shape == classes.shape and x.ndim > 1 else ""
        raise ValueError(
            f"{name}: scores have shape (N, C, ...) and targets (N, ...); got {x.shape} and {classes.shape}{one_hot}"
        )
    _expect_classes(classes)
    return classes


def _expect_classes(target: Any) -> None:
    """Raise TypeError unless the targets are integers."""
    if target.dtype.kind not in "iu":
        raise TypeError(f"targets are class indices, of an integer dtype; got {target.dtype}: convert them by astype")


def _as_rows(x: Operand) -> Operand:
    """(N, C, ...) as rows (M, C)."""
    if x.ndim == 2:
        return x
    return reshape(transpose(x, axes=(0, *range(2, x.ndim), 1)), shape=(-1, x.shape[1]))


def _class_weight(weight: Operand | None, x: Operand) -> Any:
    if weight is None:
        return None
    if isinstance(weight, Tensor) and weight.requires_grad:
        raise ValueError("class weights are constants here; pass weight.detach()")
    expect_array(weight, "the weight of a loss")
    if values(weight).shape != (x.shape[1],):
        raise ValueError(
            f"weight has to be one number for each of {x.shape[1]} classes; got shape {values(weight).shape}"
        )
    return values(weight)


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
    classes, weight = _classes("nll_loss", x, target, ignore_index), _class_weight(weight, x)
    loss, total = _picked(_as_rows(x), classes.reshape(-1), weight, ignore_index, reduction)
    loss = astype(loss, dtype=x.dtype)
    note(loss, reduction, classes.size, ignore_index, float, total)
    return reshape(loss, shape=classes.shape) if reduction == "none" else loss


def _picked(
    log_p: Operand, target: Any, weight: Operand, ignore_index: int, reduction: str, smoothing: float = 0.0
) -> tuple[Any, Any]:
    """−Σ_c q_c · weight_c · log_p_c of each row, reduced, where q is 1 − smoothing at the target plus smoothing / C.

    In float64. The second result is the sum of the targets' weights, by which a mean is divided. Rows whose target is
    `ignore_index` count 0 in both.
    """
    expect_reduction("reduction", reduction)
    counts = target != ignore_index
    classes = where(counts, target, 0)
    if device_of(classes) == "cpu":  # on another device a look would wait for it: there a wrong class gives NaN
        wrong = classes[(classes < 0) | (classes >= log_p.shape[1])]
        if wrong.size:
            raise ValueError(f"target {wrong[0]} is not one of the {log_p.shape[1]} classes 0 to {log_p.shape[1] - 1}")
    loss = -widened(log_p[np.arange(len(classes)), classes])
    if weight is not None:
        loss = loss * widened(getitem(weight, index=classes))
    if smoothing > 0:  # not only a shortcut: 0 · log p is NaN for a class that is masked by −inf
        spread = mean(widened(log_p if weight is None else log_p * weight), axis=1)
        loss = loss * (1 - smoothing) - spread * smoothing
    loss, total = where(counts, loss, 0.0), _total(target, weight, ignore_index)
    if reduction == "none":
        return loss, total
    return (sum(loss) / total if reduction == "mean" else sum(loss)), total


def _total(target: Any, weight: Operand, ignore_index: int) -> Any:
    """The sum of the targets' weights, of those that count."""
    counts = target != ignore_index
    if weight is None:
        return sum(counts.astype(np.float64)) if device_of(counts) != "cpu" else np.float64(np.count_nonzero(counts))
    return sum(where(counts, widened(getitem(weight, index=where(counts, target, 0))), 0.0))


def _sample_cross_entropy(d: Draw) -> Drawn:
    n, c = d.integer(1, 4), d.integer(1, 4)
    target = d.integers(0, c - 1, (n,))
    target[0] = d.choice([target[0], -100])
    some = (target != -100).any()
    options = {"smoothing": d.choice([0.0, 0.3]), "ignore_index": -100}
    weight = d.choice([np.linspace(0.5, 1.5, c), None])
    reduction = d.choice(["mean", "sum", "none"] if some else ["sum", "none"])
    return (d.array(REAL, (n, c)), target, weight), {**options, "reduction": reduction}


@fused(
    saves=("normalizer", "total"),
    formula="yᵢ = −Σ_c q_ic · w_c · log softmax(xᵢ)_c;  ∂x_ic = g_i · (softmax(xᵢ)_c · Σ_k q_ik w_k − q_ic w_c)",
    sample=_sample_cross_entropy,
)
def softmax_cross_entropy(
    x: Operand,
    target: Operand,
    weight: Operand,
    *,
    smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Any:
    """x (M, C) logits, target (M,) class indices, weight (C,) of the classes or None: the loss, (M,) if not reduced.

    By-products: the two numbers that softmax subtracts from each row, its largest logit and the log of its sum, (M, 2);
    and the sum of the targets' weights.
    """
    target = values(target)
    _expect_classes(target)
    if x.ndim != 2 or target.shape != x.shape[:1]:
        raise ValueError(f"logits are (M, C) and targets (M,); got {x.shape} and {target.shape}")
    if weight is not None and weight.shape != x.shape[1:]:
        raise ValueError(f"weight has shape {weight.shape}, for {x.shape[1]} classes")
    counts = reshape(target != ignore_index, shape=(-1, 1))  # the logits of other rows may be NaN: 0 · NaN is not 0
    x = where(counts, x, 0.0)
    top = largest(x, 1)
    shifted = x - top  # before the logarithm: x − logsumexp(x) would be rounded at the size of x
    log_sum = log_of_sum(shifted, 1)
    loss, total = _picked(shifted - log_sum, target, weight, ignore_index, reduction, smoothing)
    return loss, concatenate(top, log_sum, axis=1), total


@named
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
        weight: weight of each class (C,), which leaves the dtype of the loss that of x; 'mean' divides by the sum of
            the targets' weights.
        ignore_index: targets of this value do not count.
        reduction: 'mean', 'sum', or 'none' for (N, ...).
        label_smoothing: in [0, 1]: how much of the target's probability is spread over all classes.

    Raises:
        ValueError: shapes that do not fit, or a target that is not a class (on cuda its loss is NaN instead).
        TypeError: targets that are not integers.

    >>> cross_entropy(Tensor([[0.0, 0.0]]), np.array([1])).item()  # log 2
    0.6931471824645996
    """
    label_smoothing = expect_number("label_smoothing", label_smoothing, 0, 1)
    classes = _classes("cross_entropy", x, target, ignore_index)
    weight = _class_weight(weight, x)
    loss = softmax_cross_entropy(
        _as_rows(x),
        classes.reshape(-1),
        weight,
        smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=reduction,
    )
    note(loss, reduction, classes.size, ignore_index, _total, classes, weight, ignore_index)
    return reshape(loss, shape=classes.shape) if reduction == "none" and classes.ndim > 1 else loss
