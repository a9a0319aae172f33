"""Softmax and logsumexp, joining and flattening, activations, dropout."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tinygrad_bn import backend, more_ops, random
from tinygrad_bn.arguments import (
    expect_array,
    expect_axis,
    expect_flags,
    expect_floats,
    expect_integer,
    expect_number,
    full_name,
    is_array,
    shown,
)
from tinygrad_bn.functional.half import rounded_once
from tinygrad_bn.functional.statistics import values
from tinygrad_bn.keywords import named
from tinygrad_bn.more_ops import erfc, expm1, log1p, max, sigmoid
from tinygrad_bn.ops import exp, mul, reshape, sub, sum, where
from tinygrad_bn.random import philox
from tinygrad_bn.sample import REAL, elementwise, reducing
from tinygrad_bn.tensor import Axis, Operand, Tensor, fused, primitive

# ---- softmax --------------------------------------------------------------------------------------------


def largest(x: Operand, axis: Axis) -> Any:
    """The largest element over `axis`, as an array that broadcasts with x; 0 where that is not finite."""
    if not x.size:
        return backend.full(sum(values(x), axis=axis, keepdims=True), 0)
    top = max(values(x), axis=axis, keepdims=True)
    with np.errstate(invalid="ignore"):  # inf − inf
        return where(top - top == 0, top, 0.0)


def log_of_sum(shifted: Operand, axis: Axis) -> Any:
    """log Σ eˣ over `axis`, which is kept, of x whose largest element is 0: with all digits where that is near 0."""
    top = shifted == 0
    others = sum(where(top, expm1(shifted), exp(shifted)), axis=axis, keepdims=True)  # expm1 is 0, with exp's slope
    return log1p(others + (sum(top, axis=axis, keepdims=True) - 1))


@fused(formula="y = log Σ eˣ over axis;  ∂x = g · e^(x − y)", sample=reducing(distinct=True))
def logsumexp(x: Operand, *, axis: Axis = None, keepdims: bool = False) -> Operand:
    """log Σ eˣ over `axis`, without overflow. Raises TypeError for integers.

    The largest element, subtracted and added again, is a constant to the gradient; for any constant the formula
    is the same function of x, so derivatives of every order are right.
    """
    expect_floats(x, "logsumexp")
    top = largest(x, axis)
    y = log_of_sum(x - top, axis) + top
    return y if keepdims else reshape(y, shape=sum(values(x), axis=axis).shape)


@rounded_once
def log_softmax(x: Operand, axis: int = -1) -> Tensor:
    """Logarithm of `softmax`, without overflow or underflow."""
    expect_floats(x, "log_softmax")
    expect_axis("log_softmax", x, axis)
    shifted = x - largest(x, axis)  # before the logarithm: x − logsumexp(x) would be rounded at the size of x
    return sub(shifted, logsumexp(shifted, axis=axis, keepdims=True))


@rounded_once
def softmax(x: Operand, axis: int = -1) -> Tensor:
    """eˣ / Σ eˣ over `axis`."""
    expect_floats(x, "softmax")
    expect_axis("softmax", x, axis)
    return exp(log_softmax(x, axis))


# ---- shapes ---------------------------------------------------------------------------------------------


def concatenate(tensors: Sequence[Operand], axis: int = 0) -> Tensor:
    """Join tensors along an axis that they have."""
    return more_ops.concatenate(*_several("concatenate", tensors, axis), axis=axis)


def stack(tensors: Sequence[Operand], axis: int = 0) -> Tensor:
    """Join tensors of one shape along a new axis."""
    return more_ops.stack(*_several("stack", tensors, axis), axis=axis)


def _several(name: str, tensors: Any, axis: Any) -> list[Any]:
    """The tensors as a list. Raises TypeError unless they are in a list or a tuple, or rows of a tensor or array."""
    if is_array(axis) and (axis.ndim or isinstance(axis, Tensor)):  # as in stack(a, b)
        raise TypeError(f"{name} takes a list of tensors and an axis: {name}([a, b]); got {full_name(axis)} as axis")
    if not isinstance(tensors, list | tuple) and not (is_array(tensors) and tensors.ndim):
        raise TypeError(f"{name} takes a list of tensors, as in {name}([a, b]); got {full_name(tensors)}")
    return list(tensors)


@named
def flatten(x: Operand, start_axis: int = 1) -> Tensor:
    """Merge the axes from `start_axis` on into one: (N, C, H, W) to (N, C·H·W).

    A negative `start_axis` counts from the last. Raises ValueError if x has no such axis, TypeError for no integer.
    """
    expect_array(x, "flatten")
    first = expect_integer("start_axis", start_axis)
    if not -x.ndim <= first < x.ndim:
        raise ValueError(f"x {x.shape} has no axis {shown(start_axis)} to flatten from")
    first %= x.ndim
    return reshape(x, shape=(*x.shape[:first], math.prod(x.shape[first:])))


def embedding(x: Operand, weight: Operand) -> Tensor:
    """The rows of weight (n, d) whose numbers are x (...): (..., d). Gradients of a row that repeats add up.

    Raises IndexError for a number that is no row, unless x is on cuda.
    """
    rows = values(x)
    if type(rows) is np.ndarray and rows.size and not 0 <= rows.min() <= rows.max() < len(weight):
        raise IndexError(f"rows are numbered from 0 to {len(weight) - 1}; got {rows.min()} to {rows.max()}")
    return more_ops.getitem(weight, index=rows)


# ---- activations ----------------------------------------------------------------------------------------


def leaky_relu(x: Operand, negative_slope: float = 0.01) -> Tensor:
    """x where x > 0, negative_slope · x elsewhere."""
    expect_array(x, "leaky_relu")
    slope = expect_number("negative_slope", negative_slope)
    return where(x > 0, x, mul(x, slope))


@rounded_once
def elu(x: Operand, alpha: float = 1.0) -> Tensor:
    """x where x > 0, alpha · (eˣ − 1) elsewhere."""
    expect_array(x, "elu")
    alpha = expect_number("alpha", alpha)
    positive = x > 0
    return where(positive, x, mul(alpha, expm1(where(positive, 0.0, x))))  # no overflow in the branch not taken


@fused(formula="y = x · σ(x);  ∂x = g · σ(x) · (1 + x · σ(−x))", sample=elementwise(REAL))
def silu(x: Operand) -> Operand:
    """x · sigmoid(x), elementwise; also called swish (Elfwing et al. 2017)."""
    return gated(x, sigmoid, 750.0)


@fused(formula="y = x · Φ(x);  ∂x = g · (Φ(x) + x · φ(x))", sample=elementwise(REAL))
def gelu(x: Operand) -> Operand:
    """x · Φ(x), elementwise, with the normal distribution function Φ itself (no tanh approximation).

    Hendrycks & Gimpel 2016. Φ(x) = erfc(−x/√2) / 2 has all its digits where it is near 0.
    """
    return gated(x, lambda v: erfc(v * -math.sqrt(0.5)) * 0.5, 40.0)


def gated(x: Operand, function: Callable[[Operand], Operand], limit: float) -> Operand:
    """x · function(x), of a function that is 0 below −limit and 1 above: without 0 · ∞ there, and in gradients."""
    inside = where(x > limit, limit, where(x < -limit, -limit, x))  # unlike clip's, its gradient at NaN is not 0
    return where(x > limit, x, inside * function(inside))


# ---- dropout --------------------------------------------------------------------------------------------


@primitive(
    lambda g, y, x, *, p, key: dropout_by_key(g, p=p, key=key),  # type: ignore[has-type]
    formula="y = x / (1 − p) where random(key) ≥ p, else 0;  ∂x = g, dropped and scaled in the same places",
    sample=lambda d: ((d.array(REAL, d.shape()),), {"p": d.choice([0.0, 0.4, 1.0]), "key": d.integer(0, 1000)}),
)
def dropout_by_key(x: Operand, *, p: float, key: int) -> Operand:
    """Zero each element with probability `p`, the same ones for the same key, and scale the others by 1 / (1 − p).

    Element i takes word i of the counter-based generator `random.philox`, so no mask has to be stored.
    """
    kept = philox(key, x.size).reshape(x.shape) >= np.uint64(round(p * 2**32))
    return np.where(kept, x * (1 / (1 - p) if p < 1 else 0.0), 0).astype(x.dtype)


def expect_probability(p: float) -> None:
    """Raise TypeError unless p is a number, ValueError unless it is in [0, 1]."""
    expect_number("p", p, 0, 1)


@named
def dropout(x: Operand, p: float = 0.5, training: bool = True, rng: np.random.Generator | None = None) -> Operand:
    """In training, zero each element with probability `p` and scale the others by 1 / (1 − p).

    One key for all elements is drawn from `rng`, or else from the package's generator (see `manual_seed`).

    Raises:
        ValueError: `p` is not in [0, 1].
        TypeError: x is not floating-point.
    """
    expect_probability(p)
    expect_flags(training=training)
    expect_floats(x, "dropout")
    random.generator(rng)  # raises TypeError unless it is one
    if not training or p == 0:
        return x
    return dropout_by_key(x, p=p, key=random.draw_key(rng))
