"""Loss and accuracy over batches, and the order of batches."""

import math
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tests.tools.training import QUIET, by_hand, network, samples, state
from tinygrad_bn import Tensor, manual_seed, nn, optim
from tinygrad_bn import functional as F
from tinygrad_bn.train import evaluate, fit


@pytest.mark.parametrize("batch_size", [1, 4, 7, 1000])
def test_evaluate_by_hand(batch_size):
    model = network()
    fit(model, samples(32), epochs=2, **QUIET)  # running statistics that differ from the batch's
    x, y = samples(9, seed=1)
    model[1].eval()
    modes, before = [m.training for m in model.modules()], state(model)
    score = evaluate(model, (x, y), batch_size=batch_size)
    assert [m.training for m in model.modules()] == modes
    assert state(model) == before
    loss, accuracy = by_hand(model, x, y)
    assert score.loss == pytest.approx(loss, rel=1e-5)
    assert score.accuracy == pytest.approx(accuracy, rel=1e-12)


def test_evaluate_records_nothing_and_restores_modes_after_an_error():
    model = network()
    with pytest.raises(RuntimeError, match="no_grad"):
        evaluate(model, samples(4), loss=lambda z, y: z.sum().backward())
    assert all(m.training for m in model.modules())


def test_one_column_of_outputs_has_no_accuracy():
    data = np.ones((4, 2), np.float32), np.zeros(4, np.int64)
    score = evaluate(nn.Linear(2, 1), data, loss=lambda y, t: F.mse_loss(y, t.reshape(-1, 1)))
    assert np.isnan(score.accuracy)


# ---- scores over batches of different weight --------------------------------------------------------------


