"""Reductions over any axes: sums, moments, extremes and their places.

Neighbouring axes that are all reduced, or all kept, are one axis to a loop. What is left is either *rows*, when the
last axis is reduced (each of M rows of D elements), or *columns*, when it is kept (B rows of C columns, A times).
A loop takes its work in pieces whose bounds follow from the shape alone, and leaves a partial result for each; the
partial results, which are few, are put together in one order. So the number of threads changes nothing.

Everything is added up in float64. What NumPy does as well is declined (`NotImplemented`): other dtypes, empty arrays,
and axes that are wrong.
"""

import math
from collections.abc import Callable
from functools import cache, lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from tinygrad_bn_kernels import kernel
from tinygrad_bn_kernels.cpu import threads
from tinygrad_bn_kernels.cpu.arrays import Array, compiled
from tinygrad_bn_kernels.cpu.threads import READING_COST, split

Axis = int | tuple[int, ...] | None

# Elements of a piece.
PIECE = 1 << 18

# Columns of a piece at most, and at least: of narrower arrays several rows lie side by side, to fill vector registers.
WIDE = 2048
NARROW = 64

# Up to so many elements a call of NumPy's own sum or extreme costs less than the planning here. A variance is several
# calls, and is left to loops: the first one, however small, imports Numba.
SMALL = 1 << 12

# Columns of fewer terms than this have moments and extremes for which, in large arrays, NumPy's passes are faster.
# Measured: the variance of (20000, 2, 10) over axis 1 takes 17 ms here and 7 ms there, of (5000, 8, 40) 7 and 9 ms.
FEW = 8

# NumPy's reductions, without the keyword handling of np.sum and its kin.
ADD: Any = np.add.reduce
MAXIMUM: Any = np.maximum.reduce
MINIMUM: Any = np.minimum.reduce

# ---- which elements make up a result ---------------------------------------------------------------------


class Plan(NamedTuple):
    """How arrays of one shape are reduced over some axes."""

    rows: bool  # whether rows are reduced, or columns
    view: tuple[int, ...]  # of x: (M, D), of which D goes; or (A, B, C), of which B goes
    outer: tuple[int, ...]  # the M rows, as (A, B, C), of which B goes too
    copied: tuple[int, ...]  # the permutation of the axes in which x has to be copied first; empty for none
    shape: tuple[int, ...]  # of the result
    terms: int  # elements that make up one number of the result
    # How a loop cuts it up: (elements of a piece of a row,), or (rows, columns, fold) of a piece of columns, of which
    # `fold` rows lie side by side.
    cut: tuple[int, ...]
    items: int  # how many pieces there are
    partial: tuple[int, ...]  # their results: (M, pieces), or (A, pieces of B, C)
    apart: tuple[int, ...]  # the same, but of rows (A, B, C, pieces)
    over: tuple[int, ...]  # axes of that over which they have to be put together; empty for none


