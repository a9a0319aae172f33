"""The primitives that BatchNorm and its gradients are made of, one declaration each; the others are in `more_ops`.

A forward gets arrays and is the NumPy reference. A rule `(g, y, *operands, **params)` gives the gradient of one
operand from the gradient `g` of the result `y`; it may use any function of this file, so that it can itself be
differentiated. Where a function has a kink, the chosen subgradient is PyTorch's and stands in the docstring; so does
the gradient at NaN where it is not NaN.
"""

# A rule may name an op that is declared further down, which mypy cannot infer through a decorator.
# mypy: disable-error-code="has-type"

from __future__ import annotations

from typing import Any

import numpy as np

from tinygrad_bn import arguments, sample
from tinygrad_bn.sample import NONZERO, POSITIVE, REAL, broadcasting, elementwise, reducing
from tinygrad_bn.tensor import Axis, Operand, primitive

# ---- arithmetic -----------------------------------------------------------------------------------------


@primitive(
    lambda g, y, a, b: g,
    lambda g, y, a, b: g,
    formula="y = a + b;  ∂a = g,  ∂b = g",
    sample=broadcasting(REAL, REAL),
    exact=True,
)
def add(a: Operand, b: Operand) -> Operand:
    """Sum, elementwise with NumPy broadcasting."""
    return np.add(a, b)


@primitive(
    lambda g, y, a, b: g,
    lambda g, y, a, b: -g,
    formula="y = a − b;  ∂a = g,  ∂b = −g",
    sample=broadcasting(REAL, REAL),
    exact=True,
)
def sub(a: Operand, b: Operand) -> Operand:
    """Difference, elementwise with NumPy broadcasting."""
    return np.subtract(a, b)


@primitive(
    lambda g, y, a, b: g * b,
    lambda g, y, a, b: g * a,
    formula="y = a · b;  ∂a = g · b,  ∂b = g · a",
    sample=broadcasting(REAL, REAL),
)
def mul(a: Operand, b: Operand) -> Operand:
    """Product, elementwise with NumPy broadcasting."""
    return np.multiply(a, b)


@primitive(
    lambda g, y, a, b: g / b,
    lambda g, y, a, b: -g * (y / b),
    formula="y = a / b;  ∂a = g / b,  ∂b = −g · y / b",
    sample=broadcasting(REAL, NONZERO),
)
def div(a: Operand, b: Operand) -> Operand:
    """True quotient, elementwise with NumPy broadcasting."""
    return np.true_divide(a, b)


@primitive(lambda g, y, x: -g, formula="y = −x;  ∂x = −g", sample=elementwise(REAL), exact=True)
def neg(x: Operand) -> Operand:
    """Negative, elementwise."""
    return np.negative(x)


# ---- functions of one operand ---------------------------------------------------------------------------


@primitive(lambda g, y, x: g * y, formula="y = eˣ;  ∂x = g · y", sample=elementwise(REAL))
def exp(x: Operand) -> Operand:
    """Exponential, elementwise."""
    return np.exp(x)


@primitive(lambda g, y, x: g / x, formula="y = log x;  ∂x = g / x", sample=elementwise(POSITIVE))
def log(x: Operand) -> Operand:
    """Natural logarithm, elementwise."""
    return np.log(x)


@primitive(lambda g, y, x: g * 0.5 / y, formula="y = √x;  ∂x = g / (2y)", sample=elementwise(POSITIVE))
def sqrt(x: Operand) -> Operand:
    """Square root, elementwise. Its gradient at 0 is infinite."""
    return np.sqrt(x)


@primitive(lambda g, y, x: g * -0.5 * y * y * y, formula="y = 1/√x;  ∂x = −g · y³ / 2", sample=elementwise(POSITIVE))
def rsqrt(x: Operand) -> Operand:
    """Reciprocal of the square root, elementwise."""
    return 1 / np.sqrt(x)


@primitive(
    lambda g, y, x: where(y <= 0, 0.0, g), formula="y = max(x, 0);  ∂x = g where y > 0", sample=elementwise(NONZERO)
)
def relu(x: Operand) -> Operand:
    """Rectified linear unit, elementwise. Gradient 0 at 0, and g at NaN."""
    return np.maximum(x, 0)


# ---- choosing -------------------------------------------------------------------------------------------


@primitive(
    None,
    lambda g, y, condition, a, b: where(condition, g, 0.0),
    lambda g, y, condition, a, b: where(condition, 0.0, g),
    formula="y = a where condition, else b;  ∂a = g where condition,  ∂b = g elsewhere",
    sample=sample.for_where,
)
def where(condition: Operand, a: Operand, b: Operand) -> Operand:
    """`a` where `condition` (boolean) holds, `b` elsewhere, with NumPy broadcasting."""
    return np.where(condition, a, b)


# ---- reductions and broadcasting ------------------------------------------------------------------------


def kept(y: Any, x: Any, axis: Axis, keepdims: bool) -> Any:
    """A reduction's result in the shape that broadcasts against its operand."""
    if keepdims or not x.ndim:
        return y
    axes = range(x.ndim) if axis is None else np.lib.array_utils.normalize_axis_tuple(axis, x.ndim)
    return reshape(y, shape=tuple(1 if i in axes else n for i, n in enumerate(x.shape)))


