"""Where a captured program steps aside: modes, later proofs, kernels that decline or raise; and what it frees."""

import importlib
import weakref
from copy import deepcopy
from unittest.mock import Mock

import numpy as np
import pytest
import tinygrad_bn_kernels

from tinygrad_bn import Tensor, autograd, composed, debug, hooks, nn
from tinygrad_bn.captured import capture
from tinygrad_bn.captured.program import Program
from tinygrad_bn.diagnose import detect_anomaly
from tinygrad_bn.explain import explain
from tinygrad_bn.tensor import OPS, primitive

RNG = np.random.default_rng(0)
X, G = RNG.normal(size=(2, 6, 4)).astype(np.float32)
IN_PROGRAM = 3  # calls: one is recorded, one proves the program, one runs it; and so does the next


@pytest.fixture
def counted(monkeypatch):
    """A captured function whose program has run once, and a list that gets an element where the program runs."""
    ran = []
    run = Program.run
    monkeypatch.setattr(Program, "run", lambda program, inputs: ran.append(None) or run(program, inputs))
    step = capture(lambda x: (Tensor(x) * 2).exp())
    for _ in range(IN_PROGRAM):
        step(X)
    assert len(ran) == 1
    return step, ran


@pytest.fixture
def kernel(request):
    """Declare the op "planted" by a reference, and give it a kernel."""

    def declare(reference, kernel):
        reference.__name__ = "planted"
        op = primitive(lambda g, y, x: g, formula="y = x", sample=lambda d: ((d.array_like,), {}))(reference)
        tinygrad_bn_kernels.kernel("planted", "cpu")(kernel)
        return op

    yield declare
    OPS.pop("planted", None)
    tinygrad_bn_kernels._kernels.pop(("planted", "cpu"), None)


BLOCKS = {
    "composed": composed,
    "debug": debug,
    "observe": lambda: nn.observe(lambda module, y: None),
    "explain": explain,
    "detect_anomaly": detect_anomaly,
    "listening": lambda: hooks.listening(object()),
}


@pytest.mark.parametrize("block", BLOCKS)
def test_the_function_itself_runs_where_a_listener_looks_on(block, counted):
    step, ran = counted
    with BLOCKS[block]():
        step(X)
        assert len(ran) == 1
    step(X)
    assert len(ran) == 2, "the program runs again"


def test_a_program_is_proven_again_and_again(monkeypatch, counted):
    module = importlib.import_module("tinygrad_bn.captured.capture")
    monkeypatch.setattr(module, "EVERY", 8)
    step, ran = counted
    for _ in range(100):
        step(X)
    proven = [n for n in range(2, 102) if n in module.PROOFS or n % 8 == 0]
    assert len(ran) == 101 - len(proven)


def test_a_result_is_freed_after_its_last_use(kernel):
    made, alive = [], []

    def grown(x):
        alive.append(sum(ref() is not None for ref in made))
        y = x + 1
        made.append(weakref.ref(y))
        return y

    grow = kernel(lambda x: x + 1, grown)
    step = capture(lambda x: grow(grow(grow(grow(grow(Tensor(x)))))))
    for _ in range(IN_PROGRAM):
        made.clear()
        alive.clear()
        y = step(X)
    assert np.array_equal(y.numpy(), X + 1 + 1 + 1 + 1 + 1)
    assert alive == [0, 1, 1, 1, 1]


@pytest.mark.parametrize("error", [ValueError, TypeError, IndexError, OverflowError])
def test_an_error_of_a_kernel_has_the_words_of_the_engine(kernel, error):
    def choosy(x):
        if x[0, 0] == 7:
            raise error("no sevens")
        return x + 1

    op = kernel(lambda x: x + 1, choosy)
    step = capture(lambda x: op(Tensor(x)))
    for _ in range(IN_PROGRAM):
        step(X)
    with pytest.raises(error, match=r"^planted\(float32 \(6, 4\)\): no sevens$"):
        step(np.full_like(X, 7))
    assert np.array_equal(step(X).numpy(), X + 1)


def test_the_reference_answers_where_a_kernel_declines(kernel):
    op = kernel(lambda x: x + 1, lambda x: NotImplemented if x[0, 0] == 7 else x + 1)
    step = capture(lambda x: op(Tensor(x)))
    for _ in range(IN_PROGRAM):
        step(X)
    assert np.array_equal(step(np.full_like(X, 7)).numpy(), np.full_like(X, 8))


NORMS = {
    "BatchNorm": [nn.BatchNorm1d(4)],
    "BatchNorm and ReLU": [nn.BatchNorm1d(4), nn.ReLU()],
    "BatchNorm in evaluation": [nn.BatchNorm1d(4).eval()],
    "LayerNorm": [nn.LayerNorm(4)],
    "RMSNorm": [nn.RMSNorm(4)],
    "GroupNorm": [nn.GroupNorm(2, 4)],
}


@pytest.mark.compiled
@pytest.mark.parametrize("name", NORMS)
def test_the_composition_answers_where_a_norm_declines(name, monkeypatch):
    """Kernels of norms decline deviations above 1e18 in float32, forwards and backwards."""
    pulled = Mock(wraps=autograd._pull_composition)
    monkeypatch.setattr(autograd, "_pull_composition", pulled)
    ends = []
    for wrap in (lambda f: f, capture):
        model = nn.Sequential(nn.Linear(4, 4, rng=np.random.default_rng(0)), *deepcopy(NORMS[name]))

        def function(x, model=model):
            model.zero_grad()
            y = model(Tensor(x))
            (y * G).sum().backward()
            return y

        step = wrap(function)
        for _ in range(IN_PROGRAM):
            step(X)
        pulled.assert_not_called()  # kernels take usual numbers
        if not model[1].training:
            model[1].running_var.data = np.full(4, 1e38, np.float32)
        y = step(X * np.float32(1e19))
        pulled.assert_called_once()
        pulled.reset_mock()
        ends.append([y.numpy().tolist(), *(p.grad.numpy().tolist() for p in model.parameters())])
    assert repr(ends[0]) == repr(ends[1])
    assert len(step.programs) == 1