@lru_cache(maxsize=4096)
def plan(shape: tuple[int, ...], axis: Axis, keepdims: bool) -> Plan | None:
    """How to reduce C-contiguous arrays of `shape`; None for what is left to NumPy."""
    given = tuple(range(len(shape))) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    if 0 in shape or not given or not all(isinstance(a, int) and -len(shape) <= a < len(shape) for a in given):
        return None
    axes = {a % len(shape) for a in given}
    if len(axes) < len(given):
        return None
    merged: list[tuple[str, int]] = []
    for i, n in enumerate(shape):
        kind = "R" if i in axes else "K"
        if n > 1 and merged and merged[-1][0] == kind:
            merged[-1] = kind, merged[-1][1] * n
        elif n > 1:
            merged.append((kind, n))
    pattern, sides = "".join(kind for kind, _ in merged), [n for _, n in merged]
    result = tuple(1 if i in axes else n for i, n in enumerate(shape) if keepdims or i not in axes)
    count = math.prod(shape[i] for i in axes)
    if pattern in ("", "K"):
        return None
    if pattern in ("RK", "KRK"):
        a, b, c = (1, *sides)[-3:]
        return _of_columns((a, b, c), result, count)
    if pattern in ("R", "KR") or (pattern in ("RKR", "KRKR") and sides[-1] >= 16):
        outer = {"R": (1, 1, 1), "KR": (1, 1, *sides[:1]), "RKR": (1, *sides[:2]), "KRKR": tuple(sides[:3])}[pattern]
        return _of_rows(outer, sides[-1], (), result, count)
    kept = [i for i in range(len(shape)) if i not in axes]
    return _of_rows((1, 1, math.prod(shape) // count), count, (*kept, *sorted(axes)), result, count)


def _of_rows(outer: tuple[int, ...], d: int, copied: tuple[int, ...], shape: tuple[int, ...], terms: int) -> Plan:
    m, pieces = math.prod(outer), -(-d // PIECE)
    return Plan(
        rows=True,
        view=(m, d),
        outer=outer,
        copied=copied,
        shape=shape,
        terms=terms,
        cut=(PIECE,),
        items=m * pieces,
        partial=(m, pieces),
        apart=(*outer, pieces),
        over=(1, 3) if outer[1] > 1 or pieces > 1 else (),
    )


def _of_columns(view: tuple[int, int, int], shape: tuple[int, ...], terms: int) -> Plan:
    a, b, c = view
    columns = min(c, WIDE)
    fold = max(1, min(NARROW // c, b))
    rows = b if c > WIDE else -(-max(PIECE // columns, 4) // fold) * fold
    pieces = -(-b // rows)
    return Plan(
        rows=False,
        view=view,
        outer=(),
        copied=(),
        shape=shape,
        terms=terms,
        cut=(rows, columns, fold),
        items=a * pieces * -(-c // columns),
        partial=(a, pieces, c),
        apart=(a, pieces, c),
        over=(1,) if pieces > 1 else (),
    )


Reduce = Callable[[Array, Plan], Any]


def _reduced(reduce: Reduce, x: Array, axis: Axis, keepdims: bool, few_are_numpys: bool = False) -> Any:
    """`reduce(x in the plan's view, the plan)`, which gives one or several results, in the result's shape."""
    if x.dtype.char not in "fd" or not (axis is None or type(axis) is int or type(axis) is tuple):
        return NotImplemented
    found = plan(x.shape, axis, keepdims)
    if found is None:
        return NotImplemented
    if not x.flags.c_contiguous:
        return _reduced_in_memory_order(reduce, x, axis, found, few_are_numpys)
    if few_are_numpys and x.size > SMALL and not found.rows and found.view[1] < FEW:
        return NotImplemented
    return reduce(compiled(x.transpose(found.copied) if found.copied else x).reshape(found.view), found)


def _reduced_in_memory_order(reduce: Reduce, x: Array, axis: Axis, found: Plan, few_are_numpys: bool) -> Any:
    """A transposed array needs no copy: its axes are put in the order in which they lie in memory."""
    order = sorted(range(x.ndim), key=lambda i: -x.strides[i])
    axes = range(x.ndim) if axis is None else np.atleast_1d(axis) % x.ndim
    inner = tuple(sorted(order.index(int(a)) for a in axes))
    result = _reduced(reduce, np.ascontiguousarray(x.transpose(order)), inner, True, few_are_numpys)
    if result is NotImplemented:
        return result
    back = np.argsort(order)
    if isinstance(result, tuple):
        return tuple(r.transpose(back).reshape(found.shape) for r in result)
    return result.transpose(back).reshape(found.shape)


@cache
def _loop(name: str, rows: bool | None = None) -> Any:
    """A loop of `reduce_loops`, of rows or columns; imported when first needed, as small sums do without Numba."""
    kind = "" if rows is None else "row_" if rows else "column_"
    return getattr(import_module("tinygrad_bn_kernels.cpu.reduce_loops"), kind + name)


def _run(loop: str, x: Array, found: Plan, *args: Any) -> None:
    """Run a loop over all pieces of x, which leaves its results in the last of `args`."""
    split(_loop(loop, found.rows), found.items, READING_COST * x.size, x, *found.cut, *args)


# ---- sums ------------------------------------------------------------------------------------------------


def _sums(x: Array, found: Plan) -> Array:
    """Sums in float64, in the result's shape."""
    partial = np.empty(found.partial)
    _run("sums", x, found, partial)
    if found.over:
        partial = ADD(partial.reshape(found.apart), found.over)
    return partial.reshape(found.shape)


def _summed(x: Array, axis: Axis, keepdims: bool) -> Any:
    """Sums in float64."""
    if x.dtype.char not in "fd":
        return NotImplemented
    return _reduced(_sums, x, axis, keepdims) if x.size > SMALL else ADD(x, axis, np.float64, None, keepdims)


@kernel("sum", "cpu")
def sum_(x: Array, *, axis: Axis = None, keepdims: bool = False) -> Any:
    """Sum over `axis`, added up in float64, in x's dtype."""
    total = _summed(x, axis, keepdims)
    return total if total is NotImplemented else total.astype(x.dtype)


@kernel("sum_to", "cpu")
def sum_to(x: Array, *, shape: tuple[int, ...]) -> Any:
    """Sum x down to `shape`, over the axes along which broadcasting repeated it."""
    lead = x.ndim - len(shape)
    repeated = (i for i, n in enumerate(shape, start=lead) if n == 1 and x.shape[i] != 1)
    total = sum_(x, axis=(*range(lead), *repeated), keepdims=True)
    return total if total is NotImplemented else total.reshape(shape)


@kernel("mean_fused", "cpu")
def mean_fused(x: Array, *, axis: Axis = None, keepdims: bool = False) -> Any:
    """Arithmetic mean over `axis`, from a sum in float64, in x's dtype."""
    total = _summed(x, axis, keepdims)
    if total is NotImplemented or not x.size:
        return NotImplemented
    return (total / (x.size // total.size)).astype(x.dtype)


def _kept(y: Array, axis: Axis, keepdims: bool) -> Array:
    """A reduction's result in the shape that broadcasts against its operand."""
    if keepdims or axis is None:
        return y
    return np.expand_dims(y, tuple(int(a) for a in np.atleast_1d(axis)))


@kernel("mean_fused.vjp", "cpu")
def mean_fused_vjp(
    g: Array, y: Array, x: Array, *, needs: list[bool], axis: Axis = None, keepdims: bool = False
) -> tuple[Array]:
    """g / n, repeated."""
    if not x.size:
        return NotImplemented
    each = np.divide(g, x.size // g.size, dtype=np.result_type(g, np.float32))  # half precision may not hold n
    return (np.broadcast_to(_kept(each, axis, keepdims), x.shape),)


# ---- moments ---------------------------------------------------------------------------------------------


def _moments(x: Array, found: Plan, shift: Array) -> Array:
    """Σ (x − shift) and Σ (x − shift)² of each result; as flat as the shift, and like it in float64."""
    partial = np.empty((2, *found.partial))
    between = found.outer[1:] if found.rows else ()  # so that a row finds its shift
    _run("moments", x, found, *between, shift, partial)
    if found.over:
        partial = ADD(partial.reshape(2, *found.apart), tuple([i + 1 for i in found.over]))
    return partial.reshape(2, -1)


def _shifted(x: Array, found: Plan) -> tuple[Array, Array]:
    """Mean and biased variance in float64, in the result's shape."""
    if found.rows and not found.over:
        shift = np.full(len(x), np.nan)  # the loop takes it from a row when it reads that anyway
    else:
        first = x[:, 0].reshape(found.outer) if found.rows else x
        shift = first[:, 0].astype(np.float64).reshape(-1)
        _loop("make_finite")(shift)  # or the mean would be NaN where it is infinite
    var = np.empty(shift.shape)
    if not _loop("settle")(_moments(x, found, shift), found.terms, shift, var):
        _loop("make_finite")(shift)
        _loop("settle")(_moments(x, found, shift), found.terms, shift, var)
    return shift.reshape(found.shape), var.reshape(found.shape)


def _mean_and_var(x: Array, axis: Axis, keepdims: bool, correction: float) -> Any:
    """Mean and variance in float64."""
    found = _reduced(_shifted, x, axis, keepdims, few_are_numpys=True)
    if found is NotImplemented:
        return NotImplemented
    mu, var = found
    if correction:
        n = x.size // mu.size
        with np.errstate(divide="ignore", invalid="ignore"):
            var *= np.divide(n, max(n - correction, 0))  # infinite, or NaN for 0, where nothing is left to divide by
    return mu, var


@kernel("mean_and_var_fused", "cpu")
def mean_and_var_fused(x: Array, *, axis: Axis = None, keepdims: bool = False, correction: float = 0) -> Any:
    """Mean, and variance Σ(x − mean)² / (n − correction), both from float64 sums, stacked in x's dtype."""
    found = _mean_and_var(x, axis, keepdims, correction)
    return found if found is NotImplemented else np.stack(found).astype(x.dtype, copy=False)


@kernel("var_fused", "cpu")
def var_fused(x: Array, *, axis: Axis = None, keepdims: bool = False, correction: float = 0) -> Any:
    """Variance over `axis`, Σ(x − mean)² / (n − correction), from float64 sums, in x's dtype."""
    found = _mean_and_var(x, axis, keepdims, correction)
    return found if found is NotImplemented else found[1].astype(x.dtype, copy=False)


@kernel("sum_of_squares", "cpu")
def sum_of_squares(x: Array, *, axis: Axis = None, keepdims: bool = False) -> Any:
    """Σ x² over `axis`, added up in float64, in x's dtype."""
    result = _reduced(_squares, x, axis, keepdims, few_are_numpys=True)
    return result if result is NotImplemented else result.astype(x.dtype, copy=False)


def _squares(x: Array, found: Plan) -> Array:
    return _moments(x, found, np.zeros(math.prod(found.shape)))[1].reshape(found.shape)


@kernel("optim.sum_of_squares", "cpu")
def sum_of_all_squares(x: Array) -> Any:
    """Σ x² over all elements, in float64."""
    return _reduced(_squares, x, None, False)


# ---- extremes --------------------------------------------------------------------------------------------
# Along rows NumPy's own loops are as fast as memory, for what one thread does. Down columns they are not.
# The smallest is the largest of −x. NaN wins, as in NumPy: `v > best or v != v` is true for it, and nothing is greater.


def _left_to_numpy(x: Array, axis: Axis) -> bool:
    """Whether x is small, or has rows to reduce that are not enough for threads."""
    if x.size <= SMALL or READING_COST * x.size >= threads.PARALLEL_FROM:
        return x.size <= SMALL
    return axis is None or not {-1, x.ndim - 1}.isdisjoint(axis if isinstance(axis, tuple) else (axis,))


def _row_extremes(x: Array, pick: np.ufunc, sign: int) -> Array:
    """The extreme of each row of x (M, D)."""
    if READING_COST * x.size < threads.PARALLEL_FROM:
        return pick.reduce(x, axis=1)
    if len(x) == 1 and x.size >= 4 * PIECE:
        whole = x.size - x.size % PIECE
        parts = _row_extremes(x[0, :whole].reshape(-1, PIECE), pick, sign)
        return pick.reduce([*parts, *pick.reduce(x[:, whole:], axis=1, initial=parts[0])], keepdims=True)
    out = np.empty(len(x), x.dtype)
    split(_loop("row_extremes"), len(x), READING_COST * x.size, compiled(x), x.dtype.type(sign), out)
    return out


def _row_places(x: Array, place: Callable[..., Any], sign: int) -> Array:
    """Where the extreme of each row of x (M, D) is."""
    if READING_COST * x.size < threads.PARALLEL_FROM:
        return place(x, axis=1)
    if len(x) == 1 and x.size >= 4 * PIECE:
        rows = np.split(x[0], range(PIECE, x.size, PIECE))
        body, tail = x[0, : PIECE * (len(rows) - 1)].reshape(-1, PIECE), rows[-1]
        places = np.append(_row_places(body, place, sign), place(tail))
        piece = place([row[i] for row, i in zip(rows, places, strict=True)])  # the first one that has it
        return np.asarray([piece * PIECE + places[piece]])
    out = np.empty(len(x), np.intp)
    split(_loop("row_places"), len(x), READING_COST * x.size, compiled(x), x.dtype.type(sign), out)
    return out


def _extremes(pick: np.ufunc, sign: int) -> Reduce:
    def reduce(x: Array, found: Plan) -> Array:
        if found.rows:
            partial = _row_extremes(x, pick, sign)
            if found.outer[1] > 1:
                partial = pick.reduce(partial.reshape(found.outer), axis=1)
        else:
            partial = np.empty(found.partial, x.dtype)
            _run("extremes", x, found, x.dtype.type(sign), partial)
            if found.over:
                partial = pick.reduce(partial, axis=1)
        return partial.reshape(found.shape)

    return reduce


_largest, _smallest = _extremes(np.maximum, 1), _extremes(np.minimum, -1)


@kernel("max", "cpu")
def max_(x: Array, *, axis: Axis = None, keepdims: bool = False) -> Any:
    """Largest element over `axis`; NaN if there is one."""
    if _left_to_numpy(x, axis):
        return MAXIMUM(x, axis, None, None, keepdims)
    return _reduced(_largest, x, axis, keepdims, few_are_numpys=True)


@kernel("min", "cpu")
def min_(x: Array, *, axis: Axis = None, keepdims: bool = False) -> Any:
    """Smallest element over `axis`; NaN if there is one."""
    if _left_to_numpy(x, axis):
        return MINIMUM(x, axis, None, None, keepdims)
    return _reduced(_smallest, x, axis, keepdims, few_are_numpys=True)


def _places(place: Callable[..., Any], sign: int) -> Reduce:
    def reduce(x: Array, found: Plan) -> Array:
        if found.rows:
            return _row_places(x, place, sign).reshape(found.shape)
        partial, places = np.empty(found.partial, x.dtype), np.empty(found.partial, np.intp)
        _run("places", x, found, x.dtype.type(sign), partial, places)
        first = np.argmax(partial, axis=1, keepdims=True)  # the first piece that has it; NaN wins here too
        return np.take_along_axis(places, first, 1).reshape(found.shape)

    return reduce


_place_of_largest, _place_of_smallest = _places(np.argmax, 1), _places(np.argmin, -1)


def _place(reduce: Reduce, x: Array, axis: int | None, keepdims: bool) -> Any:
    if isinstance(axis, tuple) or _left_to_numpy(x, axis):
        return NotImplemented
    return _reduced(reduce, np.ascontiguousarray(x) if axis is None else x, axis, keepdims)


@kernel("argmax", "cpu")
def argmax(x: Array, *, axis: int | None = None, keepdims: bool = False) -> Any:
    """Index of the largest element along `axis`, the first in a tie, or the first NaN; int64."""
    return _place(_place_of_largest, x, axis, keepdims)


@kernel("argmin", "cpu")
def argmin(x: Array, *, axis: int | None = None, keepdims: bool = False) -> Any:
    """Index of the smallest element along `axis`, the first in a tie, or the first NaN; int64."""
    return _place(_place_of_smallest, x, axis, keepdims)
