"""Work in parts on Python's own threads: complete, and right beside other threads and processes."""

import os
import threading

import numpy as np
import pytest
from processes import output, python
from tinygrad_bn_kernels.cpu import threads

from tinygrad_bn import functional, ops


@pytest.fixture(autouse=True)
def parallel(monkeypatch):
    """Split small work too, and undo what a test sets."""
    before = threads.num_threads()
    monkeypatch.setattr(threads, "PARALLEL_FROM", 1)
    yield
    threads.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_item_is_done_exactly_once(count):
    threads.set_num_threads(count)
    for items in (0, 1, 2, 3, 5, 8, 27, 28, 29, 100, 1001):
        for elements in (0, 1, 10**9):
            ranges = []
            threads.split(lambda into, start, stop: into.append((start, stop)), items, elements, ranges)
            assert sorted(i for start, stop in ranges for i in range(start, stop)) == list(range(items))
            assert len(ranges) == (1 if elements == 0 or count == 1 else min(items, threads.PARTS * count) or 1)


def test_parts_run_on_several_threads_and_arguments_are_handed_on():
    threads.set_num_threads(3)
    together, seen = threading.Barrier(3, timeout=30), []

    def loop(a, b, start, stop):
        if start < 3:
            together.wait()  # passes only if three threads are in it at once
        seen.append((a, b, threading.get_ident()))

    threads.split(loop, 12, 1, "a", "b")
    assert {s[:2] for s in seen} == {("a", "b")}
    assert len({s[2] for s in seen}) == 3


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("wrong", [0, 5, 11])
def test_an_exception_in_any_part_reaches_the_caller_and_the_pool_goes_on(wrong, count):
    threads.set_num_threads(count)

    def loop(start, stop):
        if start <= wrong < stop:
            raise LookupError(wrong)

    for _ in range(20):
        with pytest.raises(LookupError, match=str(wrong)):
            threads.split(loop, 12, 1)
    done = []
    threads.split(lambda start, stop: done.extend(range(start, stop)), 12, 1)
    assert sorted(done) == list(range(12))


def test_when_split_returns_nothing_is_at_work_any_more():
    threads.set_num_threads(3)
    for fail in (False, True):
        begun, ended = [], []

        def loop(start, stop, begun=begun, ended=ended, fail=fail):
            begun.append(start)
            if fail and start == 0:
                raise LookupError
            threading.Event().wait(0.005)
            ended.append(start)

        try:
            threads.split(loop, 12, 1)
        except LookupError:
            begun.remove(0)
        assert sorted(begun) == sorted(ended)


def test_fewer_threads_than_asked_for_do_all_of_the_work(monkeypatch):
    """At a limit of processes the first thread starts, and another does not."""
    start, started = threading.Thread.start, []

    def limited(thread):
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    threads.set_num_threads(4)
    done = []

    def loop(first, stop):
        threading.Event().wait(0.2 if threading.current_thread() in started else 0.01)
        done.extend(range(first, stop))

    threads.split(loop, 16, 1)
    assert sorted(done) == list(range(16))
    assert started


def test_less_than_one_thread_is_an_error_that_changes_nothing():
    before = threads.num_threads()
    for count in (0, -1):
        with pytest.raises(ValueError, match=f"at least one thread; got {count}"):
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
import os, threading, numpy as np
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
    together = threading.Barrier(3, timeout=30)
    threads.split(lambda start, stop: start > 2 or together.wait(), 12, 1)  # the child has threads of its own
    os._exit(0 if results() == want else 1)
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
    [("TINYGRAD_BN_NUM_THREADS", "0"), ("TINYGRAD_BN_NUM_THREADS", "two"), ("TINYGRAD_BN_PARALLEL_FROM", "1e6")],
)
def test_a_wrong_setting_is_an_error_that_names_it(name, value):
    program = f"try:\n    {ENVIRONMENT.splitlines()[1]}\nexcept ValueError as e:\n    print(e)"
    assert output(python(program, **{name: value})).startswith(f"{name} has to be a whole number, at least")
