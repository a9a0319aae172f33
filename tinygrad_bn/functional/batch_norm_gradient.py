"""The gradients of BatchNorm as ops, so that kernels compute a gradient with a graph too.

Each is a fused op: its composition defines it, and gives its own gradients of every order.
"""

from __future__ import annotations

from tinygrad_bn import sample
from tinygrad_bn.functional.batch_norm import batch_norm_relu, batch_norm_steps, batch_norm_training, per_channel
from tinygrad_bn.functional.statistics import mean
from tinygrad_bn.ops import sum, where
from tinygrad_bn.tensor import Operand, Rule, fused


@fused(
    formula="y = weight / √(σ² + eps) · (g − ḡ − x̂ · mean(g x̂))",
    sample=sample.for_batch_norm_gradient,
)
def batch_norm_gradient(g: Operand, x: Operand, weight: Operand, *, eps: float) -> Operand:
    """The gradient of x in `batch_norm_training`, where g is that of its output: (N, C, ...) both.

    The weight is (C,), or None for 1.
    """
    _expect_shape(g, x)
    steps, axis = batch_norm_steps(x, eps=eps), _all_but_channels(x)
    d = g if weight is None else g * per_channel(weight, x.ndim)
    centred = d - mean(d, axis=axis, keepdims=True)
    through_var = steps.xhat * mean(centred * steps.xhat, axis=axis, keepdims=True)
    return (centred - through_var) * steps.ivar


@fused(formula="y = Σ g x̂", sample=sample.for_batch_norm_weight_gradient)
def batch_norm_weight_gradient(g: Operand, x: Operand, *, eps: float) -> Operand:
    """The gradient (C,) of the weight in `batch_norm_training`, where g is that of its output: (N, C, ...) as x."""
    _expect_shape(g, x)
    return sum(g * batch_norm_steps(x, eps=eps).xhat, axis=_all_but_channels(x))


def _expect_shape(g: Operand, x: Operand) -> None:
    if g.shape != x.shape:
        raise ValueError(f"the gradient of BatchNorm's output has the shape of x, {x.shape}; got {g.shape}")


def _all_but_channels(x: Operand) -> tuple[int, ...]:
    return (0, *range(2, x.ndim))


def _behind_relu(rule: Rule) -> Rule:
    """The rule of an operand of `batch_norm_relu`: the other one's, for what passes the ReLU."""
    return lambda g, y, *operands, **options: rule(where(y <= 0, 0.0, g), y, *operands, **options)


# What a gradient with a graph uses, instead of differentiating the composition step by step.
batch_norm_training.op.rules = (
    lambda g, y, x, weight, bias, *, eps: batch_norm_gradient(g, x, weight, eps=eps),
    lambda g, y, x, weight, bias, *, eps: batch_norm_weight_gradient(g, x, eps=eps),
    lambda g, y, x, weight, bias, *, eps: sum(g, axis=_all_but_channels(x)),
)
batch_norm_relu.op.rules = tuple(map(_behind_relu, batch_norm_training.op.rules))
