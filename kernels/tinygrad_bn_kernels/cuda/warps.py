"""How the threads of a warp, and of a block, put their values together: every thread gets the result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tinygrad_bn_kernels.cuda.shim import cuda, device

ALL = 0xFFFFFFFF  # every lane of a warp takes part

# Threads of a block that is put together, and its warps: the shared memory of `over_block` has a place for each.
THREADS = 256
WARPS = THREADS // 32


def over_warp(combine: Callable[..., Any]) -> Callable[..., Any]:
    """A device function: the values of a warp's 32 lanes combined. Five shuffles."""

    @device
    def combined(value):
        value = combine(value, cuda.shfl_xor_sync(ALL, value, 16))
        value = combine(value, cuda.shfl_xor_sync(ALL, value, 8))
        value = combine(value, cuda.shfl_xor_sync(ALL, value, 4))
        value = combine(value, cuda.shfl_xor_sync(ALL, value, 2))
        return combine(value, cuda.shfl_xor_sync(ALL, value, 1))

    return combined


def over_block(combine: Callable[..., Any], again: bool = True) -> Callable[..., Any]:
    """A device function: the values of a block of 256 threads combined, by way of `shared`, of 8 elements.

    Each warp leaves its result there, and then combines all 8 itself. Eight shuffles and a barrier; and another one,
    if `shared` is to be used `again`.
    """
    warp = over_warp(combine)

    @device
    def combined(value, shared):
        value = warp(value)
        thread = cuda.threadIdx.x
        if thread & 31 == 0:
            shared[thread >> 5] = value
        cuda.syncthreads()
        value = shared[thread & 7]
        if again:
            cuda.syncthreads()
        value = combine(value, cuda.shfl_xor_sync(ALL, value, 4))
        value = combine(value, cuda.shfl_xor_sync(ALL, value, 2))
        return combine(value, cuda.shfl_xor_sync(ALL, value, 1))

    return combined


@device
def plus(a, b):
    """The sum: what `over_warp` and `over_block` combine with most often."""
    return a + b
