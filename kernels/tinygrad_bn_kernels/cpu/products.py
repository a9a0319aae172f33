"""Products of large matrices.

BLAS is not used for them: its threads spin for a tenth of a second after one, in case of another, and take a core away
from the loops that come next. And its results change, in the last bits, with the number of threads.

Some columns of the right matrix are copied side by side, as many as a tile is wide, and as many terms of them as leave
room in the first cache; then rows of the left matrix, which are read where they are, meet them four at a time (after
Goto & van de Geijn, "Anatomy of high-performance matrix multiplication", 2008). Whoever multiplies makes its own copy:
to share one would be work of its own, which has to be announced to threads and waited for.
"""

import numpy as np
from numba import config

from tinygrad_bn_kernels.cpu.arrays import Array, compiled
from tinygrad_bn_kernels.cpu.jit import njit
from tinygrad_bn_kernels.cpu.memory import empty
from tinygrad_bn_kernels.cpu.threads import MULTIPLICATIONS, split
from tinygrad_bn_kernels.cpu.tiles import ROWS, VECTORS, add_products, copy, four

if not config.DISABLE_JIT:  # type: ignore[attr-defined]
    from tinygrad_bn_kernels.cpu.simd import BITS, lanes, transpose

TERMS = 256  # of the sums, at a time: a multiple of the lanes
ITEMS = 16  # or more, if they have rows enough
LEAST, MOST = 64, 256  # rows of an item: they have to be worth the copy, and to stay in the second cache


@njit()
def _gather_columns(b, at, strides, terms, count, panel):
    """Copy `terms` terms of `count` columns, from `at` on, to the rows of the panel, (terms, width) and flat."""
    (down, across), step = strides, lanes(b)
    width = VECTORS * step
    if across == 1:
        for k in range(terms):
            copy(b, at + k * down, panel, k * width, count)
    else:
        whole = terms // step * step
        for j in range(0, count // step * step, step):
            for k in range(0, whole, step):
                transpose(b, at + j * across + k, across, panel, k * width + j, width)
        for j in range(count):
            for k in range(whole if j < count // step * step else 0, terms):
                panel[k * width + j] = b[at + j * across + k]


@njit()
def _multiply(a, a_strides, b, b_strides, bias, height, spread, out, start, stop):
    """a (M, K) times b (K, N), plus bias, to out (M, N), for M from ROWS on. Of a and b either stride is 1.

    An item is `height` rows, a multiple of ROWS, by `spread` columns, a multiple of a tile's width. Tiles at the end of
    either axis are summed elsewhere, with rows that are summed already, or columns that are not there.
    """
    (rows, columns), (down, apart), (below, beside), step = out.shape, a_strides, b_strides, lanes(a)
    terms, width = a.size // rows, VECTORS * step
    numbers, others, target = a.reshape(a.size), b.reshape(b.size), out.reshape(out.size)
    stretches, across = -(-terms // TERMS), -(-columns // spread)
    length = -(-terms // (stretches * step)) * step
    panel, offsets = np.zeros(length * width, a.dtype), np.arange(length) * width
    tile = np.empty(ROWS * width, a.dtype)
    for item in range(start, stop):
        top, edge = item // across * height, item % across * spread
        bottom, end = min(top + height, rows), min(edge + spread, columns)
        for row in range(top, bottom):
            copy(bias, edge, target, row * columns + edge, end - edge)
        for begin in range(0, terms, length):
            some = offsets[: terms - begin]
            for left in range(edge, end, width):
                count = min(width, end - left)
                _gather_columns(others, begin * below + left * beside, b_strides, len(some), count, panel)
                for row in range(top, bottom, ROWS):
                    upper = min(row, bottom - ROWS)
                    first, place = upper * down + begin * apart, upper * columns + left
                    if upper == row and count == width:
                        add_products(panel, some, 0, numbers, first, a_strides, target, four(place, columns))
                    else:
                        tile[:] = 0
                        add_products(panel, some, 0, numbers, first, a_strides, tile, four(0, width))
                        for i in range(row - upper, ROWS):
                            for j in range(count):
                                target[place + i * columns + j] += tile[i * width + j]


def _plain(x: Array) -> tuple[Array, tuple[int, int]]:
    """A matrix as it lies in memory, row by row or column by column, and the strides of both, in elements."""
    if x.flags.f_contiguous and not x.flags.c_contiguous:
        return compiled(x.T), (1, len(x))
    return compiled(x), (x.shape[1], 1)


def product(a: Array, b: Array, bias: Array) -> Array:
    """a (M, K) times b (K, N), plus bias (N,), all of one precision."""
    rows, columns = len(a), b.shape[1]
    if config.DISABLE_JIT or rows < ROWS:  # type: ignore[attr-defined]
        return np.matmul(a, b) + bias
    width = VECTORS * BITS // 8 // a.itemsize
    blocks = -(-columns // width)
    groups = max(min(-(-ITEMS // blocks), rows // LEAST), -(-rows // MOST))
    height, spread = -(-rows // groups // ROWS) * ROWS, max(groups * blocks // ITEMS, 1) * width
    items, work = -(-rows // height) * -(-columns // spread), a.size * columns / MULTIPLICATIONS
    out = empty((rows, columns), a.dtype)
    split(_multiply, items, work, *_plain(a), *_plain(b), compiled(bias), height, spread, out)
    return out
