"""Primitives beside those of `ops`: more elementwise functions, extremes, indexing, joining, and the affine map."""

# mypy: disable-error-code="has-type"

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from tinygrad_bn import sample
from tinygrad_bn.arguments import LARGEST, expect_fits_memory, expect_integer, shown
from tinygrad_bn.ops import astype, exp, kept, log, matmul, reshape, sum, transpose, where
from tinygrad_bn.sample import NONZERO, POSITIVE, REAL, broadcasting, elementwise, reducing
from tinygrad_bn.tensor import Axis, Function, Operand, primitive

# ---- elementwise ----------------------------------------------------------------------------------------


def _pow_by_base(g: Any, y: Any, a: Any, b: Any) -> Any:
    if isinstance(b, int | float):
        return g * (b * pow(a, b - 1)) if b else g * (y * 0)  # b · aᵇ⁻¹, or one of its derivatives, may be 0 · ∞
    constant = b == 0
    if getattr(b, "requires_grad", False):  # elsewhere ∂²y/∂a∂b = 1/a
        tiny = float(np.finfo(a.dtype).tiny)
        constant = where((a >= tiny) + (a <= -tiny), False, constant)  # not of NaN, where a⁰ is 1 too
    return g * where(constant, 0.0, b * pow(where(constant, 1.0, a), b - 1))


def _pow_by_exponent(g: Any, y: Any, a: Any, b: Any) -> Any:
    undefined = (a == 0) * (b >= 0)  # where y · log a would be 0 · −∞
    return g * y * log(a + astype(undefined, dtype=y.dtype))  # there log 1


def _pow_of_numbers(a: float, b: float) -> Any:
    """aᵇ of Python's numbers, as NumPy computes it for arrays. Raises OverflowError for an integer beyond 64 bits."""
    if not (isinstance(a, int) and isinstance(b, int) and b >= 0):
        return np.power(np.float64(a), np.float64(b))
    y = int(a**b) if b <= 64 or -1 <= a <= 1 else 1 << 64  # or more: a huge one would take long
    if not -(1 << 63) <= y < 1 << 64:
        raise OverflowError("the result has more than 64 bits; make one of the numbers a float")
    return y


@primitive(
    _pow_by_base,
    _pow_by_exponent,
    formula="y = aᵇ;  ∂a = g · b · aᵇ⁻¹,  ∂b = g · y · log a",
    sample=broadcasting(POSITIVE, POSITIVE),
)
def pow(a: Operand, b: Operand) -> Operand:
    """Power, elementwise with NumPy broadcasting. ∂a of a⁰ is 0, also at a = 0; ∂b of 0ᵇ is 0 for b ≥ 0, else −∞."""
    if isinstance(a, int | float) and isinstance(b, int | float):
        return _pow_of_numbers(a, b)
    a = a if isinstance(a, int | float) else np.asarray(a)
    if not isinstance(b, int | float):
        return np.power(a, b)
    if (isinstance(b, int) or b.is_integer()) and not -1 <= b <= 2 and np.result_type(a).kind == "f":
        magnitude = np.abs(a) ** b  # negative bases take 20 times as long
        return np.copysign(magnitude, a) if b % 2 else magnitude
    return a**b  # unlike np.power it is fast for 0.5, 1 and 2


def _real(x: Any) -> Any:
    """An array of floating-point numbers; integers in float64, as unsigned ones have no negative."""
    x = np.asarray(x)
    if x.dtype.kind not in "fiub":
        raise TypeError(f"takes real numbers; got dtype {x.dtype}")
    return x if x.dtype.kind == "f" else x.astype(np.float64)


@primitive(
    lambda g, y, x: g * (y * tanh(x) * -2), formula="y = 1 / cosh² x;  ∂x = −2 g · y · tanh x", sample=elementwise(REAL)
)
def sech_squared(x: Operand) -> Operand:
    """The slope of tanh, elementwise: 1 − tanh² x with all its digits where tanh is rounded to 1."""
    x = _real(x)
    e = np.exp(np.abs(x) * -2)
    return 4 * e / np.square(1 + e)


@primitive(
    lambda g, y, x: g * sech_squared(x),
    formula="y = tanh x;  ∂x = g · (1 − y²) = g / cosh² x",
    sample=elementwise(REAL),
)
def tanh(x: Operand) -> Operand:
    """Hyperbolic tangent, elementwise."""
    return np.tanh(x)


