"""Products of large matrices.

BLAS is not used for them: its threads spin for milliseconds after a product, in case of another, and take a core away
from the loops that come next. And its results change, in the last bits, with the number of threads.

The columns of the right matrix are copied side by side first, a tile's width at a time; then some rows of the left one
meet them all, as many terms at a time as a tile's columns leave room for in the first cache (Goto & van de Geijn,
"Anatomy of high-performance matrix multiplication", 2008).
"""

import numpy as np
from numba import config

from tinygrad_bn_kernels.cpu.arrays import Array, compiled
from tinygrad_bn_kernels.cpu.jit import njit
from tinygrad_bn_kernels.cpu.memory import empty
from tinygrad_bn_kernels.cpu.threads import MULTIPLICATIONS, split
from tinygrad_bn_kernels.cpu.tiles import ROWS, VECTORS, add_products, copy, interleave

if not config.DISABLE_JIT:  # type: ignore[attr-defined]
    from tinygrad_bn_kernels.cpu.simd import BITS, lanes, load, store

TERMS = 256  # of the sums, at a time
GROUP = 32  # rows of an item
LINE = 16  # elements of a row that are taken before the next row's
ITEMS = 16  # or more, if there are columns enough


@njit()
def _gather_columns(b, transposed, packed, start, stop):
    """Columns of b (K, N), or of its transpose, to packed (blocks, K, width): each block's side by side."""
    _, terms, width = packed.shape
    step, source, target = lanes(b), b.reshape(b.size), packed.reshape(packed.size)
    columns = len(b) if transposed else b.shape[1]
    for block in range(start, stop):
        first, to = block * width, block * terms * width
        count = min(width, columns - first)
        if count < width:
            for k in range(terms * width):
                target[to + k] = 0
        if transposed:
            for begin in range(0, terms, LINE):
                for j in range(count):
                    for k in range(begin, min(begin + LINE, terms)):
                        target[to + k * width + j] = source[(first + j) * terms + k]
        elif count == width:
            for k in range(terms):
                at, place = k * columns + first, to + k * width
                x0, x1, x2 = load(source, at), load(source, at + step), load(source, at + 2 * step)
                store(target, place, x0), store(target, place + step, x1), store(target, place + 2 * step, x2)
        else:
            for k in range(terms):
                copy(source, k * columns + first, target, to + k * width, count)


@njit()
def _gather_rows(a, transposed, top, begin, terms, packed):
    """Terms from `begin` on of a group of rows of a (M, K), or of its transpose, to packed (tiles, terms · 4)."""
    pitch, source, target = a.shape[1], a.reshape(a.size), packed.reshape(packed.size)
    tiles, length = packed.shape
    rows = (pitch if transposed else len(a)) - top
    for tile in range(min(tiles, -(-rows // ROWS))):
        to, first = tile * length, top + tile * ROWS
        some = min(ROWS, rows - tile * ROWS)
        if some < ROWS:
            for i in range(ROWS * terms):
                target[to + i] = 0
        if some == ROWS and transposed:
            for k in range(terms):
                for i in range(ROWS):
                    target[to + ROWS * k + i] = source[(begin + k) * pitch + first + i]
        elif some == ROWS:
            interleave(source, first * pitch + begin, pitch, terms, target, to)
        else:
            for i in range(some):
                for k in range(terms):
                    at = (begin + k) * pitch + first + i if transposed else (first + i) * pitch + begin + k
                    target[to + ROWS * k + i] = source[at]


@njit()
def _multiply(a, transposed, packed, bias, spread, out, start, stop):
    """a (M, K), or its transpose, times the packed columns, plus bias, to out (M, N).

    An item is a group of rows by `spread` blocks.
    """
    blocks, terms, width = packed.shape
    rows, columns = out.shape
    source, target = packed.reshape(packed.size), out.reshape(out.size)
    pitch, across = spread * width, -(-blocks // spread)
    offsets = np.arange(TERMS) * width
    flat, some = np.empty(GROUP * pitch, a.dtype), np.empty((GROUP // ROWS, TERMS * ROWS), a.dtype)
    numbers = some.reshape(some.size)
    for item in range(start, stop):
        top, left = item // across * GROUP, item % across * pitch
        count, wide = min(GROUP, rows - top), min(pitch, columns - left)
        for i in range(GROUP):
            copy(bias, left, flat, i * pitch, wide)
        for begin in range(0, terms, TERMS):
            stretch = min(TERMS, terms - begin)
            _gather_rows(a, transposed, top, begin, stretch, some)
            for block in range(left // width, -(-(left + wide) // width)):
                at = (block * terms + begin) * width
                for i in range(0, count, ROWS):
                    c = i * pitch + block * width - left
                    add_products(
                        source, offsets[:stretch], at, numbers, i * TERMS,
                        flat, c, c + pitch, c + 2 * pitch, c + 3 * pitch,
                    )  # fmt: skip
        for i in range(count):
            copy(flat, i * pitch, target, (top + i) * columns + left, wide)


def _plain(x: Array) -> tuple[Array, bool]:
    """A matrix in memory, row by row, and whether it is the transpose of x."""
    return (compiled(x.T), True) if x.flags.f_contiguous and not x.flags.c_contiguous else (compiled(x), False)


def product(a: Array, b: Array, bias: Array) -> Array:
    """a (M, K) times b (K, N), plus bias (N,), all of one precision."""
    if config.DISABLE_JIT:  # type: ignore[attr-defined]
        return np.matmul(a, b) + bias
    if a.flags.c_contiguous and b.T.flags.c_contiguous and a.size < b.size:  # the smaller one has its columns gathered
        out = np.ascontiguousarray(product(b.T, a.T, np.zeros(len(a), a.dtype)).T)
        return np.add(out, bias, out=out)
    width = VECTORS * BITS // 8 // a.itemsize
    blocks = -(-b.shape[1] // width)
    packed, out = empty((blocks, len(b), width), a.dtype), empty((len(a), b.shape[1]), a.dtype)
    split(_gather_columns, blocks, b.size, *_plain(b), packed)
    groups = -(-len(a) // GROUP)
    spread = -(-blocks // min(-(-ITEMS // groups), blocks))
    items, work = groups * -(-blocks // spread), a.size * b.shape[1] / MULTIPLICATIONS
    split(_multiply, items, work, *_plain(a), packed, compiled(bias), spread, out)
    return out
