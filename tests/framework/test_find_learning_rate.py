"""The search for a learning rate: against NumPy, and that it leaves everything as it was."""

import numpy as np
import pytest

from tests.tools.interrupts import caught_interrupts
from tests.tools.training import QUIET, network, samples, state
from tinygrad_bn import functional as F
from tinygrad_bn import manual_seed, nn, optim, random
from tinygrad_bn.datasets import Batches
from tinygrad_bn.train import RateSearch, find_learning_rate, fit
from tinygrad_bn.train.rates import _steepest

DATA = samples(50)


def test_losses_and_suggestion_are_those_of_numpy():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 4))
    y = x @ rng.normal(size=(4, 1)) + 3
    model = nn.Linear(4, 1)
    model.weight.data, model.bias.data = np.zeros((1, 4)), np.zeros(1)
    found = find_learning_rate(
        model, (x, y), loss=F.mse_loss, optimizer=optim.SGD(model.parameters(), lr=1.0), low=1e-4, high=1.0, steps=40,
        batch_size=16, seed=2,
    )  # fmt: skip

    w, b, raw, smooth, mean = np.zeros((4, 1)), np.zeros(1), [], [], 0.0
    batches = Batches(x, y, 16, seed=2, drop_last=True)
    stream = (batch for _ in range(99) for batch in batches)
    for i in range(40):
        xs, ys = next(stream)
        error = xs @ w + b - ys
        raw.append((error**2).mean())
        mean = 0.98 * mean + 0.02 * raw[-1]
        smooth.append(mean / (1 - 0.98 ** (i + 1)))
        if smooth[-1] > 4 * min(smooth):
            break
        rate = 1e-4 * 1e4 ** (i / 39)
        w, b = w - rate * 2 / 16 * xs.T @ error, b - rate * 2 * error.mean(0)
    assert len(raw) > 20, "else this shows little"
    np.testing.assert_allclose(found.rates, 10 ** np.linspace(-4, 0, 40)[: len(raw)])
    np.testing.assert_allclose(found.raw, raw, rtol=1e-4)  # the parameters are float32
    np.testing.assert_allclose(found.losses, smooth, rtol=1e-4)
    least = int(np.argmin(smooth))
    slopes = np.gradient(smooth[4 : least + 1])  # the rates are evenly spaced, on their logarithmic scale
    assert found.suggestion == found.rates[4 + slopes.argmin()]


def test_the_suggestion_is_the_steepest_point_before_the_least_loss():
    rates = np.geomspace(1e-6, 1, 7)
    assert _steepest(rates, np.array([9.0, 5.0, 4.9, 4.5, 2.0, 1.9, 2.4]), 1) == pytest.approx(1e-3), "not the first"
    assert _steepest(rates, np.array([5.0, 4.8, 4.0, 3.9, 30.0, 10.0, 4.0]), 0) == pytest.approx(1e-5), "not a peak"
    assert _steepest(rates, np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]), 0) is None


class Everything:
    """A model with BatchNorm and dropout, in mixed modes, a trained optimizer, gradients and generators."""

    def __init__(self):
        self.rng = np.random.default_rng(7)
        self.model = nn.Sequential(network(), nn.Dropout(0.2, rng=self.rng), nn.Linear(3, 3), nn.Dropout(0.1))
        decay = [{"params": [p], "lr": 0.01 * i} for i, p in enumerate(self.model.parameters(), 1)]
        self.optimizer = optim.Adam(decay)
        fit(self.model, DATA, epochs=2, optimizer=self.optimizer, **QUIET)
        self.model[0][1].eval()
        self.model[2].weight.requires_grad = False

    def __call__(self):
        return (
            state(self.model),
            repr(self.optimizer.state_dict()),
            [None if p.grad is None else p.grad.numpy().tobytes() for p in self.model.parameters()],
            [m.training for m in self.model.modules()],
            [repr(g.bit_generator.state) for g in (self.rng, random.generator())],
        )


def failing(at, error):
    """Cross-entropy that raises an error in call number `at`."""
    calls = []

    def loss(outputs, target):
        calls.append(1)
        if len(calls) == at:
            raise error
        return F.cross_entropy(outputs, target)

    return loss


@pytest.mark.parametrize("error", [None, ZeroDivisionError(), KeyboardInterrupt()])
@pytest.mark.parametrize("trained", [True, False])
def test_everything_stays(error, trained):
    manual_seed(1)
    things = Everything()
    if not trained:
        things.optimizer = optim.Adam(things.model.parameters())
    before, optimizer = things(), things.optimizer
    arrays = [p._data for p in things.model.parameters()]
    copies = [np.array(a) for a in arrays]
    if error is None:
        assert len(find_learning_rate(things.model, DATA, optimizer=optimizer, steps=30).rates) > 10
    else:
        with pytest.raises(type(error)):
            find_learning_rate(things.model, DATA, optimizer=optimizer, steps=30, loss=failing(20, error))
    assert things() == before
    assert all(np.array_equal(a, c) for a, c in zip(arrays, copies, strict=True))
    fit(things.model, DATA, epochs=2, optimizer=optimizer, **QUIET)
    after = things()
    manual_seed(1)
    others = Everything()
    if not trained:
        others.optimizer = optim.Adam(others.model.parameters())
    fit(others.model, DATA, epochs=2, optimizer=others.optimizer, **QUIET)
    assert others() == after, "a training after the search is one without it"


