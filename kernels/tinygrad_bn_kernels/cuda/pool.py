"""Max pooling in one or two dimensions, one thread for each output, and its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from tinygrad_bn_kernels import kernel
from tinygrad_bn_kernels.cuda import maps
from tinygrad_bn_kernels.cuda.array import DeviceArray
from tinygrad_bn_kernels.cuda.launch import blocks, launch, program, u4
from tinygrad_bn_kernels.cuda.shim import cuda, uint32
from tinygrad_bn_kernels.cuda.strides import row_block

Ints = tuple[int, ...]


def _max_pool(result: str) -> Callable[[Any], Callable[..., None]]:
    """The largest element of each window, or its index in the plane: the first of a tie, or the first NaN."""
    places = result == "places"

    def build(T: Any) -> Callable[..., None]:
        def max_pool(x, out, planes, height, width, kh, kw, oh, ow, sh, sw, ph, pw, dh, dw):
            row = uint32(cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y)
            while row < uint32(planes * oh):
                plane = uint32(row // oh)
                top = uint32((row - plane * oh) * sh - ph)  # negative rows wrap around, out of range
                start = uint32(plane * height * width)
                q = uint32(cuda.threadIdx.x)
                while q < ow:
                    left = uint32(q * sw - pw)
                    best, found, none = T(0), uint32(0), True
                    for i in range(kh):
                        h = uint32(top + uint32(i) * dh)
                        for j in range(kw):
                            w = uint32(left + uint32(j) * dw)
                            if h < height and w < width:
                                v = x[uint32(start + h * width + w)]
                                if none or v > best or (v != v and best == best):
                                    best, found, none = v, uint32(h * width + w), False
                    out[uint32(row * ow + q)] = found if places else best
                    q = uint32(q + cuda.blockDim.x)
                row = uint32(row + cuda.gridDim.x * cuda.blockDim.y)

        return max_pool

    return build


_SIZES = " ".join(["u4"] * 13)
MAX_POOL = program("max_pool", f"f4* f4* {_SIZES}", block=(32, 8))(_max_pool("values"))
PLACES = program("max_pool.places", f"f4* i8* {_SIZES}", block=(32, 8))(_max_pool("places"))


@program("max_pool.vjp", "f4* i8* f4* u4 u4 u4", block=(32, 8))
def MAX_POOL_VJP(T: Any) -> Callable[..., None]:
    """gx[plane, places[plane, i]] += g[plane, i], in any order: windows may overlap."""

    def max_pool_vjp(g, places, gx, planes, windows, size):
        plane = uint32(cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y)
        while plane < planes:
            i = uint32(cuda.threadIdx.x)
            while i < windows:
                at = uint32(plane * windows + i)
                cuda.atomic.add(gx, uint32(plane * size + uint32(places[at])), g[at])
                i = uint32(i + cuda.blockDim.x)
            plane = uint32(plane + cuda.gridDim.x * cuda.blockDim.y)

    return max_pool_vjp


def _pooled(
    which: Any, x: DeviceArray, dtype: DTypeLike, kernel: Ints, out: Ints, stride: Ints, padding: Ints, dilation: Ints
) -> DeviceArray:
    maps.check(x)
    if x.ndim not in (3, 4):
        raise ValueError(f"max pooling on cuda needs x of shape (N, C, L) or (N, C, H, W); got {x.shape}")
    one, none = (1,) * (4 - x.ndim), (0,) * (4 - x.ndim)
    y = DeviceArray((*x.shape[:2], *out), dtype)
    if y.size:
        size, windows, outs = (*one, *x.shape[2:]), (*one, *kernel), (*one, *out)
        planes = x.shape[0] * x.shape[1]
        numbers = u4(planes, *size, *windows, *outs, *one, *stride, *none, *padding, *one, *dilation)
        block = row_block(outs[1])
        launch(which, blocks(planes * outs[0], block[1]), x, y, *numbers, block=block)
    return y


@kernel("max_pool", "cuda")
def max_pool(x: DeviceArray, **options: Any) -> DeviceArray:
    """x (N, C, *size) to (N, C, *out)."""
    return _pooled(MAX_POOL, x, x.dtype, **options)


@kernel("max_pool_places", "cuda")
def max_pool_places(x: DeviceArray, **options: Any) -> DeviceArray:
    """The index in its plane of each window's largest element, as int64."""
    return _pooled(PLACES, x, np.int64, **options)


@kernel("max_pool.vjp", "cuda")
def max_pool_vjp(
    g: DeviceArray, y: DeviceArray, x: DeviceArray, *, needs: list[bool], **options: Any
) -> tuple[DeviceArray]:
    """g at the index of each window's largest element, which is computed again."""
    gx = maps.fill(DeviceArray(x.shape, g.dtype), 0)
    if y.size:
        planes, windows, size = x.shape[0] * x.shape[1], math.prod(y.shape[2:]), math.prod(x.shape[2:])
        block = row_block(windows)
        arrays = g, max_pool_places(x, **options), gx
        launch(MAX_POOL_VJP, blocks(planes, block[1]), *arrays, *u4(planes, windows, size), block=block)
    return (gx,)
