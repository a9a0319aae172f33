"""Loops on worker threads: complete, the same to the bit, and right beside other threads and in forked children."""

import os
import subprocess
import sys
import threading
import time

import numba
import numpy as np
import pytest
from tinygrad_bn_kernels.cpu import thread_pool, threads

from tests.tools.processes import on_threads, output, python
from tests.tools.thresholds import thresholds
from tests.tools.work import WORK

pytestmark = pytest.mark.compiled
compiled_only = pytest.mark.skipif(bool(numba.config.BOUNDSCHECK), reason="loops run on the calling thread")
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
every_work = pytest.mark.parametrize("work", WORK.values(), ids=WORK)


@pytest.fixture(autouse=True)
def parallel(monkeypatch):
    """Small work is split too."""
    monkeypatch.setattr(threads, "PARALLEL_FROM", 1)


@numba.njit(nogil=True)
def mark(done, start, stop):
    for i in range(start, stop):
        thread_pool._atomic_add(done, i, 1)


@numba.njit(nogil=True)
def meet(arrived, count, met, start, stop):
    """Wait, for some seconds at most, until `count` parts have begun."""
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
    """Of two parts: the long one, or one that ends once both have begun."""
    thread_pool._atomic_add(begun, 0, 1)
    while slow[start] > 0:
        thread_pool._atomic_add(slow, start, -1)  # which the compiler cannot leave out
    for _ in range(1 << 32):
        if thread_pool._atomic_load(begun, 0) % 2 == 0:
            break
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


@pytest.mark.parametrize("count", [1, 3])
def test_arguments_of_every_type_arrive(count):
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
def test_an_exception_in_any_part_reaches_the_caller_and_the_threads_work_on(wrong, count):
    threads.set_num_threads(count)
    for _ in range(5):
        with pytest.raises(LookupError, match="a part of the loop"):
            threads.split(fail, 12, 1, wrong)
    done = np.zeros(12, np.int64)
    threads.split(mark, 12, 1, done)
    assert (done == 1).all()


@compiled_only
@pytest.mark.parametrize("interrupted", [False, True])
def test_no_part_is_running_when_split_ends(monkeypatch, interrupted):
    """Not even after an interrupt while it waits for another thread's part."""
    threads.set_num_threads(2)
    begun, ended, interrupts = *np.zeros((2, 1), np.int64), 0

    def sleep(seconds):
        if interrupted:
            raise KeyboardInterrupt
        time.sleep(seconds)

    monkeypatch.setattr(thread_pool, "time", type("Time", (), {"sleep": staticmethod(sleep)}))
    if interrupted:  # sleep at once instead of spinning first
        monkeypatch.setattr(
            thread_pool, "_spin_until_finished", lambda job: job[thread_pool.FINISHED] == job[thread_pool.PARTS]
        )
    for i in range(100):
        # In some rounds the worker has the long part, and the caller waits for it.
        slow = np.random.default_rng(i).permutation([1 << 22, 0])
        try:
            threads.split(linger, 2, 1, begun, ended, slow)
        except KeyboardInterrupt:
            interrupts += 1
        assert begun[0] == ended[0] > 0
        if interrupts == 3 or (i == 9 and not interrupted):
            break
    assert bool(interrupts) == interrupted


@compiled_only
def test_fewer_threads_than_requested_do_all_of_the_work(monkeypatch):
    """At the system's limit the first thread starts, the second does not."""
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
    assert len(started) == 1


def test_work_while_another_thread_has_the_workers():
    threads.set_num_threads(3)
    done = np.zeros(16, np.int64)
    with threads._busy:
        threads.split(mark, 16, 1, done)
    assert (done == 1).all()


@compiled_only
def test_parts_run_on_several_threads_at_once_and_sleeping_threads_are_woken():
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


@every_work
def test_the_number_of_threads_changes_no_bit(work):
    results = set()
    with thresholds(piece=64):
        for count in (1, 2, 3, 3, 2, 1):
            threads.set_num_threads(count)
            results.add(work())
    if "reductions" not in str(work):  # too small for threads, some of these are left to NumPy
        with thresholds(piece=64, parallel_from=1 << 60):
            results.add(work())
    assert len(results) == 1


