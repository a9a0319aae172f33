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

# Up to this many elements NumPy's own sum or extreme is faster. A variance takes several NumPy calls, so small ones use
# the loops too, and import Numba.
SMALL = 1 << 12

# Columns of fewer terms, in large arrays, have moments and extremes faster in NumPy. Measured: the variance of
# (20000, 2, 10) over axis 1 takes 17 ms here and 7 ms in NumPy; that of (5000, 8, 40) takes 7 and 9 ms.
FEW = 8

# NumPy's reductions without the keyword handling of np.sum, np.max and np.min.
ADD: Any = np.add.reduce
MAXIMUM: Any = np.maximum.reduce
MINIMUM: Any = np.minimum.reduce

# ---- plans -----------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How arrays of one shape are reduced over some axes."""

    rows: bool  # rows are reduced, not columns
    view: tuple[int, ...]  # shape of x for the loop: (M, D) or (A, B, C)
    outer: tuple[int, ...]  # rows: the M rows as (A, B, C), where B is reduced too
    transposed: tuple[int, ...]  # permutation of x's axes before the view, which copies x; empty for none
    shape: tuple[int, ...]  # of the result
    terms: int  # elements per element of the result
    cut: tuple[int, ...]  # rows: (elements of a piece,); columns: (rows, columns, folded rows) of a piece
    items: int  # number of pieces
    partial: tuple[int, ...]  # shape of the partial results: (M, pieces) or (A, pieces of B, C)
    pieces: tuple[int, ...]  # the same; for rows (A, B, C, pieces)
    over: tuple[int, ...]  # axes of `pieces` to combine; empty for none