@primitive(
    lambda g, y, x: g * (sech_squared(x * 0.5) * 0.25),
    formula="y = 1 / (1 + e⁻ˣ);  ∂x = g · y · (1 − y) = g / (4 cosh²(x/2))",
    sample=elementwise(REAL),
)
def sigmoid(x: Operand) -> Operand:
    """Logistic function, elementwise; no overflow for any x."""
    x = _real(x)
    e = np.exp(-np.abs(x))
    return np.where(np.greater_equal(x, 0), 1, e) / (1 + e)


@primitive(lambda g, y, x: g * sign(x), formula="y = |x|;  ∂x = g · sign x", sample=elementwise(NONZERO))
def abs(x: Operand) -> Operand:
    """Absolute value, elementwise. Gradient 0 at 0."""
    return np.abs(x)


@primitive(lambda g, y, x: y * 0, formula="y = sign x;  ∂x = 0", sample=elementwise(NONZERO))
def sign(x: Operand) -> Operand:
    """-1, 0 or 1, elementwise. Gradient 0 everywhere."""
    return np.sign(x)


@primitive(lambda g, y, x: g * exp(x), formula="y = eˣ − 1;  ∂x = g · eˣ", sample=elementwise(REAL))
def expm1(x: Operand) -> Operand:
    """Exponential minus one, exact also near 0, elementwise."""
    return np.expm1(x)


@primitive(lambda g, y, x: g / (x + 1), formula="y = log(1 + x);  ∂x = g / (1 + x)", sample=elementwise(POSITIVE))
def log1p(x: Operand) -> Operand:
    """Natural logarithm of one plus x, exact also near 0, elementwise."""
    return np.log1p(x)


@primitive(lambda g, y, x: g * sigmoid(x), formula="y = log(1 + eˣ);  ∂x = g · sigmoid(x)", sample=elementwise(REAL))
def softplus(x: Operand) -> Operand:
    """Smooth ReLU, elementwise; no overflow for any x."""
    x = _real(x)
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))  # np.logaddexp is ten times slower


@primitive(
    lambda g, y, x: g * (exp(-x * x) * (2 / math.sqrt(math.pi))),
    formula="y = erf x;  ∂x = g · 2/√π · e^(−x²)",
    sample=elementwise(REAL),
)
def erf(x: Operand) -> Operand:
    """Error function, elementwise."""
    return np.vectorize(math.erf, otypes=[np.result_type(x, np.float16)])(x)


@primitive(
    lambda g, y, x: g * (exp(-x * x) * (-2 / math.sqrt(math.pi))),
    formula="y = 1 − erf x;  ∂x = −g · 2/√π · e^(−x²)",
    sample=elementwise(REAL),
)
def erfc(x: Operand) -> Operand:
    """Complementary error function, elementwise: exact also where it is near 0."""
    return np.vectorize(math.erfc, otypes=[np.result_type(x, np.float16)])(x)


def _has_inside(min: float | None, max: float | None) -> bool:
    return min is None or max is None or min <= max


@primitive(
    lambda g, y, x, *, min, max: where(_has_inside(min, max) and x == y, g, 0.0),
    formula="y = min(max(x, low), high);  ∂x = g where low ≤ x ≤ high",
    sample=sample.for_clip,
)
def clip(x: Operand, *, min: float | None = None, max: float | None = None) -> Operand:
    """Limit to [min, max], elementwise; None is no limit. Gradient 1 on the limits themselves, 0 at NaN.

    If min is greater than max, the result is max everywhere, and the gradient 0.
    """
    if min is None and max is None:
        raise ValueError("clip needs min, max, or both")
    with np.errstate(over="ignore"):  # a limit beyond the dtype is inf
        return np.clip(x, min, max)


@primitive(
    lambda g, y, a, b: where(a == b, g * 0.5, where(a < b, 0.0, g)),
    lambda g, y, a, b: where(a == b, g * 0.5, where(b < a, 0.0, g)),
    formula="y = max(a, b);  the larger gets g, both half of it in a tie",
    sample=sample.for_distinct_pair,
)
def maximum(a: Operand, b: Operand) -> Operand:
    """The larger, elementwise with NumPy broadcasting. In a tie each gets half of the gradient, at NaN all of it."""
    return np.maximum(a, b)


