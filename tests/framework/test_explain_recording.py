"""What a block of `explain` records, and that it leaves the engine as it was."""

import subprocess
import sys
import threading

import numpy as np
import pytest

from tests.tools.explained import expect_shares_that_sum, network
from tinygrad_bn import Tensor, functional, hooks, nn, no_grad, optim
from tinygrad_bn.explain import explain
from tinygrad_bn.tensor import OPS


def test_a_function_is_explained_with_the_names_of_its_parameters():
    e = explain(lambda weight, x: (weight * x).sum(), np.array([1.0, 2.0]), np.array([3.0, 4.0]))
    assert e["weight"].grad.tolist() == [3, 4]
    assert e["x"].formula == "given"
    assert e["result"].value == 11
    bn = nn.BatchNorm1d(2).astype(np.float64)
    x, g = np.random.default_rng(0).normal(size=(2, 5, 2))
    e = explain(bn, x, g=g)
    assert np.abs(e["x"].grad.sum(0)).max() < 1e-12
    assert explain(bn, x)["x"].grad is None, "without a cotangent there is no backward pass"


def test_a_graph_from_before_the_block_is_one_box_for_each_op():
    x = Tensor(np.random.default_rng(0).normal(size=(4, 2)), requires_grad=True)
    before = functional.batch_norm(x, training=True)
    with explain() as e:
        (before * before * before).backward(np.ones((4, 2)))
    assert e["before"].formula.startswith("before = batch_norm_training(x, None, None, eps=1e-05")
    assert e["before"].formula.endswith(OPS["batch_norm_training"].formula)
    assert [c.phase for c in e.calls].index("backward") == 2, "two products, then the pass"
    assert {c.phase for c in e.calls[2:]} == {"backward"}
    np.testing.assert_array_equal(e["x"].grad, x.grad.numpy())
    expect_shares_that_sum(e["x"], via=[])


def test_a_deep_graph():
    x = Tensor([1.0], requires_grad=True)
    y = x
    for _ in range(1500):
        y = y * 1.0
    with explain() as e:
        z = y + 1
        for _ in range(1500):
            z = z * 1.0
        z.backward()
    assert len(e) == 3002
    assert e["x"].grad.tolist() == [1]
    assert [share.tolist() for share in e["x"].paths(via=["y"]).values()] == [[1]]


def test_values_stay_those_of_the_block():
    model, x, target = network()
    optimizer = optim.Adam(model.parameters(), lr=0.1)
    weight = model[0].weight.numpy().copy()
    with explain() as e:
        functional.cross_entropy(model(x), target).backward()
        optimizer.step()
    np.testing.assert_array_equal(e["0.weight"].value, weight)
    assert np.abs(model[0].weight.numpy() - weight).max() > 0.01
    with pytest.raises(RuntimeError, match="has recorded a block already"), e:
        pass


def test_without_gradients():
    model, x, _ = network()
    with explain() as e, no_grad():
        y = model(x)
    assert e["1.xhat"].grad is None
    assert not e.passes
    assert e["y"].value.shape == y.shape


def test_the_engine_is_as_before_after_a_block_that_fails():
    before = [getattr(owner, name) for owner, name, _ in hooks.PLACES]
    x = Tensor([1.0])
    with pytest.raises(TypeError, match="real numbers"), explain():
        x + np.array([1j])
    assert [getattr(owner, name) for owner, name, _ in hooks.PLACES] == before
    assert sys.getprofile() is None


def test_another_thread_is_not_recorded():
    x = Tensor([1.0], requires_grad=True)
    results = []
    with explain() as e:
        thread = threading.Thread(
            target=lambda: results.append(functional.batch_norm(Tensor([[1.0], [3.0]]), None, None, None, None, True))
        )
        thread.start()
        thread.join()
        y = x + 1
    assert [*e] == ["x", "y"]
    assert results[0].numpy().round(3).tolist() == [[-1], [1]]
    assert y.item() == 2


def test_a_block_in_a_block_records_for_itself():
    x = Tensor([2.0], requires_grad=True)
    with explain() as outer:
        a = x * 2
        with explain() as inner:
            b = a + 1
        c = b * a
    assert [k for k in inner if k != "x"] == ["a", "b"]
    assert {"a", "c"} <= set(outer)
    assert outer["a"].users == ["b", "c"]
    assert c.item() == 20


COST = """
import sys
import numpy as np
from tinygrad_bn import Tensor, functional, nn, optim

rng = np.random.default_rng(0)
model = nn.Sequential(nn.Linear(3, 4, rng=rng), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3, rng=rng))
x, target = rng.normal(size=(8, 3)).astype(np.float32), rng.integers(0, 3, 8)
optimizer = optim.Adam(model.parameters())

def step():
    functional.cross_entropy(model(x), target).backward()
    optimizer.step()
    optimizer.zero_grad()

def bytecodes():
    counted = 0
    def trace(frame, event, arg):
        nonlocal counted
        frame.f_trace_opcodes = True
        counted += event == "opcode"
        return trace
    sys._getframe().f_trace_opcodes = True  # Python 3.12 asks a frame before the trace begins
    sys.settrace(trace)
    try:
        step()
    finally:
        sys.settrace(None)
    return counted

for _ in range(5):  # kernels, caches
    step()
before = bytecodes()
from tinygrad_bn.explain import explain
imported = bytecodes()
with explain() as e:
    step()
steps = len(e)
del e  # it keeps arrays, whose memory steps reuse
for _ in range(5):
    step()
print(before, imported, bytecodes(), steps)
"""


@pytest.mark.compiled  # loops in Python have bytecodes of their own, which depend on the numbers
def test_a_step_costs_the_same_when_nothing_is_explained():
    done = subprocess.run([sys.executable, "-c", COST], capture_output=True, text=True, check=True)
    before, imported, after, steps = map(int, done.stdout.split())
    assert before > 1000
    assert steps > 30
    assert before == imported == after