@lru_cache(maxsize=4096)
def plan(shape: tuple[int, ...], axis: Axis, keepdims: bool) -> Plan | None:
    """How to reduce C-contiguous arrays of `shape`; None if NumPy has to do it."""
    given = tuple(range(len(shape))) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    if 0 in shape or not given or not all(isinstance(a, int) and -len(shape) <= a < len(shape) for a in given):
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
    m, pieces = math.prod(outer), -(-d // PIECE)
    return Plan(
        rows=True,
        view=(m, d),
        outer=outer,
        transposed=transposed,
        shape=shape,
        terms=terms,
        cut=(PIECE,),
        items=m * pieces,
        partial=(m, pieces),
        pieces=(*outer, pieces),
        over=(1, 3) if outer[1] > 1 or pieces > 1 else (),
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
        outer=(),
        transposed=(),
        shape=shape,
        terms=terms,
        cut=(rows, columns, fold),
        items=a * pieces * -(-c // columns),
        partial=(a, pieces, c),
        pieces=(a, pieces, c),
        over=(1,) if pieces > 1 else (),
    )


Reduce = Callable[[Array, Plan], Any]


def _reduced(reduce: Reduce, x: Array, axis: Axis, keepdims: bool, decline_few: bool = False) -> Any:
    """Call `reduce(x in the plan's view, plan)`; with `decline_few` NotImplemented for columns of FEW terms."""
    if x.dtype.char not in "fd" or not (axis is None or type(axis) is int or type(axis) is tuple):
        return NotImplemented
    found = plan(x.shape, axis, keepdims)
    if found is None:
        return NotImplemented
    if not x.flags.c_contiguous:
        return _reduced_in_memory_order(reduce, x, axis, found, decline_few)
    if decline_few and x.size > SMALL and not found.rows and found.view[1] < FEW:
        return NotImplemented
    return reduce(compiled(x.transpose(found.transposed) if found.transposed else x).reshape(found.view), found)


def _reduced_in_memory_order(reduce: Reduce, x: Array, axis: Axis, found: Plan, decline_few: bool) -> Any:
    """Reduce with the axes in memory order, so that a transposed array is not copied."""
    order = sorted(range(x.ndim), key=lambda i: -x.strides[i])
    axes = range(x.ndim) if axis is None else np.atleast_1d(axis) % x.ndim
    inner = tuple(sorted(order.index(int(a)) for a in axes))
    result = _reduced(reduce, np.ascontiguousarray(x.transpose(order)), inner, True, decline_few)
    if result is NotImplemented:
        return result
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
    split(_loop(loop, found.rows), found.items, READING_COST * x.size, x, *found.cut, *args)


# ---- sums ------------------------------------------------------------------------------------------------


def _sums(x: Array, found: Plan) -> Array:
    """Sums in float64, in the result's shape."""
    partial = np.empty(found.partial)
    _run("sums", x, found, partial)
    if found.over:
        partial = ADD(partial.reshape(found.pieces), found.over)
    return partial.reshape(found.shape)


def _summed(x: Array, axis: Axis, keepdims: bool) -> Any:
    """Sums in float64."""
    if x.dtype.char not in "fd":
        return NotImplemented
    return _reduced(_sums, x, axis, keepdims) if x.size > SMALL else ADD(x, axis, np.float64, None, keepdims)


@kernel("sum", "cpu")
def sum_(x: Array, *, axis: Axis = None, keepdims: bool = False) -> Any:
    """Sum over `axis`, computed in float64, in x's dtype."""
    total = _summed(x, axis, keepdims)
    return total if total is NotImplemented else total.astype(x.dtype)


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
    total = _summed(x, axis, keepdims)
    if total is NotImplemented or not x.size:
        return NotImplemented
    return (total / (x.size // total.size)).astype(x.dtype)


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
    between = found.outer[1:] if found.rows else ()  # to find the shift of a row
    _run("moments", x, found, *between, shift, partial)
    if found.over:
        partial = ADD(partial.reshape(2, *found.pieces), tuple([i + 1 for i in found.over]))
    return partial.reshape(2, -1)


def _shifted(x: Array, found: Plan) -> tuple[Array, Array]:
    """Mean and biased variance in float64, in the result's shape."""
    if found.rows and not found.over:
        shift = np.full(len(x), np.nan)  # the loop sets it to the row's first element
    else:
        first = x[:, 0].reshape(found.outer) if found.rows else x
        shift = first[:, 0].astype(np.float64).reshape(-1)
        _loop("make_finite")(shift)  # an infinite shift would make the mean NaN
    var = np.empty(shift.shape)
    if not _loop("settle")(_moments(x, found, shift), found.terms, shift, var):
        _loop("make_finite")(shift)
        _loop("settle")(_moments(x, found, shift), found.terms, shift, var)
    return shift.reshape(found.shape), var.reshape(found.shape)


def _mean_and_var(x: Array, axis: Axis, keepdims: bool, correction: float) -> Any:
    """Mean and variance in float64."""
    found = _reduced(_shifted, x, axis, keepdims, decline_few=True)
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
    found = _mean_and_var(x, axis, keepdims, correction)
    return found if found is NotImplemented else np.stack(found).astype(x.dtype, copy=False)


@kernel("var", "cpu")
def var(x: Array, *, axis: Axis = None, keepdims: bool = False, correction: float = 0) -> Any:
    """Variance over `axis`, Σ(x − mean)² / (n − correction), from float64 sums, in x's dtype."""
    found = _mean_and_var(x, axis, keepdims, correction)
    return found if found is NotImplemented else found[1].astype(x.dtype, copy=False)


@kernel("std", "cpu")
def std(x: Array, *, axis: Axis = None, keepdims: bool = False, correction: float = 0) -> Any:
    """Square root of the variance, taken in float64, in x's dtype."""
    found = _mean_and_var(x, axis, keepdims, correction)
    return found if found is NotImplemented else np.sqrt(found[1]).astype(x.dtype, copy=False)


@kernel("var.vjp", "cpu")
def var_vjp(
    g: Array, y: Array, x: Array, *, needs: list[bool], axis: Axis = None, keepdims: bool = False, correction: float = 0
) -> Any:
    """2 g (x − mean) / (n − correction), in float64."""
    total = _summed(x, axis, keepdims)
    if total is NotImplemented or not x.size or x.size // total.size <= correction:
        return NotImplemented
    n = x.size // total.size
    each = np.divide(2 * g.astype(np.float64), n - correction)
    each = np.where(y == y, each, y)  # with an infinite element the gradient of all is NaN, as the variance is
    return _centred(x, total / n, each, axis, keepdims)


@kernel("std.vjp", "cpu")
def std_vjp(
    g: Array, y: Array, x: Array, *, needs: list[bool], axis: Axis = None, keepdims: bool = False, correction: float = 0
) -> Any:
    """g (x − mean) / ((n − correction) · std), in float64; 0 where the standard deviation is 0."""
    found = _mean_and_var(x, axis, keepdims, correction)
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
    result = _reduced(_squares, x, axis, keepdims, decline_few=True)
    return result if result is NotImplemented else result.astype(x.dtype, copy=False)


def _squares(x: Array, found: Plan) -> Array:
    return _moments(x, found, np.zeros(math.prod(found.shape)))[1].reshape(found.shape)


@kernel("squared_norm", "cpu")
def sum_of_all_squares(x: Array) -> Any:
    """Σ x² over all elements, in float64."""
    return _reduced(_squares, x, None, False)


# ---- extremes --------------------------------------------------------------------------------------------
# On one thread NumPy reduces rows at the speed of memory, but not columns. The minimum is −max(−x). NaN wins, as in
# NumPy: `v > best or v != v` is true for NaN, and no number is greater.


def _use_numpy(x: Array, axis: Axis) -> bool:
    """Whether x is small, or reduced along rows and too small for threads."""
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


def _row_indices(x: Array, arg: Callable[..., Any], sign: int) -> Array:
    """The index of the extreme of each row of x (M, D)."""
    if READING_COST * x.size < threads.PARALLEL_FROM:
        return arg(x, axis=1)
    if len(x) == 1 and x.size >= 4 * PIECE:
        rows = np.split(x[0], range(PIECE, x.size, PIECE))
        body, tail = x[0, : PIECE * (len(rows) - 1)].reshape(-1, PIECE), rows[-1]
        indices = np.append(_row_indices(body, arg, sign), arg(tail))
        piece = arg([row[i] for row, i in zip(rows, indices, strict=True)])  # the first piece that has it
        return np.asarray([piece * PIECE + indices[piece]])
    out = np.empty(len(x), np.intp)
    split(_loop("row_indices"), len(x), READING_COST * x.size, compiled(x), x.dtype.type(sign), out)
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
    if _use_numpy(x, axis):
        return MAXIMUM(x, axis, None, None, keepdims)
    return _reduced(_largest, x, axis, keepdims, decline_few=True)


@kernel("min", "cpu")
def min_(x: Array, *, axis: Axis = None, keepdims: bool = False) -> Any:
    """Smallest element over `axis`; NaN if there is one."""
    if _use_numpy(x, axis):
        return MINIMUM(x, axis, None, None, keepdims)
    return _reduced(_smallest, x, axis, keepdims, decline_few=True)


def _indices(arg: Callable[..., Any], sign: int) -> Reduce:
    def reduce(x: Array, found: Plan) -> Array:
        if found.rows:
            return _row_indices(x, arg, sign).reshape(found.shape)
        partial, indices = np.empty(found.partial, x.dtype), np.empty(found.partial, np.intp)
        _run("indices", x, found, x.dtype.type(sign), partial, indices)
        first = np.argmax(partial, axis=1, keepdims=True)  # the first piece that has it; NaN wins here too
        return np.take_along_axis(indices, first, 1).reshape(found.shape)

    return reduce


_index_of_largest, _index_of_smallest = _indices(np.argmax, 1), _indices(np.argmin, -1)


def _index(reduce: Reduce, x: Array, axis: int | None, keepdims: bool) -> Any:
    if isinstance(axis, tuple) or _use_numpy(x, axis):
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