def test_everything_stays_after_ctrl_c_at_any_moment():
    things = Everything()
    before = things()

    def same():
        assert things() == before

    caught = caught_interrupts(
        150, lambda: find_learning_rate(things.model, DATA, optimizer=things.optimizer, steps=3), same
    )
    assert caught > 100


def test_the_state_of_one_parameter_and_the_gradient_of_another_stay():
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3))
    optimizer = optim.Adam([model[0].weight])
    fit(model, DATA, epochs=1, optimizer=optimizer, **QUIET)
    states = [*optimizer.state[model[0].weight].values()]
    gradient = model[1].bias.grad
    before, was = repr(states), np.array(gradient)
    find_learning_rate(model, DATA, optimizer=optimizer, steps=10)
    assert all(a is b for a, b in zip(optimizer.state[model[0].weight].values(), states, strict=True))
    assert repr(states) == before
    assert model[1].bias.grad is gradient
    assert np.array_equal(gradient, was)


def test_the_search_ends_at_four_times_the_least_smoothed_loss():
    script = [1.0] * 10 + [20.0] * 90
    values = iter(script)
    search = find_learning_rate(network(), DATA, loss=lambda outputs, _: F.mean(outputs) * 0 + next(values))
    smooth = [np.average(script[: n + 1], weights=0.98 ** np.arange(n, -1, -1)) for n in range(100)]
    end = next(n for n, value in enumerate(smooth, 1) if value > 4)
    assert 11 < end < 20
    np.testing.assert_allclose(search.losses, smooth[:end])
    assert search.suggestion is None


def test_a_generator_as_seed_stays_too():
    seed = np.random.default_rng(4)
    before = repr(seed.bit_generator.state)
    first, second = (find_learning_rate(network(), DATA, seed=seed, steps=10) for _ in range(2))
    assert repr(seed.bit_generator.state) == before
    assert first.raw.tobytes() == second.raw.tobytes()


def test_the_search_ends_where_the_loss_diverges():
    model = network(batch_norm=False)
    search = find_learning_rate(model, DATA, optimizer=optim.SGD(model.parameters(), lr=1), low=1e-3, high=1e30, seed=0)
    assert 3 < len(search.rates) == len(search.losses) < 40
    assert search.losses[-1] > 4 * search.losses.min() or not np.isfinite(search.losses[-1])
    assert np.isfinite(search.losses).all()
    assert search.losses[:-1].max() <= 4 * search.losses.min()


def test_where_a_step_is_not_finite():
    model = network(batch_norm=False)
    huge = find_learning_rate(model, DATA, optimizer=optim.SGD(model.parameters(), lr=1), low=1.0, high=1e300, steps=5)
    assert len(huge.rates) < 5
    x, y = DATA
    with pytest.raises(ValueError, match="at the first step the loss is nan, since the samples are not finite"):
        find_learning_rate(network(batch_norm=False), (x * np.nan, y))


def test_the_plot_shows_the_losses_and_the_suggestion():
    rates = np.geomspace(1e-3, 1, 4)
    figure = RateSearch(rates, np.array([3.0, 1, 2, 9]), np.array([3.0, 2, 2, 4]), 0.01).plot()
    raw, smooth, line = figure.axes[0].lines
    assert (raw.get_ydata().tolist(), smooth.get_ydata().tolist()) == ([3, 1, 2, 9], [3, 2, 2, 4])
    assert (list(line.get_xdata()), line.get_label()) == ([0.01, 0.01], "suggestion: 0.01")
    assert figure.axes[0].get_xscale() == "log"
    assert len(RateSearch(rates, rates, rates, None).plot().axes[0].lines) == 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"low": 0}, ValueError, "low has to be greater than 0 and less than high; got low=0, high=10"),
        ({"low": 1, "high": 1.0}, ValueError, "less than high"),
        ({"high": np.nan}, ValueError, "high has to be"),
        ({"steps": 1}, ValueError, "steps has to be at least 2"),
        ({"batch_size": 0}, ValueError, "batch_size has to be at least 1"),
        ({"optimizer": "adam"}, TypeError, "optimizer has to be an Optimizer, such as"),
        ({"loss": "mse"}, TypeError, "loss has to be a function"),
        ({"seed": -1}, ValueError, "seed has to be at least 0"),
    ],
)
def test_options_that_do_not_fit(options, error, message):
    with pytest.raises(error, match=message):
        find_learning_rate(network(), DATA, **options)


def test_data_that_do_not_fit():
    with pytest.raises(TypeError, match="model has to be a module"):
        find_learning_rate(len, DATA)
    with pytest.raises(ValueError, match="no samples to train on"):
        find_learning_rate(network(), (DATA[0][:0], DATA[1][:0]))
