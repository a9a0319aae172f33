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
    """A row of outputs at a time, and of each window one place: the loop along the row then asks for no bounds."""
    _, height, width = x.shape
    for n in range(start, stop):
        for p in range(oh):
            best, found = y[n, p], places[n, p]
            found[:] = -1
            for i in range(kh):
                h = p * sh + i * dh - top
                if h < 0 or h >= height:
                    continue
                row = x[n, h]
                for j in range(kw):
                    shift = j * dw - left
                    first = (max(-shift, 0) + sw - 1) // sw
                    last = min((width - 1 - shift) // sw + 1, ow)
                    for q in range(first, last):
                        w = q * sw + shift
                        v, held = row[w], best[q]
                        larger = (found[q] < 0) | (v > held) | ((v != v) & (held == held))
                        best[q] = v if larger else held
                        found[q] = h * width + w if larger else found[q]


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
