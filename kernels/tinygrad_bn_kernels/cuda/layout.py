"""Shapes and indexing: copies between strided views, gather and scatter.

Device arrays are contiguous, so most of NumPy's views are copies here; only `reshape` and slices of the first axis are
views.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tinygrad_bn_kernels import kernel
from tinygrad_bn_kernels.cuda import maps
from tinygrad_bn_kernels.cuda.array import DeviceArray
from tinygrad_bn_kernels.cuda.launch import blocks, launch, program, u4
from tinygrad_bn_kernels.cuda.shim import cuda, uint32
from tinygrad_bn_kernels.cuda.strides import broadcast, contiguous, row_block, walks

Array = NDArray[Any]
Shape = tuple[int, ...]

# ---- programs --------------------------------------------------------------------------------------------


@program("copy.rows", "f4* f4* u4 u4 u4 u4 u4 u4 u4 u4 u4 u4 u4 u4 u4 u4", block=(32, 8))
def COPY(T: Any) -> Callable[..., None]:
    """Copy between two strided views of four axes."""

    def copy(a, out, count, n1, n2, n3, a_start, a0, a1, a2, a3, o_start, o0, o1, o2, o3):
        row = uint32(cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y)
        while row < count:
            outer = uint32(row // n2)
            i2 = uint32(row - outer * n2)
            i0 = uint32(outer // n1)
            i1 = uint32(outer - i0 * n1)
            i = uint32(a_start + i0 * a0 + i1 * a1 + i2 * a2)
            j = uint32(o_start + i0 * o0 + i1 * o1 + i2 * o2)
            k = uint32(cuda.threadIdx.x)
            while k < n3:
                out[uint32(j + k * o3)] = a[uint32(i + k * a3)]
                k = uint32(k + cuda.blockDim.x)
            row = uint32(row + cuda.gridDim.x * cuda.blockDim.y)

    return copy


TILE = 32
TILE_ROWS = 8
TILE_SIZE = TILE * (TILE + 1)


@program("transpose", "f4* f4* u4 u4 u4 u4", block=(TILE, TILE_ROWS), shared=4 * TILE_SIZE)
def TRANSPOSE(T: Any) -> Callable[..., None]:
    """Transpose `count` matrices (rows, columns) by tiles, so that reads and writes are both along rows.

    The tile has one unused column, so that the elements of a column lie in 32 different banks.
    """

    def transpose(a, out, rows, columns, across, count):
        tile = cuda.shared.array(TILE_SIZE, T)
        x, y = uint32(cuda.threadIdx.x), uint32(cuda.threadIdx.y)
        tiles = uint32(across * uint32((rows + uint32(TILE - 1)) // uint32(TILE)))
        block = uint32(cuda.blockIdx.x)
        while block < uint32(tiles * count):
            matrix = uint32(block // tiles)
            place = uint32(block - matrix * tiles)
            top = uint32(place // across)
            left = uint32((place - top * across) * uint32(TILE))
            top = uint32(top * uint32(TILE))
            start = uint32(matrix * rows * columns)
            i = y
            while i < uint32(TILE):
                if top + i < rows and left + x < columns:
                    tile[uint32(i * uint32(TILE + 1) + x)] = a[uint32(start + (top + i) * columns + left + x)]
                i = uint32(i + uint32(TILE_ROWS))
            cuda.syncthreads()
            i = y
            while i < uint32(TILE):
                if left + i < columns and top + x < rows:
                    out[uint32(start + (left + i) * rows + top + x)] = tile[uint32(x * uint32(TILE + 1) + i)]
                i = uint32(i + uint32(TILE_ROWS))
            cuda.syncthreads()
            block = uint32(block + cuda.gridDim.x)

    return transpose


@program("gather", "f4* i8* f4* u4 u4 u4", block=(32, 8))
def GATHER(T: Any) -> Callable[..., None]:
    """out[i, j] = a[index[i], j]: a (limit, width), out (n, width); NaN, or 0 for integers, if out of range."""
    outside = T(math.nan) if str(T).startswith("float") else T(0)

    def gather(a, index, out, n, width, limit):
        row = uint32(cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y)
        while row < n:
            at = index[row]
            inside = at >= 0 and at < limit
            j = uint32(cuda.threadIdx.x)
            while j < width:
                out[uint32(row * width + j)] = a[uint32(uint32(at) * width + j)] if inside else outside
                j = uint32(j + cuda.blockDim.x)
            row = uint32(row + cuda.gridDim.x * cuda.blockDim.y)

    return gather


@program("scatter_add", "f4* i8* f4* u4 u4 u4", block=(32, 8))
def SCATTER_ADD(T: Any) -> Callable[..., None]:
    """out[index[i], j] += x[i, j], in any order; indices out of range are skipped."""

    def scatter_add(x, index, out, n, width, limit):
        row = uint32(cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y)
        while row < n:
            at = index[row]
            if at >= 0 and at < limit:
                j = uint32(cuda.threadIdx.x)
                while j < width:
                    cuda.atomic.add(out, uint32(uint32(at) * width + j), x[uint32(row * width + j)])
                    j = uint32(j + cuda.blockDim.x)
            row = uint32(row + cuda.gridDim.x * cuda.blockDim.y)

    return scatter_add


# ---- strided copies --------------------------------------------------------------------------------------


class View(NamedTuple):
    """A strided view of an array: shape, first element, and steps in elements."""

    shape: Shape
    start: int
    steps: Shape


def _whole(shape: Shape) -> View:
    """The view of all elements of a contiguous array."""
    return View(tuple(shape), 0, contiguous(shape))


def copy_between(source: DeviceArray, from_: View, out: DeviceArray, to: View) -> None:
    """Copy a view of `source` to a view of `out` of the same shape."""
    if not math.prod(to.shape):
        return
    for walk in walks(to.shape, (from_.start, to.start), (from_.steps, to.steps)):
        block = row_block(walk.shape[-1])
        views = [n for start, steps in zip(walk.starts, walk.steps, strict=True) for n in (start, *steps)]
        numbers = u4(walk.rows, *walk.shape[1:], *views)
        launch(COPY, blocks(walk.rows, block[1]), source, out, *numbers, block=block)


def materialize(x: DeviceArray, view: View) -> DeviceArray:
    """A contiguous copy of a view."""
    out = DeviceArray(view.shape, x.dtype)
    copy_between(x, view, out, _whole(view.shape))
    return out


@kernel("reshape", "cuda")
def reshape(x: DeviceArray, *, shape: int | Shape) -> DeviceArray:
    """A view in another shape."""
    return x.reshape(shape)


def _order(axes: Shape | None, ndim: int) -> Shape:
    if axes is None:
        return tuple(reversed(range(ndim)))
    order = tuple(operator.index(a) + ndim * (operator.index(a) < 0) for a in axes)
    if sorted(order) != list(range(ndim)):
        raise ValueError(f"axes {axes} are not a permutation of {ndim} axes")
    return order


@kernel("transpose", "cuda")
def transpose(x: DeviceArray, *, axes: Shape | None = None) -> DeviceArray:
    """A copy with its axes permuted."""
    order = _order(axes, x.ndim)
    shape, steps = tuple(x.shape[a] for a in order), contiguous(x.shape)
    moved = [a for a in order if x.shape[a] != 1]
    if moved == sorted(moved):  # only axes of length 1 move
        return x.view(shape)
    swap = _as_swap(moved, x.shape)
    if swap is None or not x.size:
        return materialize(x, View(shape, 0, tuple(steps[a] for a in order)))
    out = DeviceArray(shape, x.dtype)
    count, rows, columns = swap
    across, down = -(-columns // TILE), -(-rows // TILE)
    launch(TRANSPOSE, blocks(across * down * count, 1), x, out, *u4(rows, columns, across, count))
    return out


def _as_swap(moved: list[int], shape: Shape) -> tuple[int, int, int] | None:
    """(count, rows, columns) of the matrices that the permutation transposes; None if it is not a transposition."""
    kept = sorted(moved)
    lead = next(i for i, (a, b) in enumerate(zip(moved, kept, strict=True)) if a != b)
    tail, sorted_tail = moved[lead:], kept[lead:]
    for k in range(1, len(tail)):
        if tail == sorted_tail[k:] + sorted_tail[:k]:
            lengths = [math.prod(shape[a] for a in part) for part in (kept[:lead], sorted_tail[:k], sorted_tail[k:])]
            return lengths[0], lengths[1], lengths[2]
    return None


@kernel("broadcast_to", "cuda")
def broadcast_to(x: DeviceArray, *, shape: Shape) -> DeviceArray:
    """A copy, broadcast to `shape`."""
    if np.broadcast_shapes(x.shape, shape) != tuple(shape):
        raise ValueError(f"an array of shape {x.shape} does not broadcast to {tuple(shape)}")
    return materialize(x, View(tuple(shape), 0, broadcast(x.shape, tuple(shape))))


def _along(out: DeviceArray, axis: int, start: int, length: int) -> View:
    """The view of `length` elements of an array along an axis."""
    steps = contiguous(out.shape)
    return View((*out.shape[:axis], length, *out.shape[axis + 1 :]), start * steps[axis], steps)


@kernel("concatenate", "cuda")
def concatenate(*xs: DeviceArray, axis: int = 0) -> DeviceArray:
    """Join arrays along an axis."""
    maps.check(*xs)
    first, dtype = xs[0], np.result_type(*(x.dtype for x in xs))
    axis = operator.index(axis) + first.ndim * (axis < 0)
    rest = {(*x.shape[:axis], *x.shape[axis + 1 :]) for x in xs}
    if not 0 <= axis < first.ndim or len(rest) > 1:
        raise ValueError(f"arrays of shapes {[x.shape for x in xs]} cannot be joined along axis {axis}")
    total = sum(x.shape[axis] for x in xs)
    out = DeviceArray((*first.shape[:axis], total, *first.shape[axis + 1 :]), dtype)
    start = 0
    for x in xs:
        x = x.astype(dtype, copy=False)
        copy_between(x, _whole(x.shape), out, _along(out, axis, start, x.shape[axis]))
        start += x.shape[axis]
    return out


@kernel("stack", "cuda")
def stack(*xs: DeviceArray, axis: int = 0) -> DeviceArray:
    """Join arrays of one shape along a new axis."""
    axis = operator.index(axis) + (xs[0].ndim + 1) * (axis < 0)
    return concatenate(*(x.reshape((*x.shape[:axis], 1, *x.shape[axis:])) for x in xs), axis=axis)


@kernel("pad", "cuda")
def pad(x: DeviceArray, *, width: tuple[tuple[int, int], ...], value: float = 0.0) -> DeviceArray:
    """A border of `value` around x."""
    if np.shape(width) != ((x.ndim, 2) if x.ndim else (0,)):
        raise ValueError(f"width must have a pair (before, after) for each of {x.ndim} axes; got {width}")
    shape = tuple(n + before + after for n, (before, after) in zip(x.shape, width, strict=True))
    out, steps = maps.fill(DeviceArray(shape, x.dtype), value), contiguous(shape)
    start = sum(before * s for (before, _), s in zip(width, steps, strict=True))
    copy_between(x, _whole(x.shape), out, View(x.shape, start, steps))
    return out


# ---- indexing --------------------------------------------------------------------------------------------


def _entries(shape: Shape, index: Any) -> list[Any]:
    """One entry for each axis, and None for each new axis; a mask becomes the indices where it is true."""
    parts: list[Any] = []
    for part in index if isinstance(index, tuple) else (index,):
        if isinstance(part, list | tuple):
            part = np.asarray(part, None if len(part) else np.intp)
        if isinstance(part, DeviceArray) and part.dtype == bool:
            part = part.numpy()  # the number of true elements determines the shape
        if isinstance(part, np.ndarray) and part.dtype == bool:
            parts += list(np.nonzero(part))
        elif part is None or part is Ellipsis or isinstance(part, slice) or _is_number(part) or _is_array(part):
            parts.append(part)
        else:
            raise IndexError(f"an index must be a number, a slice, an array, None or ...; got {part!r}")
    used = sum(p is not None and p is not Ellipsis for p in parts)
    if used > len(shape):
        raise IndexError(f"{used} indices for an array of {len(shape)} axes")
    if not any(p is Ellipsis for p in parts):
        parts.append(Ellipsis)
    at = next(i for i, p in enumerate(parts) if p is Ellipsis)
    return parts[:at] + [slice(None)] * (len(shape) - used) + parts[at + 1 :]


def _basic(shape: Shape, entries: list[Any]) -> View:
    """The view selected by numbers, slices and new axes; entries that are arrays select their whole axis."""
    own, start, lengths, steps, axis = contiguous(shape), 0, [], [], 0
    for entry in entries:
        if entry is None:
            lengths.append(1)
            steps.append(0)
            continue
        if isinstance(entry, slice):
            first, stop, step = entry.indices(shape[axis])
            lengths.append(len(range(first, stop, step)))
            steps.append(step * own[axis])
            start += first * own[axis] if lengths[-1] else 0
        elif _is_number(entry):
            if not -shape[axis] <= entry < shape[axis]:
                raise IndexError(f"index {entry} is out of bounds for axis {axis} of length {shape[axis]}")
            start += (int(entry) % shape[axis]) * own[axis]
        else:
            lengths.append(shape[axis])
            steps.append(own[axis])
        axis += 1
    return View(tuple(lengths), start, tuple(steps))


def _is_number(entry: Any) -> bool:
    return isinstance(entry, int | np.integer) and not isinstance(entry, bool)


def _is_array(entry: Any) -> bool:
    return isinstance(entry, np.ndarray | DeviceArray)


def _flat_index(shape: Shape, entries: list[Any]) -> tuple[Shape, Any]:
    """For index arrays of the leading axes of `shape`: their broadcast shape, and flat indices."""
    arrays = [e for e in entries if _is_array(e)]
    common = np.broadcast_shapes(*(a.shape for a in arrays))
    total: Any = 0
    for n, entry in zip(shape, entries, strict=False):
        if isinstance(entry, np.ndarray):
            if entry.dtype.kind not in "iu":
                raise IndexError(f"an index must have an integer or boolean dtype; got {entry.dtype}")
            if entry.size and not (entry.min() >= -n and entry.max() < n):
                raise IndexError(f"an index is out of bounds for an axis of length {n}")
            place: Any = np.where(entry < 0, entry + n, entry)
        else:
            if entry.dtype.kind not in "iu":
                raise IndexError(f"an index must have an integer or boolean dtype; got {entry.dtype}")
            entry = entry.astype(np.int64, copy=False)
            # An index out of range becomes a flat index out of range: raising an error would wait for the device.
            inside = maps.mul(entry >= -n, entry < n)
            place = maps.where(inside, maps.where(entry < 0, entry + n, entry), -(1 << 31))
        if isinstance(total, DeviceArray) and isinstance(place, np.ndarray):
            place = DeviceArray.from_numpy(np.asarray(place, np.int64))
        elif isinstance(place, DeviceArray) and isinstance(total, np.ndarray):
            total = DeviceArray.from_numpy(np.asarray(total, np.int64))
        total = total * n + place
    if isinstance(total, DeviceArray):
        return common, broadcast_to(total.astype(np.int64, copy=False), shape=common)
    return common, DeviceArray.from_numpy(np.broadcast_to(np.asarray(total, np.int64), common))


class _Gather(NamedTuple):
    """Indexing with arrays: basic indexing, then a permutation, then a gather along the first axes."""

    view: View  # selected by the basic indices
    order: Shape  # of its axes: axes indexed by arrays first
    arrays: int  # number of axes indexed by arrays
    lead: Shape  # the shape that replaces them
    positions: DeviceArray
    at: int  # the position of `lead` among the other axes of the result


def _gather_plan(shape: Shape, entries: list[Any]) -> _Gather:
    # In an index with arrays, a number is a 0-d array.
    entries = [np.asarray(e) if isinstance(e, int | np.integer) and e is not None else e for e in entries]
    view = _basic(shape, entries)
    indexed = [i for i, e in enumerate(entries) if _is_array(e)]
    others = [i for i in range(len(entries)) if i not in indexed]
    lead, positions = _flat_index(tuple(view.shape[i] for i in indexed), [entries[i] for i in indexed])
    together = indexed == list(range(indexed[0], indexed[-1] + 1))
    at = sum(i < indexed[0] for i in others) if together else 0
    return _Gather(view, (*indexed, *others), len(indexed), lead, positions, at)


def _with_lead_at(lead: int, at: int, rest: int) -> Shape:
    """The permutation that moves the first `lead` axes behind `at` of the other `rest` axes."""
    others = range(lead, lead + rest)
    return (*others[:at], *range(lead), *others[at:])


@kernel("getitem", "cuda")
def getitem(x: DeviceArray, *, index: Any) -> DeviceArray:
    """x[index] by NumPy's rules. A device index out of range gives NaN."""
    entries = _entries(x.shape, index)
    if not any(map(_is_array, entries)):
        view = _basic(x.shape, entries)
        if view.steps == contiguous(view.shape) or math.prod(view.shape) == x.size == 1:
            return x.view(view.shape, view.start)
        return materialize(x, view)
    plan = _gather_plan(x.shape, entries)
    basic = x if plan.view == _whole(x.shape) else materialize(x, plan.view)
    table = transpose(basic, axes=plan.order)
    limit, rest = math.prod(table.shape[: plan.arrays]), table.shape[plan.arrays :]
    out, width = DeviceArray((*plan.lead, *rest), x.dtype), math.prod(rest)
    if out.size:
        numbers = u4(plan.positions.size, width, limit)
        block = row_block(width)
        launch(GATHER, blocks(plan.positions.size, block[1]), table, plan.positions, out, *numbers, block=block)
    return transpose(out, axes=_with_lead_at(len(plan.lead), plan.at, len(rest)))


