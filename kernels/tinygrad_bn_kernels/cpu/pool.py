"""Max pooling in one or two dimensions, a plane at a time, and its gradient."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinygrad_bn_kernels import kernel
from tinygrad_bn_kernels.cpu.arrays import compiled
from tinygrad_bn_kernels.cpu.jit import njit
from tinygrad_bn_kernels.cpu.threads import split

Array = NDArray[Any]
Ints = tuple[int, ...]


@njit()
def _max_pool(x, kh, kw, oh, ow, sh, sw, top, left, dh, dw, y, places, start, stop):
    _, height, width = x.shape
    for n in range(start, stop):
        plane, out, found = x[n], y[n], places[n]
        for p in range(oh):
            for q in range(ow):
                best, place = plane[0, 0], -1
                for i in range(kh):
                    h = p * sh + i * dh - top
                    if h < 0 or h >= height:
                        continue
                    for j in range(kw):
                        w = q * sw + j * dw - left
                        if w < 0 or w >= width:
                            continue
                        v = plane[h, w]
                        if place < 0 or v > best or (v != v and best == best):
                            best, place = v, h * width + w
                out[p, q] = best
                found[p, q] = place


@njit()
def _max_pool_vjp(g, places, gx, start, stop):
    for n in range(start, stop):
        gs, found, out = g[n], places[n], gx[n]
        for i in range(gs.size):
            out[found[i]] += gs[i]


@kernel("max_pool_fused", "cpu")
def max_pool_fused(x: Array, *, kernel: Ints, out: Ints, stride: Ints, padding: Ints, dilation: Ints) -> Any:
    """x (N, C, *size) to (N, C, *out), and where in its plane each lies."""
    if x.ndim not in (3, 4) or not x.size:
        return NotImplemented
    source, lead = compiled(x), (1,) * (4 - x.ndim)
    y, places = np.empty((*x.shape[:2], *out), source.dtype), np.empty((*x.shape[:2], *out), np.intp)
    planes = x.shape[0] * x.shape[1]
    none = (0,) * len(lead)
    numbers = *lead, *kernel, *lead, *out, *lead, *stride, *none, *padding, *lead, *dilation
    shape = planes, *lead, *out
    args = source.reshape(planes, *lead, *x.shape[2:]), *numbers, y.reshape(shape), places.reshape(shape)
    split(_max_pool, planes, x.size, *args)
    return y.astype(x.dtype, copy=False), places


@kernel("max_pool_fused.vjp", "cpu")
def max_pool_fused_vjp(
    g: Array, y: Array, x: Array, *, needs: list[bool], places: Array, **options: Any
) -> tuple[Array]:
    """g where the largest lay."""
    planes = x.shape[0] * x.shape[1]
    gs = compiled(g)
    gx = np.zeros(x.shape, gs.dtype)
    if x.size:
        split(_max_pool_vjp, planes, x.size, gs.reshape(planes, -1), places.reshape(planes, -1), gx.reshape(planes, -1))
    return (gx,)
