"""Max pooling in one or two dimensions, a plane at a time, and its gradient.

Where the largest of a window lies is not kept: the gradient looks for it again, which reads x once more instead of
writing and reading eight bytes for each window. Windows of 2 × 2 that do not overlap, the usual ones, are taken as
many at a time as a vector has lanes.
"""

from typing import Any

import numpy as np
from numba import config

from tinygrad_bn_kernels import kernel
from tinygrad_bn_kernels.cpu.arrays import Array, compiled
from tinygrad_bn_kernels.cpu.jit import njit
from tinygrad_bn_kernels.cpu.memory import empty, empty_like
from tinygrad_bn_kernels.cpu.threads import split

if not config.DISABLE_JIT:  # type: ignore[attr-defined]
    from tinygrad_bn_kernels.cpu.simd import evens, lanes, larger, left, load, odds, store, taken, zip_first, zip_last

Ints = tuple[int, ...]


@njit()
def _larger(a, b):
    """The larger: a if they are equal, NaN if one of them is."""
    return b if (b > a) | (b != b) else a


@njit()
def _max_pool(x, kernel, stride, padding, dilation, y, start, stop):
    """The largest of each window of planes x (planes, H, W) to y (planes, OH, OW), and −∞ for a window without any.

    A row of the output at a time, and of each window one place: the loop along the row then asks for no bounds.
    """
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = kernel, stride, padding, dilation
    _, height, width = x.shape
    for n in range(start, stop):
        for p in range(y.shape[1]):
            to = y[n, p]
            to[:] = -np.inf
            for i in range(kh):
                h = p * sh + i * dh - ph
                if 0 <= h < height:
                    row = x[n, h]
                    for j in range(kw):
                        shift = j * dw - pw
                        first = (max(-shift, 0) + sw - 1) // sw
                        for q in range(first, min((width - 1 - shift) // sw + 1, len(to))):
                            to[q] = _larger(to[q], row[q * sw + shift])


@njit()
def _max_pool_vjp(g, y, x, kernel, stride, padding, dilation, gx, start, stop):
    """g to the first element of each window that is the largest, which is y."""
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = kernel, stride, padding, dilation
    _, height, width = x.shape
    for n in range(start, stop):
        gx[n] = 0
        for p in range(g.shape[1]):
            for q in range(g.shape[2]):
                found = False
                for i in range(kh):
                    h = p * sh + i * dh - ph
                    if found or h < 0 or h >= height:
                        continue
                    for j in range(kw):
                        w = q * sw + j * dw - pw
                        if 0 <= w < width and (x[n, h, w] == y[n, p, q] or x[n, h, w] != x[n, h, w]):
                            gx[n, h, w] += g[n, p, q]
                            found = True
                            break


@njit()
def _max_pool_2x2(x, y, start, stop):
    """`_max_pool` of windows of 2 × 2 that do not overlap, stick out or lie in padding."""
    step = lanes(x)
    _, rows, columns = y.shape
    whole = columns if columns >= step else 0  # the last vector may overlap the one before
    for n in range(start, stop):
        for p in range(rows):
            upper, lower, to = x[n, 2 * p], x[n, 2 * p + 1], y[n, p]
            for at in range(0, whole, step):
                q = min(at, columns - step)
                a, b = load(upper, 2 * q), load(upper, 2 * q + step)
                c, d = load(lower, 2 * q), load(lower, 2 * q + step)
                store(to, q, larger(larger(evens(a, b), odds(a, b)), larger(evens(c, d), odds(c, d))))
            for q in range(whole, columns):
                to[q] = _larger(_larger(upper[2 * q], upper[2 * q + 1]), _larger(lower[2 * q], lower[2 * q + 1]))


@njit()
def _divided(x, y, g):
    """g if x is y, or NaN, and what is then left for others: one of the two is 0."""
    here, zero = (x == y) | (x != x), type(g)(0)
    return g if here else zero, zero if here else g


@njit()
def _max_pool_2x2_vjp(g, y, x, gx, start, stop):
    step = lanes(x)
    _, rows, columns = y.shape
    whole = columns if columns >= step else 0  # the last vector may overlap the one before
    for n in range(start, stop):
        for p in range(rows):
            upper, lower, above, below = x[n, 2 * p], x[n, 2 * p + 1], gx[n, 2 * p], gx[n, 2 * p + 1]
            largest, gs = y[n, p], g[n, p]
            for at in range(0, whole, step):
                q = min(at, columns - step)
                a, b = load(upper, 2 * q), load(upper, 2 * q + step)
                c, d = load(lower, 2 * q), load(lower, 2 * q + step)
                m, rest = load(largest, q), load(gs, q)
                g0, rest = taken(evens(a, b), m, rest), left(evens(a, b), m, rest)
                g1, rest = taken(odds(a, b), m, rest), left(odds(a, b), m, rest)
                g2, rest = taken(evens(c, d), m, rest), left(evens(c, d), m, rest)
                g3 = taken(odds(c, d), m, rest)
                store(above, 2 * q, zip_first(g0, g1)), store(above, 2 * q + step, zip_last(g0, g1))
                store(below, 2 * q, zip_first(g2, g3)), store(below, 2 * q + step, zip_last(g2, g3))
            for q in range(whole, columns):
                m, w = largest[q], 2 * q
                above[w], rest = _divided(upper[w], m, gs[q])
                above[w + 1], rest = _divided(upper[w + 1], m, rest)
                below[w], rest = _divided(lower[w], m, rest)
                below[w + 1], rest = _divided(lower[w + 1], m, rest)
            for w in range(2 * columns, len(above)):  # a last column, or row, that no window has
                above[w] = below[w] = 0
        for h in range(2 * rows, gx.shape[1]):
            gx[n, h] = 0


def _planes(x: Array) -> Array:
    """(N, C, *size) as (N · C, H, W)."""
    return x.reshape(x.shape[0] * x.shape[1], *(1,) * (4 - x.ndim), *x.shape[2:])


def _pairs(x: Array, *each: tuple[Ints, int]) -> list[Ints]:
    """Each option for two axes; what a first axis of one element has stands beside it."""
    return [(one,) * (4 - x.ndim) + tuple(option) for option, one in each]


def _is_2x2(x: Array, out: Ints, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints) -> bool:
    plain = kernel == stride == (2, 2) and padding == (0, 0) and dilation == (1, 1)
    return plain and all(2 * m <= n for m, n in zip(out, x.shape[2:], strict=True))


@kernel("max_pool_fused", "cpu")
def max_pool_fused(x: Array, *, kernel: Ints, out: Ints, stride: Ints, padding: Ints, dilation: Ints) -> Any:
    """x (N, C, *size) to (N, C, *out)."""
    if x.ndim not in (3, 4) or not x.size or config.DISABLE_JIT:  # type: ignore[attr-defined]
        return NotImplemented
    source = compiled(x)
    y = empty((*x.shape[:2], *out), source.dtype)
    if _is_2x2(x, out, kernel, stride, padding, dilation):
        split(_max_pool_2x2, len(_planes(x)), x.size, _planes(source), _planes(y))
    else:
        options = _pairs(x, (kernel, 1), (stride, 1), (padding, 0), (dilation, 1))
        split(_max_pool, len(_planes(x)), x.size, _planes(source), *options, _planes(y))
    return y.astype(x.dtype, copy=False)


@kernel("max_pool_fused.vjp", "cpu")
def max_pool_fused_vjp(
    g: Array,
    y: Array,
    x: Array,
    *,
    needs: list[bool],
    kernel: Ints,
    out: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
) -> Any:
    """g where the largest lies, the first of a tie."""
    if x.ndim not in (3, 4) or not x.size or config.DISABLE_JIT:  # type: ignore[attr-defined]
        return NotImplemented
    source = compiled(x)
    gs, ys, gx = compiled(g, source.dtype), compiled(y, source.dtype), empty_like(source)
    arrays = _planes(gs), _planes(ys), _planes(source)
    if _is_2x2(x, out, kernel, stride, padding, dilation):
        split(_max_pool_2x2_vjp, len(arrays[2]), x.size, *arrays, _planes(gx))
    else:
        options = _pairs(x, (kernel, 1), (stride, 1), (padding, 0), (dilation, 1))
        split(_max_pool_vjp, len(arrays[2]), x.size, *arrays, *options, _planes(gx))
    return (gx,)
