"""Work in parts on threads of our own: complete, and right beside other threads and processes."""

import os
import threading
import time

import numba
import numpy as np
import pytest
from processes import output, python
from tinygrad_bn_kernels.cpu import thread_pool, threads

from tinygrad_bn import functional, ops

compiled_only = pytest.mark.skipif(
    bool(numba.config.DISABLE_JIT or numba.config.BOUNDSCHECK), reason="loops run on the thread that calls them"
)


@pytest.fixture(autouse=True)
def parallel(monkeypatch):
    """Split small work too, and undo what a test sets."""
    before = threads.num_threads()
    monkeypatch.setattr(threads, "PARALLEL_FROM", 1)
    yield
    threads.set_num_threads(before)


@numba.njit(nogil=True)
def mark(done, start, stop):
    for i in range(start, stop):
        done[i] += 1


@numba.njit(nogil=True)
def meet(arrived, count, met, start, stop):
    """Wait in the first parts until `count` of them have begun, for some seconds at most."""
    thread_pool._atomic_add(arrived, 0, 1)
    for _ in range(1 << 32):
        if thread_pool._atomic_load(arrived, 0) >= count:
            break
    met[start] = thread_pool._atomic_load(arrived, 0) >= count


@numba.njit(nogil=True)
def fail(wrong, start, stop):
    if start <= wrong < stop:
        raise LookupError("a part of the loop")


@numba.njit(nogil=True)
def linger(begun, ended, slow, start, stop):
    thread_pool._atomic_add(begun, 0, 1)
    for i in range(slow if start else 0):
        thread_pool._atomic_load(begun, i % 1)
    thread_pool._atomic_add(ended, 0, 1)


@numba.njit(nogil=True)
def gather(c_order, f_order, gaps, read_only, half, whole, single, double, flag, pair, out, start, stop):
    for i in range(start, stop):
        arrays = c_order[i, 1] + f_order[i, 1] + gaps[i] + read_only[i]
        out[i] = arrays * (half + whole + single + double + pair[0] * pair[1]) + (1 if flag else 0)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_item_is_done_exactly_once(count):
    threads.set_num_threads(count)
    for items in (0, 1, 2, 3, 5, 8, 27, 28, 29, 100, 1001):
        for elements in (0, 1, 10**9):
            done = np.zeros(items, np.int64)
            threads.split(mark, items, elements, done)
            assert (done == 1).all()


@compiled_only
def test_parts_run_on_several_threads_at_once():
    threads.set_num_threads(3)
    arrived, met = np.zeros(1, np.int64), np.zeros(12, np.bool_)
    threads.split(meet, 12, 1, arrived, 3, met)
    assert met.all()


@pytest.mark.parametrize("count", [1, 3])
def test_arguments_of_every_kind_arrive(count):
    threads.set_num_threads(count)
    rng = np.random.default_rng(0)
    read_only = rng.normal(size=40)
    read_only.flags.writeable = False
    arrays = rng.normal(size=(40, 2)), np.asfortranarray(rng.normal(size=(40, 2))), rng.normal(size=(40, 3))[:, 1]
    for flag in (True, False):
        numbers = np.float32(0.5), 3, np.float32(0.25), 1e-3, flag, (2, 5)
        want, out = np.empty(40), np.zeros(40)
        gather(*arrays, read_only, *numbers, want, 0, 40)
        threads.split(gather, 40, 1, *arrays, read_only, *numbers, out)
        np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("wrong", [0, 5, 11])
def test_an_exception_in_any_part_reaches_the_caller_and_the_threads_go_on(wrong, count):
    threads.set_num_threads(count)
    for _ in range(5):
        with pytest.raises(LookupError, match="a part of the loop"):
            threads.split(fail, 12, 1, wrong)
    done = np.zeros(12, np.int64)
    threads.split(mark, 12, 1, done)
    assert (done == 1).all()


