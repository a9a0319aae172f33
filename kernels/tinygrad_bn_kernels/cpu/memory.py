"""An allocator for large results that reuses freed memory.

The system zeroes fresh pages one by one, which costs as much as the arithmetic of a large result; and a training step
allocates the same sizes again and again.
"""

import math
import os
import weakref
from collections import OrderedDict, deque
from threading import RLock
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from tinygrad_bn_kernels.cpu.arrays import Array
from tinygrad_bn_kernels.cpu.threads import setting

# Bytes from which memory is reused here. The C library reuses smaller blocks itself.
KEEP_FROM = 1 << 18
ALIGNMENT = 64


class _Buffer:
    """The base of an array. When no array refers to it, it is gone, and its memory is free.

    It has no `__del__`: Python would ignore a Ctrl-C that comes there.
    """

    def __init__(self, memory: Array, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.memory = memory
        start = memory.ctypes.data
        data = start + -start % ALIGNMENT, False
        self.__array_interface__ = {"version": 3, "shape": shape, "typestr": dtype.str, "data": data}


class MemoryCache:
    """Reuses the memory of buffers that are gone.

    `limit` counts memory in use too. Beyond it, the memory allocated longest ago is dropped first.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._memory: OrderedDict[weakref.ref[_Buffer], Array] = OrderedDict()  # the one lent longest ago is first
        self._gone: deque[weakref.ref[_Buffer]] = deque()  # each buffer that goes: `append` runs no Python code
        self._free: dict[int, dict[weakref.ref[_Buffer], None]] = {}  # the same, sorted by the size of their memory
        self._lock = RLock()  # a destructor, called here by the garbage collector, may allocate

    @property
    def kept(self) -> int:
        """Bytes that are kept and not in use."""
        return sum(memory.size for buffer, memory in list(self._memory.items()) if buffer() is None)

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """`np.empty`, from free memory if possible."""
        dtype = np.dtype(dtype)
        size = math.prod(shape) * dtype.itemsize + ALIGNMENT
        free = self._take(size)
        buffer = _Buffer(self._allocate(size) if free is None else free, shape, dtype)
        if size <= self.limit:
            with self._lock:
                self._memory[weakref.ref(buffer, self._gone.append)] = buffer.memory
                if free is None:
                    self._forget_oldest()
        return np.asarray(buffer)

    def release(self) -> int:
        """Give all free memory back to the system. Returns its bytes."""
        with self._lock:
            free = [buffer for buffer in self._memory if buffer() is None]
            self._free.clear()
            return sum(self._memory.pop(buffer).size for buffer in free)

    def reset_after_fork(self) -> None:
        """A new lock: the old one may be held by a thread that the child does not have."""
        self._lock = RLock()

    def _allocate(self, size: int) -> Array:
        """New memory. Gives up the free memory before it raises MemoryError."""
        try:
            return np.empty(size, np.uint8)
        except MemoryError:
            if not self.release():
                raise
        return self._allocate(size)

    def _take(self, size: int) -> Array | None:
        """Free memory of this size, no longer kept here."""
        with self._lock:
            while self._gone:
                buffer = self._gone.popleft()
                if buffer in self._memory:
                    self._free.setdefault(self._memory[buffer].size, {})[buffer] = None
            free = self._free.get(size)
            return self._memory.pop(free.popitem()[0]) if free else None

    def _forget_oldest(self) -> None:
        excess = sum(memory.size for memory in self._memory.values()) - self.limit
        while excess > 0:
            buffer, memory = self._memory.popitem(last=False)
            excess -= memory.size
            free = self._free.get(memory.size, {})
            free.pop(buffer, None)
            if not free:
                self._free.pop(memory.size, None)


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
