"""An allocator for large results that reuses freed memory.

The system zeroes fresh pages one by one, which costs as much as the arithmetic of a large result; and a training step
allocates the same sizes again and again.
"""

import _thread
import math
import os
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from tinygrad_bn_kernels.cpu.arrays import Array
from tinygrad_bn_kernels.cpu.threads import setting

# Bytes from which memory is reused here. The C library reuses smaller blocks itself.
KEEP_FROM = 1 << 18
ALIGNMENT = 64


class _Buffer:
    """The base of an array: its memory returns to the cache when no array refers to it."""

    memory: Array | None = None  # set in __init__, which may be interrupted

    def __init__(self, cache: "MemoryCache", memory: Array, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.cache, self.memory = cache, memory
        start = memory.ctypes.data
        data = start + -start % ALIGNMENT, False
        self.__array_interface__ = {"version": 3, "shape": shape, "typestr": dtype.str, "data": data}

    def __del__(self) -> None:
        try:
            if self.memory is not None:
                self.cache.free(self.memory)
        except KeyboardInterrupt:
            _thread.interrupt_main()  # Python ignores exceptions in __del__


class MemoryCache:
    """Freed memory by size, at most `limit` bytes; the least recently allocated sizes are dropped first.

    If the lock is held (by another thread, or by this one when the garbage collector runs), memory is allocated and
    freed normally; a thread hardly ever waits.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.kept = 0  # bytes
        self._sizes: dict[int, list[Array]] = {}
        self._lock = Lock()

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """`np.empty`, from cached memory if possible."""
        dtype = np.dtype(dtype)
        size = math.prod(shape) * dtype.itemsize + ALIGNMENT
        memory = None
        if not self._lock.locked():
            with self._lock:
                free = self._sizes[size] = self._sizes.pop(size, [])
                if free:
                    self.kept -= size
                    memory = free.pop()
        if memory is None:
            memory = np.empty(size, np.uint8)
        return np.asarray(_Buffer(self, memory, shape, dtype))

    def free(self, memory: Array) -> None:
        """Keep `memory` for another array."""
        if memory.size > self.limit or self._lock.locked():
            return
        with self._lock:
            self._sizes.setdefault(memory.size, []).append(memory)
            self.kept += memory.size
            while self.kept > self.limit:
                size, free = next(iter(self._sizes.items()))
                if free:
                    self.kept -= size
                    free.pop()
                else:
                    del self._sizes[size]

    def reset_after_fork(self) -> None:
        """A new lock: the old one may be held by a thread that the child does not have."""
        self._lock = Lock()


cache = MemoryCache(setting("TINYGRAD_BN_KEEP_MEGABYTES", 512, least=0) << 20)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=cache.reset_after_fork)


def empty(shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """`np.empty` for results."""
    small = math.prod(shape) * np.dtype(dtype).itemsize < KEEP_FROM
    return np.empty(shape, dtype) if small else cache.empty(shape, dtype)


def empty_like(x: Array) -> Array:
    """`np.empty` for results, of the shape and dtype of `x`."""
    return np.empty(x.shape, x.dtype) if x.nbytes < KEEP_FROM else cache.empty(x.shape, x.dtype)


def is_owner(x: Array) -> bool:
    """Whether `x` owns its memory, and is not a view of another array."""
    return x.base is None or isinstance(x.base, _Buffer)