@compiled_only
@pytest.mark.parametrize("interrupted", [False, True])
def test_when_split_ends_nothing_is_at_work_any_more(monkeypatch, interrupted):
    """Also when it is interrupted while it waits for a part that another thread has."""
    threads.set_num_threads(3)
    begun, ended = np.zeros((2, 1), np.int64)

    def sleep(seconds):
        if interrupted:
            raise KeyboardInterrupt
        time.sleep(seconds)

    monkeypatch.setattr(thread_pool, "time", type("Time", (), {"sleep": staticmethod(sleep)}))
    for _ in range(10):
        try:
            threads.split(linger, 12, 1, begun, ended, 1 << 20)
        except KeyboardInterrupt:
            assert interrupted
        assert begun[0] == ended[0]


def test_fewer_threads_than_asked_for_do_all_of_the_work(monkeypatch):
    """At a limit of processes the first thread starts, and another does not."""
    start, started = threading.Thread.start, []

    def limited(thread):
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    threads.set_num_threads(4)
    monkeypatch.setattr(threading.Thread, "start", limited)
    done = np.zeros(16, np.int64)
    threads.split(mark, 16, 1, done)
    assert (done == 1).all()


def test_work_of_a_thread_while_the_helpers_are_taken():
    threads.set_num_threads(3)
    done = np.zeros(16, np.int64)
    with threads._busy:
        threads.split(mark, 16, 1, done)
    assert (done == 1).all()


@compiled_only
def test_threads_that_sleep_are_woken():
    threads.set_num_threads(3)
    for _ in range(3):
        arrived, met = np.zeros(1, np.int64), np.zeros(12, np.bool_)
        threads.split(meet, 12, 1, arrived, 3, met)
        assert met.all()
        time.sleep(0.1)


def test_a_wrong_number_of_threads_is_an_error_that_changes_nothing():
    before = threads.num_threads()
    for count in (0, -1, 1.5, "2", threads.MOST_THREADS + 1):
        with pytest.raises(ValueError, match=f"1 to {threads.MOST_THREADS} threads; got {count!r}"):
            threads.set_num_threads(count)
    assert threads.num_threads() == before


def test_two_python_threads_at_once_and_a_change_of_the_number_meanwhile():
    x = np.random.default_rng(0).normal(size=(300, 70)).astype(np.float32)
    target = np.arange(300) % 70

    def results():
        arrays = ops.sum(x, axis=0), functional.var(x, axis=1), ops.argmax(x, axis=0), functional.logsumexp(x, axis=0)
        return b"".join(np.asarray(a).tobytes() for a in (*arrays, functional.cross_entropy(x, target)))

    want, wrong = results(), []

    def work():
        try:
            wrong.extend(1 for _ in range(40) if results() != want)
        except Exception as error:
            wrong.append(error)

    pool = [threading.Thread(target=work) for _ in range(2)]
    for thread in pool:
        thread.start()
    for i in range(30):
        threads.set_num_threads(1 + i % 3)
        results()
    for thread in pool:
        thread.join()
    assert not wrong


