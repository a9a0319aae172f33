"""Memory is reused once no array refers to it, and at most the limit is kept."""

import gc
import weakref

import numpy as np
import pytest
from tinygrad_bn_kernels.cpu import memory
from tinygrad_bn_kernels.cpu.memory import ALIGNMENT, KEEP_FROM, MemoryCache

from tests.tools.processes import on_threads
from tinygrad_bn import Tensor, functional

MEGABYTE = 1 << 20


def place(x):
    return x.__array_interface__["data"][0]


def test_freed_memory_is_reused_and_memory_in_use_never():
    cache = MemoryCache(64 * MEGABYTE)
    first, second = (cache.empty((512, 512), np.float32) for _ in range(2))
    first[:], second[:] = 1, 2
    part, where = first[3:5, ::2], place(first)
    del first
    third = cache.empty((1024, 256), np.float32)
    third[:] = 3
    assert place(third) != where
    assert (part == 1).all()
    assert (second == 2).all()
    del part
    gc.collect()
    fourth = cache.empty((256, 512), np.float64)  # as many bytes
    assert place(fourth) == where
    assert fourth.dtype == np.float64
    assert fourth.flags.writeable
    assert fourth.flags.c_contiguous
    assert place(fourth) % ALIGNMENT == 0


def test_kept_memory_stays_below_the_limit_and_old_sizes_go_first():
    cache = MemoryCache(3 * MEGABYTE)
    arrays = [cache.empty((n, MEGABYTE), np.uint8) for n in (1, 1, 2)]
    old = weakref.ref(arrays[0].base.memory)
    while arrays:
        del arrays[0]
        gc.collect()
        assert cache.kept <= 3 * (MEGABYTE + ALIGNMENT)
    assert cache.kept <= cache.limit
    assert old() is None
    kept = cache.kept
    cache.empty((9, MEGABYTE), np.uint8)  # larger than all that may be kept: it replaces nothing
    gc.collect()
    assert cache.kept == kept > 0


def test_a_limit_of_0_keeps_nothing():
    cache = MemoryCache(0)
    del (x := [cache.empty((512, 512), np.float32)])[0]
    assert not x
    assert cache.kept == 0


def test_with_the_lock_held_memory_is_allocated_normally():
    cache = MemoryCache(64 * MEGABYTE)
    x = cache.empty((512, 512), np.float32)
    with cache._lock:
        y = cache.empty((512, 512), np.float32)
        y[:] = 1
        del x
    assert cache.kept == 0
    assert (y == 1).all()


def test_threads_never_share_an_array():
    cache = MemoryCache(64 * MEGABYTE)

    def work(number):
        for _ in range(200):
            x = cache.empty((64, 1024), np.float32)
            x[:] = number
            assert (x == number).all()

    on_threads(work, 4)


def test_gradients_are_not_copied_and_share_nothing():
    x = Tensor(np.random.default_rng(0).normal(size=(8, 64, 32, 32)).astype(np.float32), requires_grad=True)
    functional.batch_norm(x, training=True).backward(np.ones(x.shape, np.float32))
    assert type(x.grad._data.base) is memory._Buffer
    first, second = (Tensor(np.ones((512, 512), np.float32), requires_grad=True) for _ in range(2))
    (first.reshape(64, 4096).T + second.reshape(64, 4096).T).backward(np.ones((4096, 64), np.float32))
    assert not np.shares_memory(first.grad._data, second.grad._data)
    assert memory.is_owner(first.grad._data)
    assert not memory.is_owner(x.grad._data[0])
    assert not memory.is_owner(np.frombuffer(bytes(8)))


@pytest.mark.parametrize("shape", [(0,), (3,), (KEEP_FROM // 4,), (2, KEEP_FROM)])
def test_results_small_and_large(shape):
    for x in (memory.empty(shape, np.float32), memory.empty_like(np.empty(shape, np.float32))):
        assert x.shape == shape
        assert x.dtype == np.float32
        assert (type(x.base) is memory._Buffer) == (x.nbytes >= KEEP_FROM)
