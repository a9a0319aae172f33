"""Explanations, `detect_anomaly`, `lint` and recorders together, in any order. Each sees only what is its own."""

import cProfile
import os
import pstats
import sys
import threading
import time
from contextlib import ExitStack, nullcontext

import numpy as np
import pytest

from tinygrad_bn import Tensor, backend, functional, hooks, nn, optim
from tinygrad_bn.diagnose import AnomalyError, LayerHistograms, StatisticsGaps, UpdateRatios, detect_anomaly, lint
from tinygrad_bn.explain import explain


class Log(nn.Module):
    def forward(self, x):
        hidden = x * 2
        return hidden.log()


def network():
    rng = np.random.default_rng(0)
    model = nn.Sequential(nn.Linear(3, 4, rng=rng), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2, rng=rng))
    return model.astype(np.float64), rng.normal(size=(8, 3)), rng.integers(0, 2, 8)


def entered(order, stack):
    blocks = {"explain": explain, "anomaly": detect_anomaly}
    return {name: stack.enter_context(blocks[name]()) for name in order}


ORDERS = [("explain", "anomaly"), ("anomaly", "explain")]


@pytest.mark.parametrize("order", ORDERS, ids=" around ".join)
def test_an_explanation_is_the_same_with_detect_anomaly(order):
    explanations = []
    for blocks in (("explain",), order):
        model, x, y = network()
        with ExitStack() as stack:
            e = entered(blocks, stack)["explain"]
            functional.cross_entropy(model(x), y).backward()
        explanations.append(e)
    alone, together = explanations
    assert list(together) == list(alone)
    assert together.program() == alone.program()
    for name in alone:
        np.testing.assert_array_equal(together[name].value, alone[name].value)
        np.testing.assert_array_equal(together[name].grad, alone[name].grad)
    assert together.kinds == alone.kinds


@pytest.mark.parametrize("order", ORDERS, ids=" around ".join)
def test_an_anomaly_is_the_same_in_an_explanation(order):
    model = nn.Sequential(nn.Identity(), Log())

    def origin(blocks, function):
        with ExitStack() as stack:
            entered(blocks, stack)
            with pytest.raises(AnomalyError) as caught:
                function()
        return str(caught.value)

    def run():
        model(np.array([1.0, -4.0]))

    assert origin(order, run) == origin(("anomaly",), run)
    assert "hidden.log()" in origin(order, run)
    root = Tensor([0.0], requires_grad=True).sqrt()
    assert "sqrt made Inf, in the backward pass" in origin(order, root.backward)


@pytest.mark.parametrize("order", ORDERS, ids=" around ".join)
def test_the_search_for_the_step_of_a_fused_op_is_not_recorded(order):
    x = Tensor(np.array([[1.0, 2.0], [1.0, 3.0]]), requires_grad=True)
    before = functional.batch_norm(x, training=True)  # fused: its composition runs again where it is judged
    with ExitStack() as stack:
        e = stack.enter_context(explain()) if order[0] == "explain" else None
        watch = stack.enter_context(detect_anomaly(stop=False))
        e = e or stack.enter_context(explain())
        before.backward(np.array([[1e308, 1.0], [-1e308, 1.0]]))
    assert watch.origin.step is not None
    assert [*e] == ["x", "before"]


def test_measurements_are_not_part_of_an_explanation():
    model, x, y = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    recorders = [LayerHistograms((x, y)), UpdateRatios(), StatisticsGaps(x)]
    with explain() as e, detect_anomaly():
        for recorder in recorders:
            recorder.measure(model)
        lint(model, x, show=False)
        assert not e.steps
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        steps, calls = len(e), len(e.calls)
        for recorder in recorders:
            recorder.measure(model, 1)
        lint(model, x, show=False)
    assert (len(e), len(e.calls), len(e.passes)) == (steps, calls, 1)
    assert recorders[1].ratios["0.weight"][1] > 0


def test_threads_look_on_for_themselves():
    places = [getattr(owner, name) for owner, name, _ in hooks.PLACES]
    barrier, found = threading.Barrier(3), {}

    def explained(i):
        x = Tensor([float(i)], requires_grad=True)
        with explain() as e:
            barrier.wait(10)
            for _ in range(i):
                x = x * 2
            x.backward()
            barrier.wait(10)
        found[i] = [step.value.item() for step in e.steps if step.op]

    def watched():
        with detect_anomaly(stop=False) as watch:
            barrier.wait(10)
            Tensor([-1.0]).log()
            barrier.wait(10)
        found["op"] = watch.origin.op

    threads = [threading.Thread(target=explained, args=(i,)) for i in (3, 5)] + [threading.Thread(target=watched)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {3: [6, 12, 24], 5: [10, 20, 40, 80, 160], "op": "log"}
    assert [getattr(owner, name) for owner, name, _ in hooks.PLACES] == places


def test_a_profiler_goes_on_after_an_explanation():
    calls = []
    x = Tensor([1.0, 2.0], requires_grad=True)

    def f(t):
        half = t * 0.5
        return half.sum()

    profiler = cProfile.Profile()
    with profiler:
        with explain() as e:
            f(x).backward()
        f(x)
    assert "half" in e
    assert sum(count for (_, _, name), (count, *_) in profiler_stats(profiler) if name == "f") >= 1
    sys.setprofile(lambda frame, event, _: calls.append(frame.f_code.co_name) if event == "call" else None)
    try:
        with explain() as e:
            f(x)
        assert sys.getprofile().__name__ == "<lambda>"
    finally:
        sys.setprofile(None)
    assert "f" in calls
    assert "half" in e


def profiler_stats(profiler):
    return pstats.Stats(profiler).stats.items()


def test_what_looks_on_sees_what_happens_in_blocks_inside_of_its_own():
    x = Tensor([-2.0], requires_grad=True)
    with detect_anomaly(stop=False) as outer, explain() as e, detect_anomaly(stop=False) as inner, explain() as e2:

        def f(t):
            half = t * 0.5
            return half.log()

        y = f(x)
    assert repr(outer.origin) == repr(inner.origin)  # a NaN is not equal to itself
    assert (outer.origin.op, y.shape) == ("log", (1,))
    assert list(e) == list(e2) == ["x", "half", "y"], "names of local variables reach both"
    assert backend.forward.__module__ == "tinygrad_bn.backend"
    assert sys.getprofile() is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks are POSIX's")
@pytest.mark.parametrize("own", [False, True], ids=["another thread looks on", "both do"])
def test_a_forked_child_forgets_who_looks_on_in_other_threads(own):
    inside, go_on = threading.Event(), threading.Event()
    original = backend.forward

    def look_on():
        with hooks.listening(object()):
            inside.set()
            go_on.wait()

    thread = threading.Thread(target=look_on)
    thread.start()
    inside.wait()
    with hooks.listening(object()) if own else nullcontext():
        child = os.fork()
        if child == 0:
            os._exit(0 if (backend.forward is original) != own else 1)
    go_on.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert backend.forward is original


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks are POSIX's")
def test_a_fork_waits_while_another_thread_replaces_functions():
    inside = threading.Event()

    def replace():
        with hooks._lock:
            inside.set()
            time.sleep(0.3)

    thread = threading.Thread(target=replace)
    thread.start()
    inside.wait()
    child = os.fork()
    if child == 0:
        os._exit(0 if hooks._lock.acquire(blocking=False) else 1)
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
