"""Max pooling in one or two dimensions, a thread for each output; its gradient is that of the places it chose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tinygrad_bn_kernels import kernel
from tinygrad_bn_kernels.cuda import maps
from tinygrad_bn_kernels.cuda.array import DeviceArray
from tinygrad_bn_kernels.cuda.launch import blocks, launch, program, u4
from tinygrad_bn_kernels.cuda.shim import cuda, uint32
from tinygrad_bn_kernels.cuda.strides import row_block

Ints = tuple[int, ...]


@program("max_pool", "f4* f4* i8* u4 u4 u4 u4 u4 u4 u4 u4 u4 u4 u4 u4 u4", block=(32, 8))
def MAX_POOL(T: Any) -> Callable[..., None]:
    """The largest of each window and where in its plane it lies: the first of a tie, or the first NaN."""

    def max_pool(x, y, places, planes, height, width, kh, kw, oh, ow, sh, sw, ph, pw, dh, dw):
        row = uint32(cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y)
        while row < uint32(planes * oh):
            plane = uint32(row // oh)
            top = uint32((row - plane * oh) * sh - ph)  # before the first row it wraps around, beyond every length
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
                y[uint32(row * ow + q)] = best
                places[uint32(row * ow + q)] = found
                q = uint32(q + cuda.blockDim.x)
            row = uint32(row + cuda.gridDim.x * cuda.blockDim.y)

    return max_pool


@kernel("max_pool_fused", "cuda")
def max_pool_fused(
    x: DeviceArray, *, kernel: Ints, out: Ints, stride: Ints, padding: Ints, dilation: Ints
) -> tuple[DeviceArray, DeviceArray]:
    """x (N, C, *size) to (N, C, *out), and where in its plane each lies."""
    maps.check(x)
    if x.ndim not in (3, 4):
        raise ValueError(f"max pooling on cuda takes (N, C, L) or (N, C, H, W); got {x.shape}")
    one, none = (1,) * (4 - x.ndim), (0,) * (4 - x.ndim)
    y, places = (DeviceArray((*x.shape[:2], *out), dtype) for dtype in (x.dtype, np.dtype(np.int64)))
    if y.size:
        size, windows, outs = (*one, *x.shape[2:]), (*one, *kernel), (*one, *out)
        planes = x.shape[0] * x.shape[1]
        numbers = u4(planes, *size, *windows, *outs, *one, *stride, *none, *padding, *one, *dilation)
        block = row_block(outs[1])
        launch(MAX_POOL, blocks(planes * outs[0], block[1]), x, y, places, *numbers, block=block)
    return y, places
