"""`detect_anomaly`: the first op that made a NaN or an infinity, forwards and backwards, and where it was called."""

import threading
import weakref
from contextlib import nullcontext

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from demos import deep_mlp, gradient_flow, mnist_cnn
from tinygrad_bn import Tensor, backend, composed, datasets, functional, grad, nn, optim, train
from tinygrad_bn.diagnose import AnomalyError, detect_anomaly


class Apply(nn.Module):
    """A function as a layer."""

    def __init__(self, function):
        self.function = function

    def forward(self, x):
        return self.function(x)


def caught(function, *args):
    with pytest.raises(AnomalyError) as error, detect_anomaly():
        function(*args)
    return error.value.anomaly


def samples(n=40, features=5):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, features)).astype(np.float32)
    return x, (x[:, 0] > 0).astype(np.int64)


LOG = Apply(lambda x: x.log())


@given(st.lists(st.sampled_from(["linear", "norm", "relu", "tanh", "nested"]), max_size=6), st.data())
def test_the_path_of_the_module_that_made_it(kinds, data):
    at = data.draw(st.integers(0, len(kinds)))
    make = {
        "linear": lambda: nn.Linear(5, 5),
        "norm": lambda: nn.BatchNorm1d(5),
        "relu": nn.ReLU,
        "tanh": nn.Tanh,
        "nested": lambda: nn.Sequential(nn.BatchNorm1d(5), nn.ReLU()),
    }
    layers = [make[kind]() for kind in kinds]
    layers.insert(at, nn.Sequential(nn.Identity(), Apply(lambda x: (x - 1e6).log())))
    model = nn.Sequential(*layers, nn.Linear(5, 2))
    x, y = samples()
    anomaly = caught(lambda: functional.cross_entropy(model(x), y))
    assert (anomaly.op, anomaly.kind, anomaly.phase) == ("log", "NaN", "forward")
    assert anomaly.module == f"{at}.1 (Apply)"
    assert "(x - 1e6).log()" in str(anomaly.lines[-1])
    (operand,) = anomaly.operands
    assert operand.shape == (40, 5)
    assert operand.nans == operand.infs == 0
    assert operand.high < 0
    assert anomaly.result.nans == 200


def test_a_gradient_that_is_infinite_where_the_loss_is_finite():
    x, y = samples()
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), Apply(lambda x: x.sqrt()), nn.Linear(8, 2))
    loss = functional.cross_entropy(model(x), y)
    assert np.isfinite(loss.item())
    anomaly = caught(lambda: functional.cross_entropy(model(x), y).backward())
    assert (anomaly.op, anomaly.kind, anomaly.phase, anomaly.module) == ("sqrt", "Inf", "backward", "2 (Apply)")
    assert [operand.name for operand in anomaly.operands] == ["x", "g"]
    assert anomaly.result.name == "∂x"
    assert "x.sqrt()" in str(anomaly.lines[-1])


@pytest.mark.parametrize("mode", [nullcontext, backend.kernels_disabled])
def test_the_step_of_a_fused_op(mode):
    x = np.random.default_rng(0).normal(size=(6, 3)) * 1e200
    model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()).astype(np.float64)
    with mode():
        anomaly = caught(model, x)
    assert (anomaly.op, anomaly.module, anomaly.result.name) == ("batch_norm_relu", "0 (BatchNorm1d)", "var")
    assert [operand.name for operand in anomaly.operands] == ["x", "weight = 0.weight", "bias = 0.bias"]
    assert (anomaly.step.op, anomaly.step.kind) == ("mul", "Inf")
    assert "sq = xmu * xmu" in str(anomaly.step.line)
    assert "its step mul, functional/batch_norm.py, line" in str(anomaly)


@pytest.mark.parametrize("mode", [nullcontext, backend.kernels_disabled])
def test_the_step_of_the_gradient_of_a_fused_op(mode):
    x = Tensor(np.random.default_rng(0).normal(size=(6, 3)) * 1e-7, requires_grad=True)
    bn = nn.BatchNorm1d(3, eps=1e-15).astype(np.float64)
    with mode():
        anomaly = caught(lambda: bn(x).backward(np.full((6, 3), 1e303) * x.numpy() * 1e7))
    assert (anomaly.op, anomaly.kind, anomaly.phase) == ("batch_norm_training", "Inf", "backward")
    assert anomaly.module == "BatchNorm1d"
    assert anomaly.step.op == "mul"
    assert "xhat = xmu * ivar" in str(anomaly.step.line)
    assert "bn(x).backward" in str(anomaly.lines[-1])


def test_composed_networks_name_the_step_itself():
    with composed():
        anomaly = caught(nn.BatchNorm1d(3).astype(np.float64), np.random.default_rng(0).normal(size=(6, 3)) * 1e200)
    assert (anomaly.op, anomaly.module, anomaly.step) == ("mul", "BatchNorm1d", None)
    assert "sq = xmu * xmu" in str(anomaly.line)


