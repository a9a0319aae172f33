"""An allocator for large results that reuses freed memory.

The system zeroes fresh pages one by one, which costs as much as the arithmetic of a large result; and a training step
allocates the same sizes again and again.
"""

import math
import weakref
from collections import OrderedDict, deque
from contextlib import suppress
from threading import RLock
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from tinygrad_bn_kernels import RENEWED_IN_CHILDREN
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

    At most `limit` bytes are held here: memory that waits to be used again, and lent memory that will. For memory
    beyond that the lent memory that is oldest is forgotten, and goes back to the system with its buffer; then the
    memory that waits longest is dropped. No Python code runs where a buffer goes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lent: OrderedDict[weakref.ref[_Buffer], Array] = OrderedDict()
        self._gone: deque[weakref.ref[_Buffer]] = deque()  # each buffer that goes: `append` runs no Python code
        self._idle: OrderedDict[weakref.ref[_Buffer], Array] = OrderedDict()  # memory of buffers that are gone
        self._free: dict[int, dict[weakref.ref[_Buffer], None]] = {}  # the same, sorted by the size of their memory
        self._held = 0  # bytes of lent and idle memory; more after a Ctrl-C, never less
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
            self._lend(buffer)
        return np.asarray(buffer)

    def release(self) -> int:
        """Give all free memory back to the system. Returns its bytes."""
        with self._lock:
            self._settle()
            released = self._count()
            self._free.clear()
            self._idle.clear()
            self._held = sum(memory.size for memory in list(self._lent.values()))
            return released

    def renew_lock(self) -> None:
        """For a forked child."""
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
                    self._held -= size
                    return memory
            self._free.pop(size, None)
            return None

    def _settle(self) -> None:
        """Let the memory of buffers that are gone wait here."""
        while self._gone:
            buffer = self._gone[0]
            if (memory := self._lent.pop(buffer, None)) is not None:
                self._idle[buffer] = memory
                self._free.setdefault(memory.size, {})[buffer] = None
            if self._gone and self._gone[0] is buffer:  # now, as a Ctrl-C above must not lose it
                self._gone.popleft()

    def _lend(self, buffer: _Buffer) -> None:
        """Hold the memory of the buffer, for when it is gone, and nothing beyond the limit."""
        with self._lock:
            self._held += buffer.memory.size
            while self._held > self.limit and (held := self._lent or self._idle):
                with suppress(KeyError):  # a destructor that runs here has taken it
                    forgotten, memory = held.popitem(last=False)
                    self._held -= memory.size
                    if alike := self._free.get(memory.size):
                        alike.pop(forgotten, None)
                    if not alike:
                        self._free.pop(memory.size, None)
            if not (self._lent or self._idle):
                self._held = buffer.memory.size
            self._lent[weakref.ref(buffer, self._gone.append)] = buffer.memory

    def _count(self) -> int:
        return sum(memory.size for memory in list(self._idle.values()))


cache = MemoryCache(setting("TINYGRAD_BN_KEEP_MEGABYTES", 512, least=0) << 20)
RENEWED_IN_CHILDREN.append(cache.renew_lock)


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