@kernel("scatter_add", "cuda")
def scatter_add(x: DeviceArray, *, index: Any, shape: Shape) -> DeviceArray:
    """Zeros of `shape` with x added at `index`; repeated indices are added in no fixed order."""
    entries = _entries(shape, index)
    if not any(map(_is_array, entries)):
        out, view = maps.fill(DeviceArray(shape, x.dtype), 0), _basic(shape, entries)
        copy_between(x, View(view.shape, 0, broadcast(x.shape, view.shape)), out, view)
        return out
    plan = _gather_plan(shape, entries)
    sizes = tuple(plan.view.shape[i] for i in plan.order)
    rest = sizes[plan.arrays :]
    width = math.prod(rest)
    order = _with_lead_at(len(plan.lead), plan.at, len(rest))
    given = broadcast_to(x, shape=tuple((*plan.lead, *rest)[i] for i in order))
    values = transpose(given, axes=tuple(np.argsort(order)))
    table = maps.fill(DeviceArray(sizes, x.dtype), 0)
    if values.size:
        numbers, block = u4(plan.positions.size, width, math.prod(sizes[: plan.arrays])), row_block(width)
        launch(SCATTER_ADD, blocks(plan.positions.size, block[1]), values, plan.positions, table, *numbers, block=block)
    back = transpose(table, axes=tuple(np.argsort(plan.order)))
    if plan.view == _whole(shape):
        return back
    out = maps.fill(DeviceArray(shape, x.dtype), 0)
    copy_between(back, _whole(back.shape), out, plan.view)
    return out
