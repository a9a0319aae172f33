"""Training steps leave nothing behind, counted exactly and without the cycle collector; `make soak` takes longer."""

import gc
from functools import partial

import pytest

from tests import soak
from tests.tools.networks import NETWORKS, Training, deep_graph, wide_graph

pytestmark = pytest.mark.slow

EXACT = ("tensors", "nodes", "programs", "cached", "threads", "files")
WARM_UP, ROUNDS = 3, 3  # rounds of all batch sizes; compiling and recording, in the first, leave cycles of Numba's


def expect_nothing_left(training, work):
    """After a warm-up, each of the ROUNDS of `work` leaves as much as the one before, and no cycle."""
    with soak.without_collector():
        for _ in range(WARM_UP):
            work()
        gc.collect()
        warm = soak.counts(training)
        for _ in range(ROUNDS):
            work()
            now = soak.counts(training)
            assert {key: now[key] for key in EXACT} == {key: warm[key] for key in EXACT}
        assert gc.collect() == 0
    return warm


@pytest.mark.compiled
@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_training_steps_of_every_size_leave_nothing_behind(name, captured):
    """With `capture`, the program of each size is proven again in the fifth round, by another record."""
    training = Training(name, captured)
    warm = expect_nothing_left(training, lambda: [training.step(n) for n in range(Training.PERIOD)])
    assert warm["programs"] == (Training.PERIOD if captured else 0)


@pytest.mark.parametrize("graph", [deep_graph, partial(wide_graph, 300)])
def test_large_graphs_leave_nothing_behind(graph):
    expect_nothing_left(Training("titanic_mlp", captured=False), graph)
