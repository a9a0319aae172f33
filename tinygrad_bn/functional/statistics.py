"""Mean, variance and related sums: each function is its definition, and a kernel of the same name may run instead."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tinygrad_bn import backend
from tinygrad_bn.arguments import expect_number
from tinygrad_bn.more_ops import stack
from tinygrad_bn.ops import astype, sqrt, sum, where
from tinygrad_bn.sample import Draw, Drawn, reducing
from tinygrad_bn.tensor import Axis, Operand, Tensor, fused


def values(x: Operand) -> Any:
    """The array of a tensor: a constant to every gradient."""
    return x._data if isinstance(x, Tensor) else backend.as_array(x)


def count(x: Operand, axis: Axis) -> int:
    """How many elements of `x` a reduction over `axis` combines."""
    if axis is None or not x.ndim:
        return int(x.size)
    return math.prod(x.shape[i] for i in np.atleast_1d(axis))


def _floating(x: Operand) -> Operand:
    """Integers in float64, as their sum may overflow; anything else as it is."""
    return x if x.dtype.kind == "f" else astype(x, dtype=np.float64)


def _divided(total: Operand, n: int, correction: float = 0) -> Operand:
    """total / (n − correction). Of nothing it is NaN, but not 0 / 0: so its gradients are 0, of every order."""
    correction = expect_number("correction", correction)
    return total / max(n - correction, 0) if n else total + math.nan


def _sample_moments(d: Draw) -> Drawn:
    (x,), params = reducing(distinct=True)(d)
    return (x,), {**params, "correction": d.choice([0, -1, 0.5])}


@fused(formula="y = Σ x / n over axis;  ∂x = g / n, repeated", sample=reducing(distinct=True))
def mean(x: Operand, *, axis: Axis = None, keepdims: bool = False) -> Operand:
    """Arithmetic mean over `axis` (an int, a tuple, or None for all)."""
    return _divided(sum(_floating(x), axis=axis, keepdims=keepdims), count(x, axis))


@fused(formula="y = Σ(x − mean)² / (n − correction) over axis", sample=_sample_moments)
def var(x: Operand, *, axis: Axis = None, keepdims: bool = False, correction: float = 0) -> Operand:
    """Variance over `axis`: Σ(x − mean)² / (n − correction).

    As in NumPy and the array API the default is the biased estimate; PyTorch's default is `correction=1`.
    """
    x = _floating(x)
    xmu = x - mean(x, axis=axis, keepdims=True)
    xmu = xmu - mean(xmu, axis=axis, keepdims=True)  # the mean's rounding error, 0 in exact arithmetic
    return _divided(sum(xmu * xmu, axis=axis, keepdims=keepdims), count(x, axis), correction)


@fused(formula="y = √var over axis", sample=_sample_moments)
def std(x: Operand, *, axis: Axis = None, keepdims: bool = False, correction: float = 0) -> Operand:
    """Square root of `var`. Its gradient is 0 where the variance is 0 (as in PyTorch)."""
    variance = var(_floating(x), axis=axis, keepdims=keepdims, correction=correction)
    if not x.size:
        return variance  # NaN
    varies = variance != 0  # true for NaN, so it stays
    return where(varies, sqrt(where(varies, variance, 1.0)), 0.0)


@fused(formula="y = mean, and variance over axis", sample=_sample_moments)
def mean_and_var(x: Operand, *, axis: Axis = None, keepdims: bool = False, correction: float = 0) -> Operand:
    """`mean` and `var`, stacked, from one pass over memory: `mu, variance = mean_and_var(x)`."""
    mu = mean(x, axis=axis, keepdims=keepdims)
    return stack(mu, var(x, axis=axis, keepdims=keepdims, correction=correction), axis=0)


@fused(formula="y = Σ x² over axis;  ∂x = 2 g x", sample=reducing())
def sum_of_squares(x: Operand, *, axis: Axis = None, keepdims: bool = False) -> Operand:
    """Sum of squares over `axis`, without an array of the squares. Raises TypeError for integers."""
    if x.dtype.kind != "f":
        raise TypeError(f"takes floating-point input; got {x.dtype}, which may not hold squares")
    return sum(x * x, axis=axis, keepdims=keepdims)
