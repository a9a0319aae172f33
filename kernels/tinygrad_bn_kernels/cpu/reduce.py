"""Reductions over any axes: sums, moments, extremes and their indices.

Adjacent axes that are all reduced, or all kept, are merged. If the last axis is reduced, a loop reduces *rows*: x is
(M, D), and D is reduced. If it is kept, a loop reduces *columns*: x is (A, B, C), and B is reduced. A loop computes a
partial result for each piece of the data; pieces depend on the shape only, and the few partial results are combined in
a fixed order. So results have the same bits for any number of threads.

Sums are in float64. Other dtypes, empty arrays and wrong axes give `NotImplemented`: NumPy handles them.
"""

import math
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from tinygrad_bn_kernels import kernel, load
from tinygrad_bn_kernels.cpu import threads
from tinygrad_bn_kernels.cpu.arrays import Array, compiled
from tinygrad_bn_kernels.cpu.threads import READING_COST, split

Axis = int | tuple[int, ...] | None

# Elements of a piece.
PIECE = 1 << 18

# Most and fewest columns of a piece. Narrower arrays are folded: several rows side by side fill the vector registers.
WIDE = 2048
NARROW = 64

# Up to this many elements NumPy's own sum or extreme is as fast. A variance takes several NumPy calls, so small ones
# use the loops too, and import Numba.
SMALL = 1 << 9

# Shorter rows are searched for an index element by element; in longer ones NumPy finds it faster, on one thread.
SHORT = 8

# NumPy's reductions without the keyword handling of np.sum, np.max and np.min.
ADD: Any = np.add.reduce
MAXIMUM: Any = np.maximum.reduce
MINIMUM: Any = np.minimum.reduce

# ---- plans -----------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How arrays of one shape are reduced over some axes."""

    rows: bool  # rows are reduced, not columns
    view: tuple[int, ...]  # shape of x for the loop: (M, D) or (A, B, C)
    transposed: tuple[int, ...]  # permutation of x's axes before the view, which copies x; empty for none
    shape: tuple[int, ...]  # of the result
    terms: int  # elements per element of the result
    cut: tuple[int, ...]  # columns: (rows, columns, folded rows) of a piece; rows: see `_plan_rows`
    items: int  # number of pieces
    cost: float  # of all, for `split`
    partial: tuple[int, ...]  # shape of the partial results: (results, pieces) or (A, pieces of B, C)


