"""Products of large matrices.

BLAS is not used: its threads spin for a tenth of a second after a product and take a core from the next loops; and the
last bits of its results change with the number of threads.

A panel of the right matrix, as wide as a tile and small enough for the L1 cache, is packed; then a few rows of the left
matrix at a time are multiplied by it, in place (Goto & van de Geijn, "Anatomy of high-performance matrix
multiplication", 2008). Each thread packs its own panels: sharing them would need another job and a wait.
"""

from functools import lru_cache

import numpy as np
from numba import config

from tinygrad_bn_kernels.cpu.arrays import Array, compiled
from tinygrad_bn_kernels.cpu.jit import helper, njit
from tinygrad_bn_kernels.cpu.memory import empty
from tinygrad_bn_kernels.cpu.threads import MULTIPLICATIONS, split

if not config.DISABLE_JIT:  # type: ignore[attr-defined]
    from tinygrad_bn_kernels.cpu.simd import BITS, lanes, transpose
    from tinygrad_bn_kernels.cpu.tiles import ROWS, VECTORS, add_products, copy

TERMS = 256  # rows of a panel: a multiple of the lanes
ITEMS = 16  # items of a product, or more if it has enough rows
ALIGNMENT = 64  # bytes
LEAST, MOST = 64, 256  # rows of an item: enough to be worth the packing, few enough for the L2 cache


@helper()
def _pack_columns(b, at, strides, terms, count, panel):
    """Copy a block of `terms` rows and `count` columns, from `at` in flat b, into the flat panel (terms, width)."""
    (row_stride, column_stride), step = strides, lanes(b)
    width = VECTORS * step
    if column_stride == 1:
        for k in range(terms):
            copy(b, at + k * row_stride, panel, k * width, count)
    else:
        whole = terms // step * step
        for j in range(0, count // step * step, step):
            for k in range(0, whole, step):
                transpose(b, at + j * column_stride + k, column_stride, panel, k * width + j, width)
        for j in range(count):
            for k in range(whole if j < count // step * step else 0, terms):
                panel[k * width + j] = b[at + j * column_stride + k]


@njit()
def _multiply(left, a_strides, right, b_strides, bias, height, spread, offsets, in_out, in_tile, target, start, stop):
    """target (M, N) = left (M, K) times right (K, N) plus bias, for M ≥ ROWS; all are flat. One stride of each is 1.

    An item is `height` rows, a multiple of ROWS, by `spread` columns, a multiple of a tile's width. Tiles that reach
    over the end of an axis are summed in a buffer; only their new elements are added to target. The rows of a panel
    begin at `offsets`, and those of a tile at `in_out` or `in_tile`.
    """
    (a_row, a_column), (b_row, b_column), columns = a_strides, b_strides, len(bias)
    rows = len(target) // columns
    terms, width = len(left) // rows, VECTORS * lanes(left)
    length, across = len(offsets), -(-columns // spread)
    scratch = np.empty((length + ROWS + 1) * width, left.dtype)
    aligned = -scratch.ctypes.data % ALIGNMENT // left.itemsize  # a vector that crosses cache lines loads twice
    panel = scratch[aligned:]
    tile = panel[length * width :]
    for item in range(start, stop):
        top, edge = item // across * height, item % across * spread
        bottom, end = min(top + height, rows), min(edge + spread, columns)
        for row in range(top, bottom):
            copy(bias, edge, target, row * columns + edge, end - edge)
        for begin in range(0, terms, length):
            used = offsets[: terms - begin]
            for j in range(edge, end, width):
                count = min(width, end - j)
                _pack_columns(right, begin * b_row + j * b_column, b_strides, len(used), count, panel)
                for row in range(top, bottom, ROWS):
                    upper = min(row, bottom - ROWS)
                    first, to = upper * a_row + begin * a_column, upper * columns + j
                    whole = upper == row and count == width
                    if not whole:
                        for r in range(ROWS * width):
                            tile[r] = 0
                    into, places, at = (target, in_out, to) if whole else (tile, in_tile, 0)
                    add_products(panel, used, 0, left, first, a_strides, into, places, 0, at)
                    if not whole:
                        for r in range(row - upper, ROWS):
                            for c in range(count):
                                target[to + r * columns + c] += tile[r * width + c]


def _with_strides(x: Array) -> tuple[Array, tuple[int, int]]:
    """The elements of a matrix, flat, and its strides in them, in elements."""
    if x.flags.f_contiguous and not x.flags.c_contiguous:
        return compiled(x.T).reshape(-1), (1, len(x))
    return compiled(x).reshape(-1), (x.shape[1], 1)


@lru_cache(maxsize=1024)
def _offsets(rows: int, width: int) -> Array:
    """Where each row of a matrix begins."""
    return np.arange(0, rows * width, width)


def product(a: Array, b: Array, bias: Array) -> Array:
    """a (M, K) times b (K, N) plus bias (N,), all of one dtype."""
    rows, columns = len(a), b.shape[1]
    if config.DISABLE_JIT or rows < ROWS:  # type: ignore[attr-defined]
        with np.errstate(invalid="ignore"):  # BLAS raises this flag on some processors only
            return np.matmul(a, b) + bias
    step, terms = BITS // 8 // a.itemsize, len(b)
    width = VECTORS * step
    blocks = -(-columns // width)
    groups = max(min(-(-ITEMS // blocks), rows // LEAST), -(-rows // MOST))
    height, spread = -(-rows // groups // ROWS) * ROWS, max(groups * blocks // ITEMS, 1) * width
    items, work = -(-rows // height) * -(-columns // spread), a.size * columns / MULTIPLICATIONS
    out = empty((rows, columns), a.dtype)
    panel = _offsets(-(-terms // (-(-terms // TERMS) * step)) * step, width)
    places = panel, _offsets(ROWS, columns), _offsets(ROWS, width)
    operands = *_with_strides(a), *_with_strides(b), compiled(bias)
    split(_multiply, items, work, *operands, height, spread, *places, out.reshape(-1))
    return out