@st.composite
def labelled(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    """Samples for `Scorer`, targets of which some are −100, and a batch size."""
    shape = draw(st.sampled_from([(), (3,), (2, 2)]))
    n = draw(st.integers(1, 12))
    y = draw(arrays(np.int64, (n, *shape), elements=st.sampled_from([-100, 0, 1, 2])))
    return np.random.default_rng(n).normal(size=(n, 3, *shape)), y, draw(st.integers(1, n))


class Scorer(nn.Module):
    """The samples are the scores, scaled."""

    def __init__(self) -> None:
        self.scale = nn.Parameter(np.array(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


WEIGHTS = np.array([0.5, 1.0, 3.0])
AVERAGED = {
    "cross_entropy": F.cross_entropy,
    "weighted": partial(F.cross_entropy, weight=WEIGHTS),
    "weighted and smoothed in a function": lambda z, y: F.cross_entropy(z, y, WEIGHTS, label_smoothing=0.2),
    "class 1 ignored": lambda z, y: F.cross_entropy(z, np.where(y < 0, 1, y), ignore_index=1),
    "nll": lambda z, y: F.nll_loss(F.log_softmax(z, 1), y, WEIGHTS),
    "summed": partial(F.cross_entropy, reduction="sum"),
    "sum divided by the samples": lambda z, y: F.cross_entropy(z, y, reduction="sum") / len(y),
    "sum divided by those that count": lambda z, y: F.cross_entropy(z, y, reduction="sum") / (y >= 0).sum(),
    "half a sum, cast": lambda z, y: F.mse_loss(z, z.numpy() * 0.5, reduction="sum").astype(np.float64) * 0.5,
    "two sums": lambda z, y: sum(f(z, z.numpy() + 1, reduction="sum") for f in (F.mse_loss, F.l1_loss)),
    "mean and sum": lambda z, y: F.mse_loss(z, z.numpy() + 1) + F.l1_loss(z, z.numpy() + 1, reduction="sum"),
    "beside a metric": lambda z, y: [F.mse_loss(z, z.numpy(), reduction="sum"), F.cross_entropy(z, y)][1],
    "beside a metric that ignores a class": lambda z, y: (
        F.cross_entropy(z, abs(y) % 3, ignore_index=0),
        F.cross_entropy(z, y),
    )[1],
    "with a term of the weights": lambda z, y: F.cross_entropy(z, y) * 3 + 0.5,
    "pair": lambda z, y: (F.cross_entropy(z, y), np.count_nonzero(y >= 0)),
    "mse": lambda z, y: F.mse_loss(z, z.numpy() * 0.5),
    "summed mse": lambda z, y: F.mse_loss(z, z.numpy() * 0.5, reduction="sum"),
    "two means alike": lambda z, y: F.mse_loss(z, z.numpy()) + F.l1_loss(z, z.numpy() + 1),
}


@pytest.mark.parametrize("name", AVERAGED)
@given(data=labelled())
def test_scores_do_not_depend_on_the_batches(name, data):
    x, y, size = data
    model, loss = Scorer(), AVERAGED[name]
    whole, cut = (evaluate(model, (x, y), loss=loss, batch_size=n) for n in (len(x), size))
    np.testing.assert_allclose(cut, whole, rtol=1e-9)
    counts = (y >= 0) & ((y != 1) | (name != "class 1 ignored"))
    if counts.any():
        assert whole.accuracy == np.mean((x.argmax(1) == y)[counts])
    else:
        assert math.isnan(whole.accuracy)
    sgd = optim.SGD(model.parameters(), lr=0.0)
    trained = fit(model, (x, y), epochs=1, batch_size=size, loss=loss, optimizer=sgd, **QUIET).epochs[0]
    np.testing.assert_allclose((trained.loss, trained.accuracy), whole, rtol=1e-9)


def test_a_loss_of_one_batch_size_says_how_its_sums_are_averaged():
    x, y = np.random.default_rng(0).normal(size=(4, 3)), np.array([0, 1, 2, 0])
    each = np.array([1.0, 2.0, 3.0, 4.0])

    def loss(z, y):
        return F.mse_loss(z, z.numpy() + 1, reduction="sum") / 4 + (z.mean(axis=1) * each).mean()

    with pytest.warns(UserWarning, match="taken to be divided by its samples; of twice as many"):
        evaluate(Scorer(), (x, y), loss=loss)


def test_the_mean_is_that_of_all_targets_together():
    x, y = np.random.default_rng(0).normal(size=(5, 3)), np.array([0, -100, 2, 1, -100])
    log_p = 2 * x - np.log(np.exp(2 * x).sum(1, keepdims=True))
    each, weights, some = -log_p[np.arange(5), y.clip(0)], WEIGHTS[y.clip(0)], y >= 0
    for size in (1, 2, 5):
        options = {"batch_size": size}
        assert evaluate(Scorer(), (x, y), **options).loss == pytest.approx(each[some].mean())
        for reduction in ("mean", "sum"):
            loss = partial(F.cross_entropy, weight=WEIGHTS, reduction=reduction)
            got = evaluate(Scorer(), (x, y), loss=loss, **options).loss
            assert got == pytest.approx(np.average(each[some], weights=weights[some]))
    with pytest.warns(UserWarning, match="adds means over different numbers"):
        evaluate(Scorer(), (x, y), loss=lambda z, y: F.cross_entropy(z, y) + F.mse_loss(z, z.numpy()))


MIXED = {
    "two losses": lambda z, y: F.cross_entropy(z, y) + F.mse_loss(z, z.numpy() * 0.5),
    "a term of primitives": lambda z, y: F.cross_entropy(z, y) + (z * z).mean(),
    "weights": lambda z, y: F.cross_entropy(z, np.maximum(y, 0), WEIGHTS) * 2 - F.relu(z)[0].sum(),
}


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.filterwarnings("default")
def test_a_mean_whose_weights_are_unknown_says_so(name):
    x, y = np.random.default_rng(0).normal(size=(4, 3)), np.array([0, -100, -100, -100])
    model, loss = Scorer(), MIXED[name]
    sgd = optim.SGD(model.parameters(), lr=0.0)
    with pytest.warns(UserWarning, match="approximate. Let it return a pair"):
        score = evaluate(model, (x, y), loss=loss)
    with pytest.warns(UserWarning, match="approximate. Let it return a pair"):
        epoch = fit(model, (x, y), epochs=1, batch_size=2, loss=loss, optimizer=sgd, **QUIET).epochs[0]
    assert np.isfinite([score.loss, epoch.loss]).all()  # the second batch is left out, where a mean is 0 / 0


def test_a_batch_without_targets_that_count_takes_no_step():
    x, y = samples(6)
    y[:] = -100
    model = network(batch_norm=False)
    before = state(model)
    optimizer = optim.SGD(model.parameters(), lr=1.0, weight_decay=0.5)
    epoch = fit(model, (x, y), epochs=1, batch_size=3, optimizer=optimizer, **QUIET).epochs[0]
    assert state(model) == before
    assert math.isnan(epoch.loss)
    assert math.isnan(epoch.accuracy)


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: None, lambda z, y: "low", partial(F.cross_entropy, reduction="none"),
        lambda z, y: (F.cross_entropy(z, y), 1, 2), lambda z, y: (None, 1),
    ],
)  # fmt: skip
def test_a_loss_that_is_no_number_is_an_error(loss):
    for function in (fit, evaluate):
        with pytest.raises(TypeError, match="loss has to return one number"):
            function(network(), samples(4), loss=loss)
    with pytest.raises(ValueError, match="weight of a loss has to be 0 or more; got -1"):
        evaluate(network(), samples(4), loss=lambda z, y: (F.cross_entropy(z, y), -1))
    with pytest.raises(TypeError, match="has to return a Tensor"):
        fit(network(), samples(4), loss=lambda z, y: F.cross_entropy(z.numpy(), y), **QUIET)


def test_scores_with_nan_hit_no_target():
    """NumPy's argmax takes NaN for the largest."""
    x, y = np.eye(3), np.arange(3)
    assert evaluate(Scorer(), (x, y)).accuracy == 1
    x[1, 1], x[2, 0] = np.nan, np.nan  # at the target, and beside it
    assert evaluate(Scorer(), (x, y)).accuracy == pytest.approx(1 / 3)
    sgd = optim.SGD((model := Scorer()).parameters(), lr=0.0)
    trained = fit(model, (x, y), epochs=1, optimizer=sgd, nonfinite="ignore", **QUIET)
    assert trained["accuracy"] == [pytest.approx(1 / 3)]


# ---- the order of batches ---------------------------------------------------------------------------------


def orders(**options: object) -> list[list[int]]:
    """The order in which each of three calls of `fit` sees the samples."""
    seen: list[list[int]] = []

    def loss(z: Tensor, y: np.ndarray) -> Tensor:
        seen[-1].extend(y.tolist())
        return z.sum()

    model = nn.Linear(4, 1, rng=np.random.default_rng(0))
    for _ in range(3):
        seen.append([])
        fit(model, (samples(40)[0], np.arange(40)), epochs=1, batch_size=8, loss=loss, **options, **QUIET)
    return seen


def test_calls_in_a_loop_go_on_with_other_orders():
    drawn = orders(seed=np.random.default_rng(0))
    assert drawn == orders(seed=np.random.default_rng(0))
    manual_seed(0)
    assert orders() == drawn, "the default is the generator of manual_seed"
    assert orders() != drawn
    assert len(set(map(tuple, drawn))) == 3
    assert len(set(map(tuple, orders(seed=0)))) == 1, "a number is one order"


# ---- what a loss or a model returns -------------------------------------------------------------------------

WEIGHTS_THAT_FIT = [8, 8.0, np.int64(8), np.float32(8), np.array(8), np.array([8.0]), Tensor(8.0)]


@pytest.mark.parametrize("weight", ["a", "3", None, True, 1j, np.ones(2), math.nan, math.inf, -1, np.array("3")])
def test_a_weight_is_one_number(weight):
    for function in (fit, evaluate):
        with pytest.raises((TypeError, ValueError), match="the weight of a loss has to be"):
            function(network(), samples(4), loss=lambda z, y: (F.cross_entropy(z, y), weight))


@pytest.mark.parametrize("weight", WEIGHTS_THAT_FIT, ids=repr)
def test_a_weight_may_be_any_kind_of_number(weight):
    score = evaluate(network(), samples(8), loss=lambda z, y: (F.cross_entropy(z, y), weight))
    assert score == evaluate(network(), samples(8))


@pytest.mark.parametrize("value", [np.array(1j), np.array("3"), np.array(None), "3", None, [1.0]], ids=repr)
def test_a_loss_is_a_real_number(value):
    for function in (fit, evaluate):
        with pytest.raises(TypeError, match="loss has to return one number in a Tensor"):
            function(network(), samples(4), loss=lambda z, y: value)


def test_warnings_name_the_line_of_the_caller():
    x, y = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32), np.array([0, -100, 1, -100])
    mixed = MIXED["two losses"]
    bad = np.full((4, 3), np.nan, np.float32)
    calls = {
        lambda: evaluate(Scorer(), (x, y), loss=mixed): UserWarning,
        lambda: fit(Scorer(), (x, y), epochs=1, validation=(x, y), loss=mixed, **QUIET): UserWarning,
        lambda: nn.BatchNorm1d(3)(bad): RuntimeWarning,
        lambda: fit(nn.Sequential(nn.BatchNorm1d(3)), (bad, y), epochs=1, nonfinite="ignore", **QUIET): RuntimeWarning,
    }
    for call, category in calls.items():
        with pytest.warns(category, match="approximate|not finite") as warned:
            call()
        assert {w.filename for w in warned} == {__file__}


@pytest.mark.parametrize("output", [None, np.ones((4, 3)), (Tensor([1.0]),), 1.0], ids=repr)
def test_a_model_that_returns_no_tensor_is_named(output):
    class Odd(nn.Module):
        def __init__(self) -> None:
            self.linear = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return output

    for function in (fit, evaluate):
        with pytest.raises(TypeError, match="Odd has to return a Tensor; got a"):
            function(Odd(), samples(4))


def test_an_optimizer_of_another_model_is_refused():
    before = state(model := network())
    with pytest.raises(ValueError, match="optimizer has no parameter of the model"):
        fit(model, samples(4), optimizer=optim.Adam(network().parameters()), **QUIET)
    assert state(model) == before