@primitive(
    lambda g, y, a, b: where(a == b, g * 0.5, where(a > b, 0.0, g)),
    lambda g, y, a, b: where(a == b, g * 0.5, where(b > a, 0.0, g)),
    formula="y = min(a, b);  the smaller gets g, both half of it in a tie",
    sample=sample.for_distinct_pair,
)
def minimum(a: Operand, b: Operand) -> Operand:
    """The smaller, elementwise with NumPy broadcasting. In a tie each gets half of the gradient, at NaN all of it."""
    return np.minimum(a, b)


# ---- comparisons ----------------------------------------------------------------------------------------


def _comparison(name: str, symbol: str, compare: Callable[[Any, Any], Any]) -> Function[[Operand, Operand]]:
    """An op that compares. As in arithmetic, a number takes the dtype of the tensor: a float32 0.1 equals 0.1."""

    def forward(a: Operand, b: Operand) -> Operand:
        return compare(a, b)

    forward.__name__ = forward.__qualname__ = name
    forward.__doc__ = f"a {symbol} b, elementwise with NumPy broadcasting; boolean, without a gradient."
    return primitive(None, None, formula=f"y = a {symbol} b", sample=broadcasting(REAL, REAL))(forward)


equal, not_equal = _comparison("equal", "=", operator.eq), _comparison("not_equal", "≠", operator.ne)
less, less_equal = _comparison("less", "<", operator.lt), _comparison("less_equal", "≤", operator.le)
greater, greater_equal = _comparison("greater", ">", operator.gt), _comparison("greater_equal", "≥", operator.ge)


# ---- extremes -------------------------------------------------------------------------------------------


def _by_ties(g: Any, y: Any, x: Any, *, axis: Axis, keepdims: bool) -> Any:
    chosen = (x == kept(y, x, axis, keepdims)).astype(x.dtype)
    return kept(g, x, axis, keepdims) * chosen / sum(chosen, axis=axis, keepdims=True)


@primitive(_by_ties, formula="y = max x;  the largest gets g, ties share it evenly", sample=reducing(distinct=True))
def max(x: Operand, *, axis: Axis = None, keepdims: bool = False) -> Operand:
    """Largest element over `axis`. Ties share the gradient evenly (as in torch.amax)."""
    return np.max(x, axis=axis, keepdims=keepdims)


@primitive(_by_ties, formula="y = min x;  the smallest gets g, ties share it evenly", sample=reducing(distinct=True))
def min(x: Operand, *, axis: Axis = None, keepdims: bool = False) -> Operand:
    """Smallest element over `axis`. Ties share the gradient evenly (as in torch.amin)."""
    return np.min(x, axis=axis, keepdims=keepdims)


@primitive(None, formula="y = index of the largest", sample=reducing(distinct=True, tuples=False))
def argmax(x: Operand, *, axis: int | None = None, keepdims: bool = False) -> Operand:
    """Index of the largest element along `axis` (of the flat array if None), the first in a tie. int64."""
    return np.argmax(x, axis=axis, keepdims=keepdims)


@primitive(None, formula="y = index of the smallest", sample=reducing(distinct=True, tuples=False))
def argmin(x: Operand, *, axis: int | None = None, keepdims: bool = False) -> Operand:
    """Index of the smallest element along `axis` (of the flat array if None), the first in a tie. int64."""
    return np.argmin(x, axis=axis, keepdims=keepdims)


# ---- indexing -------------------------------------------------------------------------------------------


@primitive(
    lambda g, y, x, *, index: scatter_add(g, index=index, shape=x.shape),
    formula="y = x[index];  ∂x = g, added up at index",
    sample=sample.for_getitem,
    exact=True,
)
def getitem(x: Operand, *, index: Any | None) -> Operand:
    """Basic and advanced indexing as in NumPy. Repeated indices add up in the gradient."""
    return x[index]


@primitive(
    lambda g, y, x, *, index, shape: getitem(g, index=index),
    formula="y = 0 of shape, and x added up at index;  ∂x = g[index]",
    sample=sample.for_scatter_add,
    exact=True,
)
def scatter_add(x: Operand, *, index: Any | None, shape: tuple[int, ...]) -> Operand:
    """Zeros of `shape` with `x` added at `index`, repeatedly where it repeats: the adjoint of `getitem`."""
    if any(isinstance(i, np.ndarray | list | tuple) for i in (index if isinstance(index, tuple) else (index,))):
        wide = np.zeros(shape, np.result_type(x, np.float32) if x.dtype.kind == "f" else x.dtype)  # no sums in half
        np.add.at(wide, index, x)  # type: ignore[arg-type]
        return wide.astype(x.dtype, copy=False)
    out = np.zeros(shape, x.dtype)
    out[index] = x  # basic indices do not repeat
    return out