@lru_cache(maxsize=4096, typed=True)  # True is no axis
def plan(shape: tuple[int, ...], axis: Axis, keepdims: bool) -> Plan | None:
    """How to reduce C-contiguous arrays of `shape`; None if NumPy has to do it."""
    given = tuple(range(len(shape))) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    if 0 in shape or not given or not all(type(a) is int and -len(shape) <= a < len(shape) for a in given):
        return None
    axes = {a % len(shape) for a in given}
    if len(axes) < len(given):
        return None
    merged: list[tuple[str, int]] = []  # R for reduced, K for kept
    for i, n in enumerate(shape):
        letter = "R" if i in axes else "K"
        if n > 1 and merged and merged[-1][0] == letter:
            merged[-1] = letter, merged[-1][1] * n
        elif n > 1:
            merged.append((letter, n))
    pattern, sides = "".join(letter for letter, _ in merged), [n for _, n in merged]
    result = tuple(1 if i in axes else n for i, n in enumerate(shape) if keepdims or i not in axes)
    count = math.prod(shape[i] for i in axes)
    if pattern in ("", "K"):
        return None
    if pattern in ("RK", "KRK"):
        a, b, c = (1, *sides)[-3:]
        return _plan_columns((a, b, c), result, count)
    if pattern in ("R", "KR") or (pattern in ("RKR", "KRKR") and sides[-1] >= 16):
        outer = {"R": (1, 1, 1), "KR": (1, 1, *sides[:1]), "RKR": (1, *sides[:2]), "KRKR": tuple(sides[:3])}[pattern]
        return _plan_rows(outer, sides[-1], (), result, count)
    kept = [i for i in range(len(shape)) if i not in axes]
    return _plan_rows((1, 1, math.prod(shape) // count), count, (*kept, *sorted(axes)), result, count)


def _plan_rows(outer: tuple[int, ...], d: int, transposed: tuple[int, ...], shape: tuple[int, ...], terms: int) -> Plan:
    """For the M rows as `outer` (A, B, C), where B is reduced too. The cut is (elements of a piece, B, C).

    In small arrays a piece is all that a result needs, in large ones a row or part of one.
    """
    a, b, c = outer
    pieces = 1 if a * b * c * d <= PIECE else b * -(-d // PIECE)
    return Plan(
        rows=True,
        view=(a * b * c, d),
        transposed=transposed,
        shape=shape,
        terms=terms,
        cut=(PIECE, b, c),
        items=a * c * pieces,
        cost=READING_COST * a * b * c * d,
        partial=(a * c, pieces),
    )


def _plan_columns(view: tuple[int, int, int], shape: tuple[int, ...], terms: int) -> Plan:
    a, b, c = view
    columns = min(c, WIDE)
    fold = max(1, min(NARROW // c, b))
    rows = b if c > WIDE else -(-max(PIECE // columns, 4) // fold) * fold
    pieces = -(-b // rows)
    return Plan(
        rows=False,
        view=view,
        transposed=(),
        shape=shape,
        terms=terms,
        cut=(rows, columns, fold),
        items=a * pieces * -(-c // columns),
        cost=READING_COST * a * b * c,
        partial=(a, pieces, c),
    )


Reduce = Callable[..., Any]


def _reduced(reduce: Reduce, x: Array, axis: Axis, keepdims: bool, *args: Any) -> Any:
    """Call `reduce(x in the plan's view, plan, *args)`."""
    if x.dtype.char not in "fd" or (found := plan(x.shape, axis, keepdims)) is None:
        return NotImplemented
    if x.flags.carray and not found.transposed and x.dtype.isnative:  # the usual case, fast
        return reduce(x.reshape(found.view), found, *args)
    if not x.flags.c_contiguous:
        return _reduced_in_memory_order(reduce, x, axis, found, *args)
    return reduce(compiled(x.transpose(found.transposed) if found.transposed else x).reshape(found.view), found, *args)


def _reduced_in_memory_order(reduce: Reduce, x: Array, axis: Axis, found: Plan, *args: Any) -> Any:
    """Reduce with the axes in memory order, so that a transposed array is not copied."""
    order = sorted(range(x.ndim), key=lambda i: -x.strides[i])
    axes = range(x.ndim) if axis is None else np.atleast_1d(axis) % x.ndim
    inner = tuple(sorted(order.index(int(a)) for a in axes))
    result = _reduced(reduce, np.ascontiguousarray(x.transpose(order)), inner, True, *args)
    inverse = np.argsort(order)
    if isinstance(result, tuple):
        return tuple(r.transpose(inverse).reshape(found.shape) for r in result)
    return result.transpose(inverse).reshape(found.shape)


@cache
def _loop(name: str, rows: bool | None = None) -> Any:
    """A loop of `reduce_loops`, for rows or columns. The import is late: small sums need no Numba."""
    prefix = "" if rows is None else "row_" if rows else "column_"
    return getattr(load("tinygrad_bn_kernels.cpu.reduce_loops"), prefix + name)


def _run(loop: str, x: Array, found: Plan, *args: Any) -> None:
    """Run a loop over all pieces of x; it writes into the last of `args`."""
    run = _loop(loop, found.rows)
    if found.cost < threads.PARALLEL_FROM:
        run(x, *found.cut, *args, 0, found.items)  # as `split` does, which a small array would notice
    else:
        split(run, found.items, found.cost, x, *found.cut, *args)


# ---- sums ------------------------------------------------------------------------------------------------


def _sums(x: Array, found: Plan, dtype: DTypeLike, mean: bool) -> Array:
    """Sums or means, computed in float64, in `dtype`."""
    n = found.terms if mean else 1
    if found.partial[1] == 1:
        out = np.empty(found.shape, dtype)
        _run("sums", x, found, n, out.reshape(found.partial))
        return out
    partial = np.empty(found.partial)
    _run("sums", x, found, 1, partial)
    return (ADD(partial, 1) / n).astype(dtype, copy=False).reshape(found.shape)


def _summed(x: Array, axis: Axis, keepdims: bool, dtype: DTypeLike, mean: bool = False) -> Any:
    """Sums or means, computed in float64, in `dtype`."""
    if x.size > SMALL or x.dtype.char not in "fd" or (mean and not x.size):
        return _reduced(_sums, x, axis, keepdims, dtype, mean)
    total = ADD(x, axis, np.float64, None, keepdims)
    return np.asarray(total / (x.size // total.size) if mean else total, dtype)


@kernel("sum", "cpu")
def sum_(x: Array, *, axis: Axis = None, keepdims: bool = False) -> Any:
    """Sum over `axis`, computed in float64, in x's dtype."""
    return _summed(x, axis, keepdims, x.dtype)


@kernel("sum_to", "cpu")
def sum_to(x: Array, *, shape: tuple[int, ...]) -> Any:
    """Sum x to `shape`, over the axes that broadcasting repeated."""
    lead = x.ndim - len(shape)
    repeated = (i for i, n in enumerate(shape, start=lead) if n == 1 and x.shape[i] != 1)
    total = sum_(x, axis=(*range(lead), *repeated), keepdims=True)
    return total if total is NotImplemented else total.reshape(shape)


@kernel("mean", "cpu")
def mean(x: Array, *, axis: Axis = None, keepdims: bool = False) -> Any:
    """Arithmetic mean over `axis`, from a sum in float64, in x's dtype."""
    return _summed(x, axis, keepdims, x.dtype, mean=True)


def _with_axes(y: Array, axis: Axis, keepdims: bool) -> Array:
    """A reduction's result with the reduced axes, so that it broadcasts against the operand."""
    if keepdims or axis is None or not y.ndim:
        return y
    return np.expand_dims(y, tuple(int(a) for a in np.atleast_1d(axis)))


@kernel("mean.vjp", "cpu")
def mean_vjp(
    g: Array, y: Array, x: Array, *, needs: list[bool], axis: Axis = None, keepdims: bool = False
) -> tuple[Array]:
    """g / n, broadcast to x's shape."""
    if not x.size:
        return NotImplemented
    each = np.divide(g, x.size // g.size, dtype=np.result_type(g, np.float32))  # n may overflow in half precision
    return (np.broadcast_to(_with_axes(each, axis, keepdims), x.shape),)


# ---- moments ---------------------------------------------------------------------------------------------


def _moments(x: Array, found: Plan, shift: Array) -> Array:
    """Σ (x − shift) and Σ (x − shift)² of each result, in float64 (2, results); the shift is (results,)."""
    partial = np.empty((2, *found.partial))
    _run("moments", x, found, shift, partial)
    if found.partial[1] > 1:
        partial = ADD(partial, 2)
    return partial.reshape(2, -1)


def _shifted(x: Array, found: Plan) -> tuple[Array, Array]:
    """Mean and biased variance in float64, in the result's shape."""
    if found.rows and found.partial[1] == 1:
        shift = np.full(found.partial[0], np.nan)  # the loop sets it to the first element
    else:
        first = x[:, 0].reshape(-1, *found.cut[1:]) if found.rows else x
        shift = first[:, 0].astype(np.float64).reshape(-1)
        _loop("make_finite")(shift)  # an infinite shift would make the mean NaN
    var = np.empty(shift.shape)
    if not _loop("settle")(_moments(x, found, shift), found.terms, shift, var):
        _loop("make_finite")(shift)
        _loop("settle")(_moments(x, found, shift), found.terms, shift, var)
    return shift.reshape(found.shape), var.reshape(found.shape)


def wide_mean_and_var(x: Array, axis: Axis, keepdims: bool = False, correction: float = 0) -> Any:
    """Mean and variance in float64."""
    found = _reduced(_shifted, x, axis, keepdims)
    if found is NotImplemented:
        return NotImplemented
    mu, var = found
    if correction:
        n = x.size // mu.size
        with np.errstate(divide="ignore", invalid="ignore"):
            var *= np.divide(n, max(n - correction, 0))  # division by 0 gives ∞ or NaN
    return mu, var


@kernel("mean_and_var", "cpu")
def mean_and_var(x: Array, *, axis: Axis = None, keepdims: bool = False, correction: float = 0) -> Any:
    """Mean, and variance Σ(x − mean)² / (n − correction), both from float64 sums, stacked, in x's dtype."""
    found = wide_mean_and_var(x, axis, keepdims, correction)
    return found if found is NotImplemented else np.stack(found).astype(x.dtype, copy=False)


@kernel("var", "cpu")
def var(x: Array, *, axis: Axis = None, keepdims: bool = False, correction: float = 0) -> Any:
    """Variance over `axis`, Σ(x − mean)² / (n − correction), from float64 sums, in x's dtype."""
    found = wide_mean_and_var(x, axis, keepdims, correction)
    return found if found is NotImplemented else found[1].astype(x.dtype, copy=False)


@kernel("std", "cpu")
def std(x: Array, *, axis: Axis = None, keepdims: bool = False, correction: float = 0) -> Any:
    """Square root of the variance, taken in float64, in x's dtype."""
    found = wide_mean_and_var(x, axis, keepdims, correction)
    return found if found is NotImplemented else np.sqrt(found[1]).astype(x.dtype, copy=False)


@kernel("var.vjp", "cpu")
def var_vjp(
    g: Array, y: Array, x: Array, *, needs: list[bool], axis: Axis = None, keepdims: bool = False, correction: float = 0
) -> Any:
    """2 g (x − mean) / (n − correction), in float64."""
    mean = _summed(x, axis, keepdims, np.float64, mean=True)
    if mean is NotImplemented or x.size // mean.size <= correction:
        return NotImplemented
    n = x.size // mean.size
    each = np.divide(2 * g.astype(np.float64), n - correction)
    each = np.where(y == y, each, y)  # with an infinite element the gradient of all is NaN, as the variance is
    return _centred(x, mean, each, axis, keepdims)


@kernel("std.vjp", "cpu")
def std_vjp(
    g: Array, y: Array, x: Array, *, needs: list[bool], axis: Axis = None, keepdims: bool = False, correction: float = 0
) -> Any:
    """g (x − mean) / ((n − correction) · std), in float64; 0 where the standard deviation is 0."""
    found = wide_mean_and_var(x, axis, keepdims, correction)
    if found is NotImplemented or not x.size or x.size // g.size <= correction:
        return NotImplemented
    mean, variance = found
    with np.errstate(divide="ignore", invalid="ignore"):
        each = np.where(variance == 0, 0, g / (np.sqrt(variance) * (x.size // g.size - correction)))
    return _centred(x, mean, each, axis, keepdims)


def _centred(x: Array, mean: Array, each: Array, axis: Axis, keepdims: bool) -> tuple[Array]:
    """(x − mean) · each in float64, in x's dtype; `mean` and `each` lack the reduced axes."""
    gx = np.subtract(x, _with_axes(mean, axis, keepdims))
    gx *= _with_axes(each, axis, keepdims)
    return (gx.astype(x.dtype, copy=False),)


@kernel("sum_of_squares", "cpu")
def sum_of_squares(x: Array, *, axis: Axis = None, keepdims: bool = False) -> Any:
    """Σ x² over `axis`, computed in float64, in x's dtype."""
    result = _reduced(_squares, x, axis, keepdims)
    return result if result is NotImplemented else result.astype(x.dtype, copy=False)


def _squares(x: Array, found: Plan) -> Array:
    return _moments(x, found, np.zeros(math.prod(found.shape)))[1].reshape(found.shape)


@kernel("squared_norm", "cpu")
def sum_of_all_squares(x: Array) -> Any:
    """Σ x² over all elements, in float64."""
    return _reduced(_squares, x, None, False)


# ---- extremes --------------------------------------------------------------------------------------------
# The minimum is −max(−x). NaN wins, as in NumPy: `v > best or v != v` is true for NaN, and no number is greater.


def _serial(x: Array) -> bool:
    """Whether x is too small for threads."""
    return READING_COST * x.size < threads.PARALLEL_FROM


def _extremes(pick: Any, sign: int) -> Reduce:
    def reduce(x: Array, found: Plan) -> Array:
        partial = np.empty(found.partial, x.dtype)
        _run("extremes", x, found, sign, partial)
        if found.partial[1] > 1:
            partial = pick(partial, 1)
        return partial.reshape(found.shape)

    return reduce


_largest, _smallest = _extremes(MAXIMUM, 1), _extremes(MINIMUM, -1)


def _extreme(pick: Any, reduce: Reduce, x: Array, axis: Axis, keepdims: bool) -> Any:
    if x.size <= SMALL or (axis is None and _serial(x)):  # on one thread NumPy goes through one long row faster
        return pick(x, axis, None, None, keepdims)
    return _reduced(reduce, x, axis, keepdims)


@kernel("max", "cpu")
def max_(x: Array, *, axis: Axis = None, keepdims: bool = False) -> Any:
    """Largest element over `axis`; NaN if there is one."""
    return _extreme(MAXIMUM, _largest, x, axis, keepdims)


@kernel("min", "cpu")
def min_(x: Array, *, axis: Axis = None, keepdims: bool = False) -> Any:
    """Smallest element over `axis`; NaN if there is one."""
    return _extreme(MINIMUM, _smallest, x, axis, keepdims)


def _indices(arg: Callable[..., Any], sign: int) -> Reduce:
    def reduce(x: Array, found: Plan) -> Any:
        if found.rows and found.view[1] >= SHORT and _serial(x):
            return arg(x, 1).reshape(found.shape)
        partial, indices = np.empty(found.partial, x.dtype), np.empty(found.partial, np.intp)
        _run("indices", x, found, sign, partial, indices)
        if found.partial[1] > 1:
            first = np.argmax(partial, axis=1, keepdims=True)  # the first piece that has it; NaN wins here too
            indices = np.take_along_axis(indices, first, 1)
        return indices.reshape(found.shape)

    return reduce


_index_of_largest, _index_of_smallest = _indices(np.ndarray.argmax, 1), _indices(np.ndarray.argmin, -1)


def _index(reduce: Reduce, x: Array, axis: int | None, keepdims: bool) -> Any:
    if isinstance(axis, tuple) or x.size <= SMALL:
        return NotImplemented
    return _reduced(reduce, np.ascontiguousarray(x) if axis is None else x, axis, keepdims)


@kernel("argmax", "cpu")
def argmax(x: Array, *, axis: int | None = None, keepdims: bool = False) -> Any:
    """Index of the largest element along `axis`: the first of a tie, or the first NaN; int64."""
    return _index(_index_of_largest, x, axis, keepdims)


@kernel("argmin", "cpu")
def argmin(x: Array, *, axis: int | None = None, keepdims: bool = False) -> Any:
    """Index of the smallest element along `axis`: the first of a tie, or the first NaN; int64."""
    return _index(_index_of_smallest, x, axis, keepdims)