FORK = """
import os, numpy as np
from tinygrad_bn import Tensor, ops, optim, functional as F
from tinygrad_bn_kernels.cpu import threads
x = np.random.default_rng(0).normal(size=(600, 256)).astype("f4")

def results():
    p = Tensor(x, requires_grad=True)
    adam = optim.Adam([p], lr=0.1)
    for _ in range(2):
        p.grad = Tensor(np.cos(x))
        adam.step()
    return [np.asarray(a).tobytes() for a in (p, ops.sum(x, axis=0), F.var(x, axis=1), ops.max(x, axis=0), F.mean(x))]

want = results()
assert threads._pool is not None, "the parent has threads, which a fork leaves behind"
child = os.fork()
if child == 0:
    os._exit(0 if results() == want and threads._pool is not None else 1)  # the child has threads of its own
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert results() == want
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_reductions_and_adam_in_a_forked_child():
    output(python(FORK, TINYGRAD_BN_PARALLEL_FROM=1, TINYGRAD_BN_NUM_THREADS=3))


ENVIRONMENT = """
from tinygrad_bn_kernels.cpu import threads
print(threads.num_threads(), threads.PARALLEL_FROM)
"""


def test_the_environment_sets_threads_and_threshold():
    assert output(python(ENVIRONMENT, TINYGRAD_BN_NUM_THREADS=5, TINYGRAD_BN_PARALLEL_FROM=7)) == "5 7"


@pytest.mark.parametrize(
    ("name", "value"),
    [("TINYGRAD_BN_NUM_THREADS", "0"), ("TINYGRAD_BN_NUM_THREADS", "5000"), ("TINYGRAD_BN_PARALLEL_FROM", "1e6")],
)
def test_a_wrong_setting_is_an_error_that_names_it(name, value):
    program = f"try:\n    {ENVIRONMENT.splitlines()[1]}\nexcept ValueError as e:\n    print(e)"
    assert output(python(program, **{name: value})).startswith(f"{name} has to be a whole number, at least")


@numba.njit(nogil=True)
def count(done, start, stop):
    for i in range(start, stop):
        thread_pool._atomic_add(done, i, 1)


@numba.njit(nogil=True)
def total(x, out, start, stop):
    for i in range(start, stop):
        out[i] = 2 * x[i]


@compiled_only
def test_no_part_is_taken_twice():
    """Many parts of hardly any work: the threads race for them."""
    threads.set_num_threads(3)
    for _ in range(3000):
        done = np.zeros(12, np.int64)
        threads.split(count, 12, 1, done)
        assert (done == 1).all()


def test_one_loop_with_arrays_of_every_layout_in_turn():
    threads.set_num_threads(3)
    plain = np.arange(60.0)
    read_only = plain.copy()
    read_only.flags.writeable = False
    for x in (plain, np.arange(120.0)[::2], read_only, plain.astype(np.float32), plain[::-1], plain):
        out = np.zeros(60, x.dtype)
        threads.split(total, 60, 1, x, out)
        np.testing.assert_array_equal(out, 2 * x)


HELD = """
import os, threading, numpy as np
from tinygrad_bn import ops
from tinygrad_bn_kernels.cpu import memory, threads
x = np.ones((600, 1000), "f4")
want = np.asarray(ops.sum(x, axis=0)).tobytes()
inside, go_on = threading.Event(), threading.Event()

def hold():
    with threads._busy, memory.cache._lock:
        inside.set()
        go_on.wait()

threading.Thread(target=hold).start()
inside.wait()
child = os.fork()
if child == 0:  # which has not the thread that holds the locks
    threads.set_num_threads(2)
    memory.empty((1 << 20,), "f4")
    right = np.asarray(ops.sum(x, axis=0)).tobytes() == want
    os._exit(0 if right and threads._pool is not None and memory.cache.kept else 1)
go_on.set()
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@compiled_only
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_fork_while_another_thread_holds_the_locks():
    output(python(HELD, TINYGRAD_BN_PARALLEL_FROM=1, TINYGRAD_BN_NUM_THREADS=3))


WARM = """
import numpy as np
from numba.core import codegen
from tinygrad_bn import Tensor, functional as F
from tinygrad_bn_kernels.cpu import threads
compiled = []
def count(library, *args, optimize=codegen.CPUCodeLibrary._optimize_final_module):
    compiled.append(library.name)
    return optimize(library, *args)
codegen.CPUCodeLibrary._optimize_final_module = count
x = Tensor(np.ones((4, 8, 16, 16), "f4"), requires_grad=True)
F.max_pool2d(F.batch_norm(x, training=True), 2).sum().backward()
assert threads._pool is not None, "loops ran on several threads"
print(len([name for name in compiled if name not in ("entry", "nrt")]))  # nrt: what Numba needs itself
"""


@compiled_only
def test_what_is_cached_is_not_compiled_again_for_threads(tmp_path):
    settings = {"NUMBA_CACHE_DIR": str(tmp_path), "TINYGRAD_BN_PARALLEL_FROM": 1, "TINYGRAD_BN_NUM_THREADS": 2}
    first, second = (int(output(python(WARM, **settings))) for _ in range(2))
    assert first > 0
    assert second == 0
