"""Memory is reused once no array refers to it, and at most the limit is kept."""

import gc
import sys
import weakref
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from tinygrad_bn_kernels.cpu import memory
from tinygrad_bn_kernels.cpu.memory import ALIGNMENT, KEEP_FROM, MemoryCache

from tests.tools.interrupts import caught_interrupts
from tests.tools.processes import on_threads, output, python
from tinygrad_bn import Tensor, backend, functional, optim

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


def test_a_destructor_may_allocate_while_the_lock_is_held():
    cache = MemoryCache(64 * MEGABYTE)
    x = cache.empty((512, 512), np.float32)
    with cache._lock:
        y = cache.empty((512, 512), np.float32)
        y[:] = 1
        where = place(x)
        del x
        assert place(cache.empty((512, 512), np.float32)) == where
    assert (y == 1).all()


def test_memory_is_freed_without_python_code():
    """Python ignores a Ctrl-C that comes in a destructor."""
    cache = MemoryCache(64 * MEGABYTE)
    arrays, calls = [cache.empty((512, 512), np.float32) for _ in range(3)], []
    before = sys.gettrace()
    sys.settrace(lambda *event: calls.append(event))
    try:
        arrays.clear()
    finally:
        sys.settrace(before)
    assert cache.kept == 3 * (MEGABYTE + ALIGNMENT)
    assert not calls


def test_interrupts_reach_the_program_and_the_cache_works_on():
    cache = MemoryCache(8 * MEGABYTE)
    work = partial(cache.empty, (512, 512), np.float32)
    assert caught_interrupts(200, work, lambda: None) == 200
    where = place(cache.empty((512, 512), np.float32))
    assert place(cache.empty((512, 512), np.float32)) == where
    assert cache.kept <= cache.limit


def test_an_interrupt_while_memory_is_lent_takes_no_room_from_later_memory(monkeypatch):
    cache = MemoryCache(3 * (MEGABYTE + ALIGNMENT))

    def interrupted(*_):
        raise KeyboardInterrupt

    for _ in range(4):  # together more than the limit
        with monkeypatch.context() as patch:
            patch.setattr(memory, "weakref", SimpleNamespace(ref=interrupted))
            with pytest.raises(KeyboardInterrupt):
                cache.empty((MEGABYTE,), np.uint8)
    arrays = [cache.empty((MEGABYTE,), np.uint8) for _ in range(3)]
    arrays.clear()
    assert cache.kept == cache.limit


def test_memory_in_use_is_forgotten_when_newer_memory_needs_the_room():
    cache = MemoryCache(3 * MEGABYTE + 3 * ALIGNMENT)
    held, temporary = [cache.empty((MEGABYTE,), np.uint8) for _ in range(8)], set()
    for _ in range(4):
        temporary.add(place(cache.empty((MEGABYTE,), np.uint8)))
    assert len(temporary) == 1
    del held
    assert 0 < cache.kept <= cache.limit
    kept = cache.kept
    assert cache.release() == kept
    assert cache.kept == 0


def test_memory_beyond_the_limit_goes_back_with_its_array():
    cache = MemoryCache(3 * MEGABYTE + 3 * ALIGNMENT)
    arrays = [cache.empty((MEGABYTE,), np.uint8) for _ in range(8)]
    memory = [weakref.ref(a.base.memory) for a in arrays]
    arrays.clear()  # and no call of the cache after that
    assert [m() is None for m in memory] == [True] * 5 + [False] * 3


def test_memory_in_use_takes_no_room_from_memory_that_waits():
    cache = MemoryCache(3 * MEGABYTE)
    where = place(cache.empty((MEGABYTE,), np.uint8))
    held = [cache.empty((MEGABYTE - ALIGNMENT,), np.uint8) for _ in range(8)]
    assert place(cache.empty((MEGABYTE,), np.uint8)) == where
    del held
    assert MEGABYTE < cache.kept <= cache.limit
    assert cache._held == cache.kept


def test_sizes_that_do_not_come_again_leave_nothing():
    cache = MemoryCache(4 * MEGABYTE)
    for n in range(200):
        cache.empty((MEGABYTE + n,), np.uint8)
    assert len(cache._lent) + len(cache._idle) + len(cache._free) + len(cache._gone) < 12


FULL = """
import resource
import numpy as np
import tinygrad_bn
from tinygrad_bn import Tensor, functional as F
from tinygrad_bn_kernels.cpu import memory

x = np.ones((106 << 20) // 4, "f4")
F.relu(Tensor(np.ones(1 << 20, "f4"), requires_grad=True)).backward(np.ones(1 << 20, "f4"))  # imports all

def keep():
    del (arrays := [memory.empty(x.shape, "f4") for _ in range(4)])[:]
    assert memory.cache.kept > 420 << 20

def in_use():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()

keep()
resource.setrlimit(resource.RLIMIT_AS, (in_use() + (20 << 20), -1))
for needs_memory in NEEDS:
    keep()
    needs_memory()
keep()
assert tinygrad_bn.empty_cache() > 420 << 20
assert memory.cache.kept == 0
np.empty(200 << 20, "u1")
try:
    F.add(x, np.ones((8, 1), "f4"))
except MemoryError:
    print("too much")
"""
NEEDS = """[
    lambda: memory.empty((50 << 20,), "f4"),
    lambda: F.concatenate([x, x]),
    lambda: Tensor(np.broadcast_to(np.float32(1), (50 << 20,))),
    lambda: F.exp(np.broadcast_to(np.float32(1), (50 << 20,))),
]"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and a limit for memory")
def test_memory_that_is_kept_is_given_up_before_memory_is_full():
    assert output(python(FULL.replace("NEEDS", NEEDS))) == "too much"


@pytest.fixture
def kept_memory():
    """Memory that an op may get back."""
    memory.empty((KEEP_FROM,), np.float32)
    assert memory.cache.kept


def test_an_op_is_run_again_with_the_memory_that_was_kept(monkeypatch, kept_memory):
    calls = []

    def exp(x):
        calls.append(memory.cache.kept)
        if len(calls) == 1:
            raise MemoryError
        return NotImplemented

    monkeypatch.setattr(backend, "find_kernel", lambda name, device: exp)
    assert functional.exp(np.zeros(3)).tolist() == [1, 1, 1]
    assert calls == [calls[0], 0]


def test_an_op_that_has_overwritten_its_operands_is_not_run_again(monkeypatch, kept_memory):
    p, seen = Tensor([1.0], requires_grad=True), []
    optimizer = optim.SGD([p], lr=1.0, momentum=0.5)
    p.grad = Tensor([1.0])
    optimizer.step()

    def momentum(p, g, v, **options):
        seen.append(v.copy())
        v += g
        raise MemoryError

    monkeypatch.setattr(backend, "find_kernel", lambda name, device: momentum)
    with pytest.raises(MemoryError):
        optimizer.step()
    assert seen == [[1.0]]


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
