"""Python threads that train one model lose no gradient and no batch, and a fork waits for none of them."""

import os
import sys
import threading

import numpy as np
import pytest

from tests.tools.processes import on_threads
from tinygrad_bn import Tensor, backend, nn

THREADS, STEPS = 4, 150


@pytest.fixture(autouse=True)
def frequent_switches():
    """Threads take turns every microsecond."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_of_all_threads_add_up(create_graph):
    leaf, ones = Tensor(np.zeros(200_000), requires_grad=True), np.ones(200_000)

    def work(_):
        for _ in range(STEPS):
            (leaf + 1).backward(ones, create_graph=create_graph)

    on_threads(work, THREADS)
    assert set(leaf.grad.numpy()) == {THREADS * STEPS}


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batches_of_all_threads_are_counted(momentum):
    layer, x = nn.BatchNorm1d(2, momentum=momentum), np.array([[1.0, 2.0], [3.0, 6.0]], np.float32)

    def work(_):
        for _ in range(STEPS):
            layer(x)

    on_threads(work, THREADS)
    assert layer.num_batches_tracked.item() == THREADS * STEPS
    if momentum is None:
        np.testing.assert_allclose(layer.running_mean.numpy(), [2, 4], rtol=1e-5)
        np.testing.assert_allclose(layer.running_var.numpy(), [2, 8], rtol=1e-5)


@pytest.mark.compiled  # loops in Python warn of NaN
def test_skipped_batches_of_all_threads_are_counted():
    layer, x = nn.BatchNorm1d(1), np.array([[np.inf], [1.0]], np.float32)
    with pytest.warns(RuntimeWarning, match="not finite"):
        layer(x)
    on_threads(lambda _: [layer(x) for _ in range(STEPS)], THREADS)
    assert layer.num_batches_skipped == THREADS * STEPS + 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks are POSIX's")
def test_a_forked_child_does_not_inherit_a_held_lock():
    inside, go_on = threading.Event(), threading.Event()

    def hold():
        with backend.updating:
            inside.set()
            go_on.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    child = os.fork()
    if child == 0:
        os._exit(0 if backend.updating.acquire(blocking=False) else 1)
    go_on.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
