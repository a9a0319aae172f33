"""Reductions over the threads of a warp and of a block; every thread gets the result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tinygrad_bn_kernels.cuda.shim import cuda, device

ALL = 0xFFFFFFFF  # mask of all lanes of a warp

# Threads and warps of a block for `block_reduce`, whose shared memory has one element for each warp.
THREADS = 256
WARPS = THREADS // 32


def warp_reduce(combine: Callable[..., Any]) -> Callable[..., Any]:
    """A device function that combines the values of a warp's 32 lanes, in five shuffles."""

    @device
    def combined(value):
        value = combine(value, cuda.shfl_xor_sync(ALL, value, 16))
        value = combine(value, cuda.shfl_xor_sync(ALL, value, 8))
        value = combine(value, cuda.shfl_xor_sync(ALL, value, 4))
        value = combine(value, cuda.shfl_xor_sync(ALL, value, 2))
        return combine(value, cuda.shfl_xor_sync(ALL, value, 1))

    return combined


def block_reduce(combine: Callable[..., Any], reuse: bool = True) -> Callable[..., Any]:
    """A device function that combines the values of a block of 256 threads, through `shared` of 8 elements.

    Each warp writes its result there, then every warp combines all 8. This takes eight shuffles and one barrier, and a
    second barrier if `shared` is used again later (`reuse`).
    """
    warp = warp_reduce(combine)

    @device
    def combined(value, shared):
        value = warp(value)
        thread = cuda.threadIdx.x
        if thread & 31 == 0:
            shared[thread >> 5] = value
        cuda.syncthreads()
        value = shared[thread & 7]
        if reuse:
            cuda.syncthreads()
        value = combine(value, cuda.shfl_xor_sync(ALL, value, 4))
        value = combine(value, cuda.shfl_xor_sync(ALL, value, 2))
        return combine(value, cuda.shfl_xor_sync(ALL, value, 1))

    return combined


@device
def plus(a, b):
    """The sum of two values."""
    return a + b
