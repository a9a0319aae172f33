"""Memory for large results, kept when they are gone and given out again.

The system hands out fresh pages full of zeros, one by one: a large result costs as much in pages as in arithmetic, and
a training step asks for the same sizes again and again.
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

# Bytes from which a result comes from here. The C library keeps what is smaller itself.
KEEP_FROM = 1 << 18
ALIGNMENT = 64


class _Loan:
    """Some memory as an array's base: it goes back when nothing looks at it any more."""

    memory: Array | None = None  # until it is whole: it may be interrupted before

    def __init__(self, reserve: "Reserve", memory: Array, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.reserve, self.memory = reserve, memory
        start = memory.ctypes.data
        data = start + -start % ALIGNMENT, False
        self.__array_interface__ = {"version": 3, "shape": shape, "typestr": dtype.str, "data": data}

    def __del__(self) -> None:
        try:
            if self.memory is not None:
                self.reserve.give_back(self.memory)
        except KeyboardInterrupt:
            _thread.interrupt_main()  # what is raised in here would be lost


class Reserve:
    """Memory that was given back, up to `limit` bytes; beyond it the sizes that were not asked for longest go first.

    Whoever finds another thread at it, or is called by the garbage collector amidst it, does without: nobody waits.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.kept = 0  # bytes
        self._sizes: dict[int, list[Array]] = {}
        self._lock = Lock()

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """An array as of `np.empty`."""
        dtype = np.dtype(dtype)
        size = math.prod(shape) * dtype.itemsize + ALIGNMENT
        memory = None
        if not self._lock.locked():
            with self._lock:
                of_size = self._sizes[size] = self._sizes.pop(size, [])
                if of_size:
                    self.kept -= size
                    memory = of_size.pop()
        if memory is None:
            memory = np.empty(size, np.uint8)
        return np.asarray(_Loan(self, memory, shape, dtype))

    def give_back(self, memory: Array) -> None:
        """Keep `memory` for another array."""
        if memory.size > self.limit or self._lock.locked():
            return
        with self._lock:
            self._sizes.setdefault(memory.size, []).append(memory)
            self.kept += memory.size
            while self.kept > self.limit:
                size, of_size = next(iter(self._sizes.items()))
                if of_size:
                    self.kept -= size
                    of_size.pop()
                else:
                    del self._sizes[size]

    def forget(self) -> None:
        """After a fork: the lock may be held by a thread that the child does not have."""
        self._lock = Lock()


reserve = Reserve(setting("TINYGRAD_BN_KEEP_MEGABYTES", 512, least=0) << 20)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=reserve.forget)


def empty(shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """`np.empty`, for results."""
    small = math.prod(shape) * np.dtype(dtype).itemsize < KEEP_FROM
    return np.empty(shape, dtype) if small else reserve.empty(shape, dtype)


def empty_like(x: Array) -> Array:
    """An array in the shape and dtype of `x`, for results."""
    return np.empty(x.shape, x.dtype) if x.nbytes < KEEP_FROM else reserve.empty(x.shape, x.dtype)


def is_owner(x: Array) -> bool:
    """Whether the memory of `x` is its own, or from here, and not another array's."""
    return x.base is None or isinstance(x.base, _Loan)