# ---- joining and padding --------------------------------------------------------------------------------


def _part(g: Any, axis: int, start: int, stop: int) -> Any:
    """The part between start and stop along `axis`."""
    return getitem(g, index=(slice(None),) * (axis % g.ndim) + (slice(start, stop),))


def _concatenate_rule(i: int, g: Any, y: Any, *xs: Any, axis: int) -> Any:
    stops = np.cumsum([x.shape[axis] for x in xs])
    return _part(g, axis, int(stops[i]) - xs[i].shape[axis], int(stops[i]))


@primitive(
    each=_concatenate_rule,
    formula="y = x₀, x₁, … one after the other;  ∂xᵢ = its part of g",
    sample=sample.for_concatenate,
    exact=True,
)
def concatenate(*xs: Operand, axis: int = 0) -> Operand:
    """Join along an axis that is there; `functional.concatenate` takes a list, as NumPy does."""
    return np.concatenate(xs, axis=axis)


@primitive(
    each=lambda i, g, y, *xs, axis: getitem(g, index=(slice(None),) * (axis % g.ndim) + (i,)),
    formula="y = x₀, x₁, … along a new axis;  ∂xᵢ = the i-th of g",
    sample=lambda d: ((d.array(REAL, (2, 3)), d.array(REAL, (2, 3))), {"axis": d.choice([0, 1, -1])}),
    exact=True,
)
def stack(*xs: Operand, axis: int = 0) -> Operand:
    """Join along a new axis; `functional.stack` takes a list, as NumPy does."""
    return np.stack(xs, axis=axis)


@primitive(
    lambda g, y, x, *, width, value: getitem(
        g, index=tuple(slice(before, before + n) for (before, _), n in zip(width, x.shape, strict=True))
    ),
    formula="y = x with a border of value;  ∂x = g without the border",
    sample=sample.for_pad,
    exact=True,
)
def pad(x: Operand, *, width: tuple[tuple[int, int], ...], value: float | bool = 0.0) -> Operand:
    """A border of `value` around `x`: `width` holds (before, after) for each axis."""
    pairs: Any = list(width) if isinstance(width, tuple | list | np.ndarray) else [width]
    if len(pairs) != x.ndim or any(np.shape(pair) != (2,) for pair in pairs):
        raise ValueError(f"width needs a pair (before, after) for each of {x.ndim} axes; got {shown(width)}")
    pairs = [[expect_integer("each number of width", n, 0, LARGEST) for n in pair] for pair in pairs]
    expect_fits_memory("the result", [n + builtins.sum(pair) for n, pair in zip(x.shape, pairs, strict=True)])
    if x.dtype.kind != "f" and x.dtype.type(value) != value:
        raise ValueError(f"x {x.dtype} cannot hold the value")
    return np.pad(x, pairs, constant_values=value) if x.ndim else np.array(x)


# ---- the affine map -------------------------------------------------------------------------------------


def _linear_by_weight(g: Any, y: Any, x: Any, weight: Any, bias: Any) -> Any:
    rows = math.prod(y.shape[:-1])
    return matmul(transpose(reshape(g, shape=(rows, y.shape[-1]))), reshape(x, shape=(rows, x.shape[-1])))


@primitive(
    lambda g, y, x, weight, bias: matmul(g, weight),
    _linear_by_weight,
    lambda g, y, x, weight, bias: g,
    formula="y = x Wᵀ + b;  ∂x = g W,  ∂W = gᵀ x,  ∂b = Σ g",
    sample=sample.for_linear,
)
def linear(x: Operand, weight: Operand, bias: Operand = None) -> Operand:
    """Affine map of the last axis: x (..., in), weight (out, in), bias (out,) or None; gives (..., out)."""
    if weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        got = f"{weight.shape} and {None if bias is None else bias.shape}"
        raise ValueError(f"the weight has to be (out, in) and the bias (out,); got {got}")
    if x.ndim and x.shape[-1] != weight.shape[1]:
        raise ValueError(f"the last axes of x and of the weight differ: {x.shape[-1]} and {weight.shape[1]}")
    y = matmul(x, weight.T)
    if bias is None:
        return y
    return np.add(y, bias, out=y) if y.ndim and y.dtype == np.result_type(y, bias) else y + bias