@every_work
def test_two_python_threads_while_the_number_of_workers_changes(work):
    def repeat(_):
        for _ in range(rounds):
            assert work() == want

    def change():
        for i in range(30):
            threads.set_num_threads(1 + i % 3)
            assert work() == want

    rounds = 3 if "products" in str(work) else 40
    with thresholds(piece=64):
        want = work()
        on_threads(repeat, 2, meanwhile=change)


LATE = """
import threading, time
from tests.tools.work import WORK
want = {name: work() for name, work in WORK.items()}
def late():
    time.sleep(0.3)
    assert want == {name: work() for name, work in WORK.items()}
    print("right")
threading.Thread(target=late).start()
"""


def test_a_thread_that_outlives_the_main_one_gets_the_right_answer():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TINYGRAD_BN_PARALLEL_FROM": "1"}
    program = [sys.executable, "-c", LATE]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.stderr) == ("right", "")


FORK = """
import os
from tests.tools.work import WORK, started
def results():
    return {name: work() for name, work in WORK.items()}
want = results()
assert started(), "the parent has workers, which do not survive a fork"
child = os.fork()
if child == 0:
    os._exit(0 if results() == want and started() else 1)  # the child starts workers of its own
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert results() == want
"""


@forks
def test_a_forked_child_and_its_parent_get_the_right_answer():
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
def total(x, out, start, stop):
    for i in range(start, stop):
        out[i] = 2 * x[i]


@compiled_only
def test_no_part_is_taken_twice():
    """Many parts of hardly any work, so that the threads race for each."""
    threads.set_num_threads(3)
    for _ in range(3000):
        done = np.zeros(12, np.int64)
        threads.split(mark, 12, 1, done)
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
import os, signal, threading, numba, numpy as np
from numba.core.compiler_lock import global_compiler_lock
from tests.tools.work import WORK, started
from tinygrad_bn_kernels.cpu import memory, threads
work = WORK["BatchNorm of rows"]
want = work()
inside, go_on = threading.Event(), threading.Event()

def hold():
    with LOCK:
        inside.set()
        go_on.wait(SECONDS)

threading.Thread(target=hold).start()
inside.wait()
child = os.fork()
if child == 0:  # the thread that holds the locks does not exist here
    signal.alarm(30)
    threads.set_num_threads(2)
    kept = memory.cache.kept
    memory.empty((12_345_678,), "f4")
    right = work() == want and numba.njit(lambda x: x - 1)(1) == 0
    os._exit(0 if right and started() and memory.cache.kept > kept else 1)
go_on.set()
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@compiled_only
@forks
@pytest.mark.parametrize(
    ("lock", "seconds"),
    [("threads._busy", None), ("memory.cache._lock", None), ("global_compiler_lock", 0.3)],  # a fork waits for this
)
def test_a_fork_while_another_thread_computes_allocates_or_compiles(lock, seconds):
    program = HELD.replace("LOCK", lock).replace("SECONDS", str(seconds))
    output(python(program, TINYGRAD_BN_PARALLEL_FROM=1, TINYGRAD_BN_NUM_THREADS=3))


WARM = """
import numpy as np
from numba.core import codegen
from tinygrad_bn import Tensor, functional as F
from tests.tools.work import started
compiled = []
def count(library, *args, optimize=codegen.CPUCodeLibrary._optimize_final_module):
    compiled.append(library.name)
    return optimize(library, *args)
codegen.CPUCodeLibrary._optimize_final_module = count
x = Tensor(np.ones((4, 8, 16, 16), "f4"), requires_grad=True)
F.max_pool2d(F.batch_norm(x, training=True), 2).sum().backward()
assert started(), "loops ran on several threads"
print(len([name for name in compiled if name not in ("entry", "nrt")]))  # nrt is Numba's own
"""


@compiled_only
def test_cached_loops_are_not_compiled_again_for_threads(tmp_path):
    settings = {"NUMBA_CACHE_DIR": str(tmp_path), "TINYGRAD_BN_PARALLEL_FROM": 1, "TINYGRAD_BN_NUM_THREADS": 2}
    first, second = (int(output(python(WARM, **settings))) for _ in range(2))
    assert first > 0
    assert second == 0