def _accumulator(x: Any) -> Any:
    """float16 and float32 are summed in float64, so that the result is exact to the last bit or two."""
    return np.float64 if x.dtype.kind == "f" else None


@primitive(
    lambda g, y, x, *, axis, keepdims: broadcast_to(kept(g, x, axis, keepdims), shape=x.shape),
    formula="y = Σ x over axis;  ∂x = g, repeated",
    sample=reducing(),
    exact=True,
)
def sum(x: Operand, *, axis: Axis = None, keepdims: bool = False) -> Operand:
    """Sum over `axis` (an int, a tuple, or None for all). float16 and float32 accumulate in float64."""
    total = np.sum(x, axis=axis, keepdims=keepdims, dtype=_accumulator(x))
    return total.astype(x.dtype) if x.dtype.kind == "f" else total


@primitive(
    lambda g, y, x, *, shape: sum_to(g, shape=x.shape),
    formula="y = x, repeated to shape;  ∂x = g, summed back",
    sample=sample.for_broadcast_to,
    exact=True,
)
def broadcast_to(x: Operand, *, shape: tuple[int, ...]) -> Operand:
    """Repeat `x` to `shape` by NumPy's rules, without a copy."""
    return np.broadcast_to(x, shape)


@primitive(
    lambda g, y, x, *, shape: broadcast_to(g, shape=x.shape),
    formula="y = Σ x over the axes that broadcasting repeated;  ∂x = g, repeated",
    sample=sample.for_sum_to,
    exact=True,
)
def sum_to(x: Operand, *, shape: tuple[int, ...]) -> Operand:
    """Sum `x` down to `shape`: the adjoint of `broadcast_to`."""
    lead = x.ndim - len(shape)
    repeated = [i for i, n in enumerate(shape, start=lead) if n == 1 and x.shape[i] != 1]
    total = np.sum(x, axis=(*range(lead), *repeated), keepdims=True, dtype=_accumulator(x))
    return total.reshape(shape).astype(x.dtype, copy=False)


# ---- matrix product -------------------------------------------------------------------------------------


def _swap(x: Any) -> Any:
    """Transpose the last two axes."""
    return transpose(x, axes=(*range(x.ndim - 2), x.ndim - 1, x.ndim - 2))


def _as_column(x: Any) -> Any:
    return reshape(x, shape=(*x.shape, 1))


def _as_row(x: Any) -> Any:
    return _swap(_as_column(x))


def _matmul_by_left(g: Any, y: Any, a: Any, b: Any) -> Any:
    if b.ndim == 1:
        return _as_column(g) * b
    if a.ndim == 1:
        return sum(_as_row(g) * b, axis=-1)
    return matmul(g, _swap(b))


def _matmul_by_right(g: Any, y: Any, a: Any, b: Any) -> Any:
    if a.ndim == 1:
        return a * g if b.ndim == 1 else _as_column(a) * _as_row(g)
    if b.ndim == 1:
        return _as_column(g) * a
    return matmul(_swap(a), g)


@primitive(
    _matmul_by_left,
    _matmul_by_right,
    formula="y = a b;  ∂a = g bᵀ,  ∂b = aᵀ g",
    sample=sample.for_matmul,
)
def matmul(a: Operand, b: Operand) -> Operand:
    """Matrix product (..., n, k) @ (..., k, m) with broadcast leading axes; 1-D operands as in NumPy."""
    if not np.ndim(a) or not np.ndim(b):
        raise ValueError("matmul takes operands of at least one axis; for a number use *")
    with np.errstate(invalid="ignore"):  # BLAS raises this flag on some processors only
        return np.matmul(a, b)


# ---- shape and dtype ------------------------------------------------------------------------------------


@primitive(
    lambda g, y, x, *, shape: reshape(g, shape=x.shape),
    formula="y = x in another shape;  ∂x = g in x's shape",
    sample=sample.for_reshape,
    exact=True,
)
def reshape(x: Operand, *, shape: int | tuple[int, ...]) -> Operand:
    """The same elements in another shape; one -1 stands for the remaining elements."""
    return arguments.reshaped(np.reshape(x, shape), shape)


@primitive(
    lambda g, y, x, *, axes: transpose(g, axes=None if axes is None else tuple(np.argsort(np.mod(axes, x.ndim)))),
    formula="y = x with its axes permuted;  ∂x = g with them permuted back",
    sample=lambda d: ((d.array(REAL, (2, 3, 4)),), {"axes": d.choice([None, (1, 2, 0), (0, -1, 1), (2, 1, 0)])}),
    exact=True,
)
def transpose(x: Operand, *, axes: tuple[int, ...] | None = None) -> Operand:
    """Permute the axes, without a copy; in reverse order if `axes` is None."""
    return np.transpose(x, axes)


@primitive(
    lambda g, y, x, *, dtype: g,
    formula="y = x in another dtype;  ∂x = g in x's dtype",
    sample=lambda d: ((d.array(REAL, d.shape()),), {"dtype": np.float64}),
    exact=True,
)
def astype(x: Operand, *, dtype: Any) -> Operand:
    """Convert to another dtype, of real numbers or booleans. Raises TypeError for any other."""
    found = arguments.as_dtype("dtype", dtype)
    if not arguments.is_real(found):
        raise TypeError("a tensor holds real numbers of at most 64 bits, or booleans")
    return np.asarray(x, found)
