"""Mean, variance and their kin: each a composition, and beside it the op that computes it in one pass."""

from __future__ import annotations

import builtins
import math
from typing import Any

import numpy as np

from tinygrad_bn.autograd import Operand, primitive
from tinygrad_bn.device import as_array, device_of
from tinygrad_bn.ops import astype, exp, log, max, reshape, sqrt, stack, sum, where
from tinygrad_bn.sample import Draw, Drawn, reducing
from tinygrad_bn.tensor import Axis, Tensor


def values(x: Operand) -> Any:
    """The array of a tensor: a constant to every gradient."""
    return x._data if isinstance(x, Tensor) else as_array(x)


def expect_floats(x: Operand, what: str) -> None:
    """Raise TypeError unless x is a tensor or an array, of floating-point numbers."""
    if not hasattr(x, "dtype"):
        raise TypeError(f"{what} takes a tensor or an array; got a {type(x).__name__}: make a Tensor of it")
    if x.dtype.kind != "f":
        raise TypeError(f"{what} takes floating-point input; got {x.dtype}")


def count(x: Operand, axis: Axis) -> int:
    """How many elements of `x` a reduction over `axis` combines."""
    if axis is None:
        return int(x.size)
    return math.prod(x.shape[i] for i in np.atleast_1d(axis))


def _sample_moments(d: Draw) -> Drawn:
    (x,), params = reducing(distinct=True)(d)
    return (x,), {**params, "correction": d.choice([0, -1, 0.5])}


# ---- mean ------------------------------------------------------------------------------------------------


