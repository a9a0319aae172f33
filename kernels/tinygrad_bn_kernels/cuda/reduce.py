"""Reductions over any axes: sum, sum of squares, max, min, argmax and argmin.

Adjacent axes that are all reduced, or all kept, are merged. This gives x the shape (A, R, B), reduced over R: *rows* if
B is 1, each reduced by a warp or a block, else *columns*, adjacent columns in adjacent lanes. Reduced axes that are not
adjacent are reduced one after the other, the longest first. Long reductions are split into parts, which a second launch
combines.

Sums use the precision of the array, in a tree: the error grows with the logarithm of the length.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from itertools import groupby
from typing import Any

import numpy as np

from tinygrad_bn_kernels import kernel
from tinygrad_bn_kernels.cuda import maps
from tinygrad_bn_kernels.cuda.array import DeviceArray
from tinygrad_bn_kernels.cuda.launch import PROGRAMS, blocks, driver, launch, program, u4
from tinygrad_bn_kernels.cuda.layout import transpose
from tinygrad_bn_kernels.cuda.scalars import SAME
from tinygrad_bn_kernels.cuda.shim import cuda, device, uint32
from tinygrad_bn_kernels.cuda.warps import THREADS, WARPS, block_reduce, warp_reduce

Axis = int | tuple[int, ...] | None
Shape = tuple[int, ...]

# The longest row that one warp reduces.
SHORT = 1024

# Fewest elements of a part: of a row, and of a column.
ROW_PART = 8192
COLUMN_PART = 256

LANES = 32
GROUPS = 8  # rows of threads in a block that reduces columns


# ---- programs --------------------------------------------------------------------------------------------


def _least(T: Any) -> Any:
    name = str(T)
    return -math.inf if name.startswith("float") else 0 if name.startswith(("u", "b")) else np.iinfo(name).min


def _most(T: Any) -> Any:
    return math.inf if str(T).startswith("float") else 1 if str(T).startswith("b") else np.iinfo(str(T)).max


# For each reduction: the function that combines two values, its initial value, and the function of each element.
COMBINE: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any], Callable[[Any], Any]]] = {
    "sum": (SAME["add"], lambda T: 0, SAME["identity"]),
    "sum_of_squares": (SAME["add"], lambda T: 0, lambda T: lambda x: x * x),
    "max": (SAME["maximum"], _least, SAME["identity"]),
    "min": (SAME["minimum"], _most, SAME["identity"]),
}


def _short_rows(name: str) -> Callable[[Any], Callable[..., None]]:
    combine_of, start_of, each_of = COMBINE[name]

    def build(T: Any) -> Callable[..., None]:
        combine, start, each = device(combine_of(T)), T(start_of(T)), device(each_of(T))
        over = warp_reduce(combine)

        def short_rows(x, out, rows, length):
            row = uint32(cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y)
            while row < rows:
                value = start
                i = uint32(cuda.threadIdx.x)
                while i < length:
                    value = combine(value, each(x[uint32(row * length + i)]))
                    i = uint32(i + uint32(LANES))
                value = over(value)
                if cuda.threadIdx.x == 0:
                    out[row] = value
                row = uint32(row + cuda.gridDim.x * cuda.blockDim.y)

        return short_rows

    return build


def _rows(name: str) -> Callable[[Any], Callable[..., None]]:
    combine_of, start_of, each_of = COMBINE[name]

    def build(T: Any) -> Callable[..., None]:
        combine, start, each = device(combine_of(T)), T(start_of(T)), device(each_of(T))
        over = block_reduce(combine)

        def rows(x, out, count, length, parts, part):
            shared = cuda.shared.array(WARPS, T)
            block = uint32(cuda.blockIdx.x)
            while block < uint32(count * parts):
                row = uint32(block // parts)
                first = uint32((block - row * parts) * part)
                last = uint32(min(uint32(first + part), length))
                value = start
                i = uint32(first + cuda.threadIdx.x)
                while i < last:
                    value = combine(value, each(x[uint32(row * length + i)]))
                    i = uint32(i + uint32(THREADS))
                value = over(value, shared)
                if cuda.threadIdx.x == 0:
                    out[block] = value
                block = uint32(block + cuda.gridDim.x)

        return rows

    return build


TILE = LANES * GROUPS


def _columns(name: str) -> Callable[[Any], Callable[..., None]]:
    combine_of, start_of, each_of = COMBINE[name]

    def build(T: Any) -> Callable[..., None]:
        combine, start, each = device(combine_of(T)), T(start_of(T)), device(each_of(T))

        def columns(x, out, work, length, width, parts, part, tiles):
            shared = cuda.shared.array(TILE, T)
            lane, group = uint32(cuda.threadIdx.x), uint32(cuda.threadIdx.y)
            place = uint32(group * uint32(LANES) + lane)
            block = uint32(cuda.blockIdx.x)
            while block < work:
                piece = uint32(block // tiles)
                column = uint32((block - piece * tiles) * uint32(LANES) + lane)
                outer = uint32(piece // parts)
                row = uint32((piece - outer * parts) * part)
                last = uint32(min(uint32(row + part), length))
                value = start
                row = uint32(row + group)
                if column < width:
                    while row < last:
                        value = combine(value, each(x[uint32((outer * length + row) * width + column)]))
                        row = uint32(row + uint32(GROUPS))
                shared[place] = value
                cuda.syncthreads()
                if group == 0 and column < width:
                    for g in range(1, GROUPS):
                        value = combine(value, shared[uint32(uint32(g) * uint32(LANES) + lane)])
                    out[uint32(piece * width + column)] = value
                cuda.syncthreads()
                block = uint32(block + cuda.gridDim.x)

        return columns

    return build


for _name in COMBINE:
    program(f"{_name}.short", "f4* f4* u4 u4", block=(LANES, GROUPS), shuffles=5)(_short_rows(_name))
    program(f"{_name}.rows", "f4* f4* u4 u4 u4 u4", block=THREADS, shared=4 * WARPS, shuffles=8)(_rows(_name))
    program(f"{_name}.columns", "f4* f4* u4 u4 u4 u4 u4 u4", block=(LANES, GROUPS), shared=4 * TILE)(_columns(_name))


def _places(largest: bool) -> Callable[[Any], Callable[..., None]]:
    def build(T: Any) -> Callable[..., None]:
        @device
        def better(a, i, b, j):
            """Whether b at j wins over a at i: NaN wins, and among equal values the first."""
            if a != a or b != b:
                return b != b and (a == a or j < i)
            if a == b:
                return j < i
            return b > a if largest else b < a

        def places(x, out, count, length):
            values, where = cuda.shared.array(THREADS, T), cuda.shared.array(THREADS, uint32)
            thread = uint32(cuda.threadIdx.x)
            row = uint32(cuda.blockIdx.x)
            while row < count:
                start = uint32(row * length)
                best, at = x[start], uint32(0)
                i = thread
                while i < length:
                    v = x[uint32(start + i)]
                    if better(best, at, v, i):
                        best, at = v, i
                    i = uint32(i + uint32(THREADS))
                values[thread], where[thread] = best, at
                cuda.syncthreads()
                half = uint32(THREADS // 2)
                while half > uint32(0):
                    if thread < half:
                        other = uint32(thread + half)
                        if better(values[thread], where[thread], values[other], where[other]):
                            values[thread], where[thread] = values[other], where[other]
                    cuda.syncthreads()
                    half = uint32(half >> uint32(1))
                if thread == uint32(0):
                    out[row] = where[0]
                row = uint32(row + cuda.gridDim.x)

        return places

    return build


ARGMAX = program("argmax", "f4* i8* u4 u4", shared=8 * THREADS)(_places(True))
ARGMIN = program("argmin", "f4* i8* u4 u4", shared=8 * THREADS)(_places(False))

# ---- axes and parts --------------------------------------------------------------------------------------


def normalized(axis: Axis, ndim: int) -> Shape:
    """The axes as a sorted tuple of numbers from 0 on. Raises ValueError if one is out of range or repeated."""
    given = range(ndim) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    axes = tuple(sorted(operator.index(a) + ndim * (operator.index(a) < 0) for a in given))
    if any(not 0 <= a < ndim for a in axes) or len(set(axes)) < len(axes):
        raise ValueError(f"axis {axis} is not valid for an array of {ndim} axes")
    return axes


def _runs(shape: Shape, axes: Shape) -> list[tuple[int, bool]]:
    """The lengths of merged axes, and whether each is reduced."""
    long = [i for i, n in enumerate(shape) if n != 1]
    runs = [(math.prod(shape[i] for i in some), is_in) for is_in, some in groupby(long, lambda i: i in axes)]
    return runs if any(is_in for _, is_in in runs) else [*runs, (1, True)]


def _split(length: int, least: int, concurrent: int) -> tuple[int, int]:
    """Number and length of the parts of a reduction of `length` elements, while `concurrent` reductions run."""
    count = max(1, min(-(-length // least), 8 * driver().processors // max(concurrent, 1)))
    part = -(-length // count)
    return -(-length // part), part


def reduce(name: str, x: DeviceArray, a: int, r: int, b: int) -> DeviceArray:
    """Reduce x, as (A, R, B), over R, which is not 0: (A · B,)."""
    if b == 1 and r <= SHORT:
        out = DeviceArray((a,), x.dtype)
        launch(PROGRAMS[f"{name}.short"], blocks(a, GROUPS), x, out, *u4(a, r))
        return out
    tiles = -(-b // LANES)
    parts, part = _split(r, ROW_PART, a) if b == 1 else _split(r, COLUMN_PART, a * tiles)
    out = DeviceArray((a * parts * b,), x.dtype)
    if b == 1:
        launch(PROGRAMS[f"{name}.rows"], blocks(a * parts, 1), x, out, *u4(a, r, parts, part))
    else:
        work = a * parts * tiles
        launch(PROGRAMS[f"{name}.columns"], blocks(work, 1), x, out, *u4(work, r, b, parts, part, tiles))
    return out if parts == 1 else reduce(_combining(name), out, a, parts, b)


def _combining(name: str) -> str:
    """The reduction that combines the results of a reduction."""
    return "sum" if name == "sum_of_squares" else name


def _reduced(name: str, x: DeviceArray, axis: Axis, keepdims: bool) -> DeviceArray:
    axes = normalized(axis, x.ndim)
    shape = tuple(1 if i in axes else n for i, n in enumerate(x.shape) if keepdims or i not in axes)
    if not math.prod(shape):
        return DeviceArray(shape, x.dtype)
    if not x.size:
        if name in ("max", "min"):
            raise ValueError(f"{name} of an empty array: axis {axis} of shape {x.shape}")
        return maps.fill(DeviceArray(shape, x.dtype), 0)
    runs = _runs(x.shape, axes)
    while reduced := [i for i, (_, is_reduced) in enumerate(runs) if is_reduced]:
        i = max(reduced, key=lambda i: runs[i][0])
        before, after = (math.prod(n for n, _ in some) for some in (runs[:i], runs[i + 1 :]))
        x, name = reduce(name, x, before, runs[i][0], after), _combining(name)
        del runs[i]
    return x.reshape(shape)


def _counted(x: DeviceArray) -> DeviceArray:
    """Integers and booleans as int64, in which NumPy sums them too."""
    return x if x.dtype.kind == "f" else x.astype(np.int64, copy=False)


@kernel("sum", "cuda")
def sum_(x: DeviceArray, *, axis: Axis = None, keepdims: bool = False) -> DeviceArray:
    """Σ x over axes."""
    return _reduced("sum", _counted(x), axis, keepdims)


@kernel("sum_of_squares", "cuda")
def sum_of_squares(x: DeviceArray, *, axis: Axis = None, keepdims: bool = False) -> DeviceArray:
    """Σ x² over axes."""
    if x.dtype.kind != "f":
        raise TypeError(f"sum of squares needs floating-point input; got {x.dtype}, which can overflow")
    return _reduced("sum_of_squares", x, axis, keepdims)


@kernel("squared_norm", "cuda")
def squared_norm(x: DeviceArray) -> DeviceArray:
    """Σ x² of all elements, 0-d float64."""
    return sum_of_squares(x).astype(np.float64)


@kernel("max", "cuda")
def max_(x: DeviceArray, *, axis: Axis = None, keepdims: bool = False) -> DeviceArray:
    """The largest element over axes."""
    return _reduced("max", x, axis, keepdims)


@kernel("min", "cuda")
def min_(x: DeviceArray, *, axis: Axis = None, keepdims: bool = False) -> DeviceArray:
    """The smallest element over axes."""
    return _reduced("min", x, axis, keepdims)


@kernel("sum_to", "cuda")
def sum_to(x: DeviceArray, *, shape: Shape) -> DeviceArray:
    """Sum x down to `shape`: the adjoint of broadcasting."""
    lead = x.ndim - len(shape)
    repeated = [i for i, n in enumerate(shape, start=lead) if n == 1 and x.shape[i] != 1]
    return sum_(x, axis=(*range(lead), *repeated), keepdims=True).reshape(shape)


def _place(which: Any, x: DeviceArray, axis: int | None, keepdims: bool) -> DeviceArray:
    along = normalized(axis, x.ndim)
    if not x.size:
        raise ValueError(f"argmax or argmin of an empty array: shape {x.shape}")
    shape = tuple(1 if i in along else n for i, n in enumerate(x.shape) if keepdims or i not in along)
    order = (*(i for i in range(x.ndim) if i not in along), *along)
    source, out = transpose(x, axes=order), DeviceArray(shape, np.int64)
    launch(which, blocks(out.size, 1), source, out, *u4(out.size, x.size // out.size))
    return out


@kernel("argmax", "cuda")
def argmax(x: DeviceArray, *, axis: int | None = None, keepdims: bool = False) -> DeviceArray:
    """The index of the largest element along an axis: the first of a tie, or the first NaN."""
    return _place(ARGMAX, x, axis, keepdims)


@kernel("argmin", "cuda")
def argmin(x: DeviceArray, *, axis: int | None = None, keepdims: bool = False) -> DeviceArray:
    """The index of the smallest element along an axis: the first of a tie, or the first NaN."""
    return _place(ARGMIN, x, axis, keepdims)
