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

    At most `limit` bytes wait to be used again; beyond that, the memory that waits longest is dropped first. No Python
    code runs where memory becomes free: whether it is too much is seen at the next call of any method.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lent: dict[weakref.ref[_Buffer], Array] = {}
        self._gone: deque[weakref.ref[_Buffer]] = deque()  # each buffer that goes: `append` runs no Python code
        self._idle: OrderedDict[weakref.ref[_Buffer], Array] = OrderedDict()  # memory of buffers that are gone
        self._free: dict[int, dict[weakref.ref[_Buffer], None]] = {}  # the same, sorted by the size of their memory
        self._bytes = 0  # of the idle memory; more after a Ctrl-C, never less
        self._lock = RLock()  # a destructor, called here by the garbage collector, may allocate

    @property
    def kept(self) -> int:
        """Bytes that are kept and not in use."""
        with self._lock:
            self._settle()
            return self._count()

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """`np.empty`, from free memory if possible."""
        dtype = np.dtype(dtype)
        size = math.prod(shape) * dtype.itemsize + ALIGNMENT
        free = self._take(size)
        buffer = _Buffer(self._allocate(size) if free is None else free, shape, dtype)
        if size <= self.limit:
            self._lent[weakref.ref(buffer, self._gone.append)] = buffer.memory
        return np.asarray(buffer)

    def release(self) -> int:
        """Give all free memory back to the system. Returns its bytes."""
        with self._lock:
            self._settle()
            released = self._count()
            self._free.clear()
            self._idle.clear()
            self._bytes = 0
            return released

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
            self._settle()
            free = self._free.get(size)
            while free:
                buffer, _ = free.popitem()
                if (memory := self._idle.pop(buffer, None)) is not None:  # None after a Ctrl-C
                    self._bytes -= size
                    return memory
            self._free.pop(size, None)
            return None

    def _settle(self) -> None:
        """Count the memory of buffers that are gone, and drop what is beyond the limit."""
        while self._gone:
            buffer = self._gone[0]
            if (memory := self._lent.pop(buffer, None)) is not None:
                self._bytes += memory.size
                self._idle[buffer] = memory
                self._free.setdefault(memory.size, {})[buffer] = None
            if self._gone and self._gone[0] is buffer:  # now, as a Ctrl-C above must not lose it
                self._gone.popleft()
        if self._bytes > self.limit:
            self._bytes = self._count()
            while self._idle and self._bytes > self.limit:
                buffer, memory = self._idle.popitem(last=False)
                self._bytes -= memory.size
                free = self._free.get(memory.size, {})
                free.pop(buffer, None)
                if not free:
                    self._free.pop(memory.size, None)

    def _count(self) -> int:
        return sum(memory.size for memory in list(self._idle.values()))


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