def mean_composed(x: Operand, *, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """Σ x / n, of primitives."""
    if x.dtype == np.float16:  # whose sum may be too large for it
        return astype(mean_composed(astype(x, dtype=np.float32), axis=axis, keepdims=keepdims), dtype=np.float16)
    return sum(x, axis=axis, keepdims=keepdims) / count(x, axis)


@primitive(fuses=mean_composed, formula="y = Σ x / n over axis;  ∂x = g / n, repeated", sample=reducing(distinct=True))
def mean_fused(x: Operand, *, axis: Axis = None, keepdims: bool = False) -> Operand:
    """Arithmetic mean over `axis`."""
    return mean_composed(x, axis=axis, keepdims=keepdims)


def mean(x: Operand, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """Arithmetic mean over `axis` (an int, a tuple, or None for all)."""
    return mean_fused(x, axis=axis, keepdims=keepdims)


# ---- variance --------------------------------------------------------------------------------------------


def var_composed(x: Operand, *, axis: Axis = None, keepdims: bool = False, correction: float = 0) -> Tensor:
    """Σ(x − mean)² / (n − correction), of primitives."""
    if x.dtype == np.float16:
        wide = astype(x, dtype=np.float32)
        return astype(var_composed(wide, axis=axis, keepdims=keepdims, correction=correction), dtype=np.float16)
    xmu = x - mean_composed(x, axis=axis, keepdims=True)
    # What rounding left of the mean. It is 0 in exact arithmetic, so a constant to derivatives of every order.
    xmu = xmu - values(mean_composed(values(xmu), axis=axis, keepdims=True))
    return sum(xmu * xmu, axis=axis, keepdims=keepdims) / builtins.max(count(x, axis) - correction, 0)


@primitive(fuses=var_composed, formula="y = Σ(x − mean)² / (n − correction) over axis", sample=_sample_moments)
def var_fused(x: Operand, *, axis: Axis = None, keepdims: bool = False, correction: float = 0) -> Operand:
    """Variance over `axis`."""
    return var_composed(x, axis=axis, keepdims=keepdims, correction=correction)


def var(x: Operand, axis: Axis = None, keepdims: bool = False, correction: float = 0) -> Tensor:
    """Variance over `axis`: Σ(x − mean)² / (n − correction).

    As in NumPy and the array API the default is the biased estimate; PyTorch's default is `correction=1`.
    """
    return var_fused(x, axis=axis, keepdims=keepdims, correction=correction)


def std(x: Operand, axis: Axis = None, keepdims: bool = False, correction: float = 0) -> Tensor:
    """Square root of `var`. Its gradient is taken as 0 where the variance is 0 (as in PyTorch)."""
    variance = var(x, axis, keepdims, correction)
    varies = variance != 0  # NaN does, and stays
    return where(varies, sqrt(where(varies, variance, 1.0)), 0.0)


def _mean_and_var_composed(x: Operand, *, axis: Axis = None, keepdims: bool = False, correction: float = 0) -> Tensor:
    both = (
        mean_composed(x, axis=axis, keepdims=keepdims),
        var_composed(x, axis=axis, keepdims=keepdims, correction=correction),
    )
    return stack(*both, axis=0)


@primitive(fuses=_mean_and_var_composed, formula="y = mean, and variance over axis", sample=_sample_moments)
def mean_and_var_fused(x: Operand, *, axis: Axis = None, keepdims: bool = False, correction: float = 0) -> Operand:
    """Mean and variance over `axis`, stacked."""
    return _mean_and_var_composed(x, axis=axis, keepdims=keepdims, correction=correction)


def mean_and_var(x: Operand, axis: Axis = None, keepdims: bool = False, correction: float = 0) -> tuple[Tensor, Tensor]:
    """`mean` and `var` from one pass over memory."""
    both = mean_and_var_fused(x, axis=axis, keepdims=keepdims, correction=correction)
    return both[0], both[1]


# ---- other sums ------------------------------------------------------------------------------------------


def _sum_of_squares_composed(x: Operand, *, axis: Axis = None, keepdims: bool = False) -> Tensor:
    if x.dtype.kind != "f":
        raise TypeError(f"takes floating-point input; got {x.dtype}, which may not hold squares")
    if x.dtype == np.float16:
        wide = astype(x, dtype=np.float32)
        return astype(_sum_of_squares_composed(wide, axis=axis, keepdims=keepdims), dtype=np.float16)
    return sum(x * x, axis=axis, keepdims=keepdims)


@primitive(fuses=_sum_of_squares_composed, formula="y = Σ x² over axis;  ∂x = 2 g x", sample=reducing())
def sum_of_squares(x: Operand, *, axis: Axis = None, keepdims: bool = False) -> Operand:
    """Sum of squares over `axis`, without an array of the squares."""
    return _sum_of_squares_composed(x, axis=axis, keepdims=keepdims)


def logsumexp_composed(x: Operand, *, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """log Σ eˣ, of primitives.

    The largest element, subtracted and added again, is a constant to the gradient; for any constant the formula
    is the same function of x, so derivatives of every order are right.
    """
    if x.dtype == np.float16:  # which may not hold the sum
        return astype(logsumexp_composed(astype(x, dtype=np.float32), axis=axis, keepdims=keepdims), dtype=np.float16)
    top = largest(x, axis)
    y = log(sum(exp(x - top), axis=axis, keepdims=True)) + top
    return y if keepdims else reshape(y, shape=np.sum(np.broadcast_to(False, x.shape), axis=axis).shape)


def largest(x: Operand, axis: Axis) -> Any:
    """The largest element over `axis`, as an array that broadcasts with x; 0 where that is not finite."""
    if device_of(x) != "cpu":
        top = max(values(x), axis=axis, keepdims=True)
        return where(top - top == 0, top, 0.0)
    top = np.max(values(x), axis=axis, keepdims=True, initial=-np.inf)
    return np.where(np.isfinite(top), top, 0).astype(x.dtype)


@primitive(
    fuses=logsumexp_composed, formula="y = log Σ eˣ over axis;  ∂x = g · e^(x − y)", sample=reducing(distinct=True)
)
def logsumexp_fused(x: Operand, *, axis: Axis = None, keepdims: bool = False) -> Operand:
    """log Σ eˣ over `axis`."""
    return logsumexp_composed(x, axis=axis, keepdims=keepdims)


def logsumexp(x: Operand, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """log Σ eˣ over `axis`, without overflow. Raises TypeError for integers."""
    expect_floats(x, "logsumexp")
    return logsumexp_fused(x, axis=axis, keepdims=keepdims)
