"""Max pooling in one or two dimensions, a plane at a time, and its gradient.

The index of a maximum is not saved: the gradient searches x again, which is cheaper than writing and reading eight
bytes per window. The usual windows, 2 × 2 without overlap, are processed by vectors.
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
    from tinygrad_bn_kernels.cpu.simd import (
        evens,
        lanes,
        larger,
        load,
        odds,
        store,
        where_different,
        where_equal,
        zip_first,
        zip_last,
    )

Ints = tuple[int, ...]


@njit(allocates=False)
def _larger(a, b):
    """The maximum: a if they are equal, NaN if either is NaN."""
    return b if (b > a) | (b != b) else a


@njit(allocates=False)
def _max_pool(x, kernel, stride, padding, dilation, y, start, stop):
    """The maximum of each window of x (planes, H, W), into y (planes, OH, OW); −∞ for a window in the padding.

    The inner loop goes along a row of the output for one position in the windows, so it checks no bounds.
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


@njit(allocates=False)
def _max_pool_vjp(g, y, x, kernel, stride, padding, dilation, gx, start, stop):
    """Add g to the first element of each window that equals y, its maximum."""
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


@njit(allocates=False)
def _max_pool_2x2(x, y, start, stop):
    """`_max_pool` for windows of 2 × 2 without overlap and padding."""
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


@njit(allocates=False)
def _split_gradient(x, y, g):
    """(g, 0) if x == y or x is NaN, else (0, g): the gradient of x, and the rest for the window's other elements."""
    is_largest, zero = (x == y) | (x != x), type(g)(0)
    return g if is_largest else zero, zero if is_largest else g


@njit(allocates=False)
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
                g0, rest = where_equal(evens(a, b), m, rest), where_different(evens(a, b), m, rest)
                g1, rest = where_equal(odds(a, b), m, rest), where_different(odds(a, b), m, rest)
                g2, rest = where_equal(evens(c, d), m, rest), where_different(evens(c, d), m, rest)
                g3 = where_equal(odds(c, d), m, rest)
                store(above, 2 * q, zip_first(g0, g1)), store(above, 2 * q + step, zip_last(g0, g1))
                store(below, 2 * q, zip_first(g2, g3)), store(below, 2 * q + step, zip_last(g2, g3))
            for q in range(whole, columns):
                m, w = largest[q], 2 * q
                above[w], rest = _split_gradient(upper[w], m, gs[q])
                above[w + 1], rest = _split_gradient(upper[w + 1], m, rest)
                below[w], rest = _split_gradient(lower[w], m, rest)
                below[w + 1], rest = _split_gradient(lower[w + 1], m, rest)
            for w in range(2 * columns, len(above)):  # a last column that no window covers
                above[w] = below[w] = 0
        for h in range(2 * rows, gx.shape[1]):
            gx[n, h] = 0


@njit(allocates=False)
def _max_pool_places(x, kernel, stride, padding, dilation, out, start, stop):
    """The place of the first maximum, or of the first NaN, of each window in its plane; −1 for one in the padding."""
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = kernel, stride, padding, dilation
    _, height, width = x.shape
    for n in range(start, stop):
        for p in range(out.shape[1]):
            for q in range(out.shape[2]):
                found, best = -1, x.dtype.type(0)
                for i in range(kh):
                    h = p * sh + i * dh - ph
                    if h < 0 or h >= height:
                        continue
                    for j in range(kw):
                        w = q * sw + j * dw - pw
                        if 0 <= w < width:
                            met = x[n, h, w]
                            if found < 0 or met > best or (met != met and best == best):
                                found, best = h * width + w, met
                out[n, p, q] = found


def _planes(x: Array) -> Array:
    """(N, C, *size) as (N · C, H, W)."""
    return x.reshape(x.shape[0] * x.shape[1], *(1,) * (4 - x.ndim), *x.shape[2:])


def _pairs(x: Array, *each: tuple[Ints, int]) -> list[Ints]:
    """Each (option, default) for two axes: the default is for the first axis of one-dimensional pooling."""
    return [(default,) * (4 - x.ndim) + tuple(option) for option, default in each]


def _is_2x2(x: Array, out: Ints, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints) -> bool:
    plain = kernel == stride == (2, 2) and padding == (0, 0) and dilation == (1, 1)
    return plain and all(2 * m <= n for m, n in zip(out, x.shape[2:], strict=True))


@kernel("max_pool", "cpu")
def max_pool(x: Array, *, kernel: Ints, out: Ints, stride: Ints, padding: Ints, dilation: Ints) -> Any:
    """The maximum of each window: x (N, C, *size) to (N, C, *out)."""
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


@kernel("max_pool_places", "cpu")
def max_pool_places(x: Array, *, kernel: Ints, out: Ints, stride: Ints, padding: Ints, dilation: Ints) -> Any:
    """Flat index of the largest element of each window in its plane."""
    if x.ndim not in (3, 4) or not x.size or x.dtype.kind != "f" or config.DISABLE_JIT:  # type: ignore[attr-defined]
        return NotImplemented
    source, places = compiled(x), empty((*x.shape[:2], *out), np.int64)
    options = _pairs(x, (kernel, 1), (stride, 1), (padding, 0), (dilation, 1))
    split(_max_pool_places, len(_planes(x)), x.size, _planes(source), *options, _planes(places))
    return places


@kernel("max_pool.vjp", "cpu")
def max_pool_vjp(
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
    """g at the maximum of each window, the first of a tie."""
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
