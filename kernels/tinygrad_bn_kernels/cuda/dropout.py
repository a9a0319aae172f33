"""Dropout by a counter-based generator: the same elements as on the CPU for the same key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tinygrad_bn_kernels import kernel
from tinygrad_bn_kernels.cuda import maps
from tinygrad_bn_kernels.cuda.array import DeviceArray
from tinygrad_bn_kernels.cuda.launch import blocks, launch, program, u4
from tinygrad_bn_kernels.cuda.shim import cuda, device, uint32, uint64


@device
def _round(c0, c1, c2, c3, k0, k1):
    """One of the ten rounds of Philox4x32 (Salmon et al. 2011)."""
    p0, p1 = uint64(uint64(0xD2511F53) * c0), uint64(uint64(0xCD9E8D57) * c2)
    half = uint64(32)
    return uint32(uint32(p1 >> half) ^ c1 ^ k0), uint32(p1), uint32(uint32(p0 >> half) ^ c3 ^ k1), uint32(p0)


@program("dropout", "f4* f4* u4 u8 u4 u4 f4")
def DROPOUT(T: Any) -> Callable[..., None]:
    """A thread draws four words of 32 bits, for four neighbouring elements; an element stays if its word is large."""

    def dropout(x, out, n, threshold, key_low, key_high, scale):
        block = uint32(cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x)
        while block < uint32((n + uint32(3)) >> uint32(2)):
            c0, c1, c2, c3 = block, uint32(0), uint32(0), uint32(0)
            k0, k1 = key_low, key_high
            for _ in range(10):
                c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
                k0, k1 = uint32(k0 + uint32(0x9E3779B9)), uint32(k1 + uint32(0xBB67AE85))
            i = uint32(block << uint32(2))
            out[i] = x[i] * scale if c0 >= threshold else T(0)
            if i + uint32(1) < n:
                out[uint32(i + uint32(1))] = x[uint32(i + uint32(1))] * scale if c1 >= threshold else T(0)
            if i + uint32(2) < n:
                out[uint32(i + uint32(2))] = x[uint32(i + uint32(2))] * scale if c2 >= threshold else T(0)
            if i + uint32(3) < n:
                out[uint32(i + uint32(3))] = x[uint32(i + uint32(3))] * scale if c3 >= threshold else T(0)
            block = uint32(block + cuda.gridDim.x * cuda.blockDim.x)

    return dropout


@kernel("dropout_by_key", "cuda")
def dropout_by_key(x: DeviceArray, *, p: float, key: int) -> DeviceArray:
    """x / (1 − p) where the element's 32 random bits are at least p · 2³², else 0."""
    maps.check(x)
    out = DeviceArray(x.shape, x.dtype)
    if x.size:
        scale = x.number(1 / (1 - p) if p < 1 else 0)
        numbers = *u4(x.size), np.uint64(round(p * 2**32)), *u4(key, key >> 32), scale
        launch(DROPOUT, blocks(-(-x.size // 4)), x, out, *numbers)
    return out