def test_a_derivative_of_second_order():
    x = Tensor([4.0, 0.0], requires_grad=True)

    def second():
        dx = grad((x * functional.abs(x).sqrt()).sum(), x, create_graph=True)
        return grad(dx.sum(), x)

    anomaly = caught(second)
    assert (anomaly.op, anomaly.kind, anomaly.phase, anomaly.step.op) == ("sqrt", "NaN", "backward", "div")


def test_nan_that_comes_with_the_samples_or_a_parameter():
    x, y = samples()
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    wrong = x.copy()
    wrong[3, 2] = np.nan
    anomaly = caught(lambda: train.fit(model, (wrong, y), progress=False))
    assert (anomaly.came_in, anomaly.op, anomaly.module, anomaly.step) == (True, "linear", "0 (Linear)", None)
    assert anomaly.operands[0].nans == 1
    assert str(anomaly).startswith("linear got NaN that no op made, in the forward pass of 0 (Linear)")
    model[3].bias.data = [np.nan, 0]
    anomaly = caught(model, x)
    assert (anomaly.came_in, anomaly.module) == (True, "3 (Linear)")
    assert [operand.name for operand in anomaly.operands if operand.nans] == ["bias = 3.bias"]


def test_an_infinity_given_as_a_number_is_meant_but_no_nan_of_it():
    x = Tensor(np.arange(6.0).reshape(2, 3), requires_grad=True)
    with detect_anomaly():
        y = functional.softmax(functional.where(np.array([True, True, False]), x, -np.inf))
        (y * np.arange(3.0)).sum().backward()
        functional.max_pool2d(Tensor(np.ones((1, 1, 3, 3))), 3, padding=1)
    assert np.isfinite(x.grad.numpy()).all()
    everything = np.array([[True, True, True], [False, False, False]])
    anomaly = caught(lambda: functional.softmax(functional.where(everything, x, -np.inf)))
    assert (anomaly.op, anomaly.kind) == ("sub", "NaN"), "−∞ − (−∞), the log of the sum of no scores"
    assert [operand.infs for operand in anomaly.operands] == [3, 1]
    assert "functional/" in str(anomaly.line)


def test_an_update_that_overflows():
    x, y = samples()
    model = nn.Linear(5, 2)
    fit = {"progress": False, "nonfinite": "ignore", "optimizer": optim.SGD(model.parameters(), lr=1e39)}
    anomaly = caught(lambda: train.fit(model, (x, y), **fit))
    assert (anomaly.phase, anomaly.kind, anomaly.module, anomaly.came_in) == ("forward", "Inf", "", False)
    assert "sgd" in anomaly.op
    assert "code outside of modules" in str(anomaly)


def test_without_stopping_fit_does_what_it_does_and_its_error_has_the_origin():
    x, y = samples()
    model = nn.Sequential(nn.Linear(5, 8), nn.Sequential(nn.ReLU(), LOG), nn.Linear(8, 2))
    before = model.state_dict()
    with pytest.raises(train.NonFiniteError) as error, detect_anomaly(stop=False) as watch:
        train.fit(model, (x, y), progress=False)
    assert (watch.origin.op, watch.origin.module) == ("log", "1.1 (Apply)")
    assert error.value.__notes__ == [f"its origin: {watch.origin}"]
    assert all(np.array_equal(before[key], value) for key, value in model.state_dict().items())


def test_the_seam_is_as_before_and_other_threads_are_not_watched():
    original = backend.forward, backend.vjp
    seen = []

    def elsewhere():
        with np.errstate(all="ignore"):
            seen.append(Tensor([-1.0]).log().item())

    with detect_anomaly() as outer, detect_anomaly():
        assert backend.forward is not original[0]
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert np.isnan(seen[0])
    assert outer.origin is None
    caught(lambda: Tensor([-1.0]).log())
    assert (backend.forward, backend.vjp) == original


def test_blocks_of_two_threads_that_end_in_any_order():
    original = backend.forward, backend.vjp
    entered, left = threading.Event(), threading.Event()

    def other():
        with detect_anomaly():
            entered.set()
            left.wait(10)

    thread = threading.Thread(target=other)
    with detect_anomaly():
        thread.start()
        entered.wait(10)
    left.set()
    thread.join()
    assert (backend.forward, backend.vjp) == original


def test_arrays_are_freed_as_ever():
    w = Tensor(np.ones(4), requires_grad=True)
    with detect_anomaly():
        doubled = w * 2
        alive = weakref.ref(doubled._data)
        (functional.std(doubled + np.arange(4.0)) * w).sum().backward()
        del doubled
        assert alive() is None, "although w.grad is the sum of two gradients, of which the last is that of w * 2"
    assert w.grad is not None


def test_no_false_alarm_in_the_demos():
    digits = datasets.load("mnist5k").scaled()
    chosen = digits.take(np.arange(0, 5000, 25))
    models = [deep_mlp.build(bn, 0) for bn in (False, True)]
    models += [gradient_flow.build(*case, True, 0, depth=6) for case in gradient_flow.CASES]
    with detect_anomaly():
        for model in models:
            train.fit(model, chosen, epochs=2, progress=False, seed=0)
        train.fit(mnist_cnn.build(0), (chosen.x[:, None], chosen.y), epochs=1, progress=False, seed=0)
