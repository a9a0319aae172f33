"""Dropout by a counter-based generator: the same key keeps the same elements as on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tinygrad_bn_kernels import kernel
from tinygrad_bn_kernels.cuda import maps
from tinygrad_bn_kernels.cuda.array import DeviceArray, vectorizable
from tinygrad_bn_kernels.cuda.launch import blocks, launch, program, u4
from tinygrad_bn_kernels.cuda.shim import cuda, device, load4, store4, uint32, uint64


@device
def _round(c0, c1, c2, c3, k0, k1):
    """One of the ten rounds of Philox4x32 (Salmon et al. 2011)."""
    p0, p1 = uint64(uint64(0xD2511F53) * c0), uint64(uint64(0xCD9E8D57) * c2)
    half = uint64(32)
    return uint32(uint32(p1 >> half) ^ c1 ^ k0), uint32(p1), uint32(uint32(p0 >> half) ^ c3 ^ k1), uint32(p0)


@device
def _kept(x, scale):
    """x · scale; 0 if the scale is 0, also for NaN."""
    return x * scale if scale > 0 else scale


def _dropout(wide: bool) -> Callable[[Any], Callable[..., None]]:
    """A thread draws four 32-bit words for four adjacent elements; an element is kept if its word is large enough."""

    def build(T: Any) -> Callable[..., None]:
        def dropout(x, out, n, threshold, key_low, key_high, scale):
            block = uint32(cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x)
            while block < uint32((n + uint32(3)) >> uint32(2)):
                c0, c1, c2, c3 = block, uint32(0), uint32(0), uint32(0)
                k0, k1 = key_low, key_high
                for _ in range(10):
                    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
                    k0, k1 = uint32(k0 + uint32(0x9E3779B9)), uint32(k1 + uint32(0xBB67AE85))
                s0, s1 = scale if c0 >= threshold else T(0), scale if c1 >= threshold else T(0)
                s2, s3 = scale if c2 >= threshold else T(0), scale if c3 >= threshold else T(0)
                i = uint32(block << uint32(2))
                if wide and i + uint32(3) < n:
                    x0, x1, x2, x3 = load4(x, i)
                    store4(out, i, (_kept(x0, s0), _kept(x1, s1), _kept(x2, s2), _kept(x3, s3)))
                else:
                    out[i] = _kept(x[i], s0)
                    if i + uint32(1) < n:
                        out[uint32(i + uint32(1))] = _kept(x[uint32(i + uint32(1))], s1)
                    if i + uint32(2) < n:
                        out[uint32(i + uint32(2))] = _kept(x[uint32(i + uint32(2))], s2)
                    if i + uint32(3) < n:
                        out[uint32(i + uint32(3))] = _kept(x[uint32(i + uint32(3))], s3)
                block = uint32(block + cuda.gridDim.x * cuda.blockDim.x)

        return dropout

    return build


DROPOUT = program("dropout", "f4* f4* u4 u8 u4 u4 f4")(_dropout(False))
DROPOUT4 = program("dropout4", "f4* f4* u4 u8 u4 u4 f4", vector=True)(_dropout(True))


@kernel("dropout_by_key", "cuda")
def dropout_by_key(x: DeviceArray, *, p: float, key: int) -> DeviceArray:
    """x / (1 − p) where an element's random 32-bit word is at least p · 2³², else 0."""
    maps.check(x)
    out = DeviceArray(x.shape, x.dtype)
    if x.size:
        scale = x.number(1 / (1 - p) if p < 1 else 0)
        numbers = *u4(x.size), np.uint64(round(p * 2**32)), *u4(key, key >> 32), scale
        which = DROPOUT4 if vectorizable(x) else DROPOUT
        launch(which, blocks(-(-x.size // 4)), x, out, *numbers)
    return out
