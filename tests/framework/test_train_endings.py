"""Training that ends early: by Ctrl-C, or before a step that is not finite."""

import math
import re
from functools import partial

import numpy as np
import pytest

from tests.tools.interrupts import interrupted_at
from tests.tools.training import QUIET, network, samples, state, timeless
from tinygrad_bn import Tensor, datasets, nn, optim, train
from tinygrad_bn import functional as F
from tinygrad_bn.functional import reductions
from tinygrad_bn.modes import is_recording
from tinygrad_bn.train import Callback, History, NonFiniteError, Training, fit

pytestmark = pytest.mark.filterwarnings(
    "ignore:BatchNorm1d.*met a batch whose statistics are not finite:RuntimeWarning",
    "ignore:(divide by zero|invalid value|overflow) encountered:RuntimeWarning",
)


class InterruptedAt(nn.Module):
    """Ctrl-C in the n-th forward pass."""

    def __init__(self, model: nn.Module, n: int) -> None:
        self.model, self.left = model, n

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.model(x)


@pytest.mark.parametrize("done", [1, 3])
def test_ctrl_c_in_a_callback(done):
    def callback(history, model):
        if len(history) == done:
            raise KeyboardInterrupt

    model, twin = network(), network()
    history = fit(model, samples(8), epochs=5, seed=0, callbacks=[callback], **QUIET)
    assert history.interrupted
    assert repr(timeless(history)) == repr(timeless(fit(twin, samples(8), epochs=done, seed=0, **QUIET)))
    assert state(model) == state(twin)


def test_ctrl_c_in_a_forward_pass():
    model, twin = network(), network()
    history = fit(InterruptedAt(model, 4 + 2), samples(8), epochs=5, batch_size=2, **QUIET)
    assert (len(history), history.interrupted) == (1, True)
    fit(twin, samples(8), epochs=1, batch_size=2, **QUIET)
    assert state(model) not in (state(network()), state(twin)), "two steps of the second epoch were learned too"
    for n in (0, 1):  # in the first forward pass, and in the validation
        model = InterruptedAt(network(), n)
        history = fit(model, samples(8), validation=samples(8), **QUIET)
        assert (len(history), history.interrupted, model.training) == (0, True, True)


def test_ctrl_c_in_a_callback_that_evaluates_leaves_training_mode():
    def callback(history: History, model: nn.Module) -> None:
        model.eval()
        if len(history) == 2:
            raise KeyboardInterrupt
        model.train()

    model = network()
    history = fit(model, samples(8), epochs=5, callbacks=callback, **QUIET)
    assert (len(history), history.interrupted) == (2, True)
    assert all(module.training for module in model.modules())


def test_ctrl_c_at_any_moment_leaves_everything_in_order():
    files = (*train.__path__, nn.module.__file__, reductions.__file__)

    def training(model: nn.Module) -> History:
        return fit(model, samples(4), validation=samples(4), epochs=1, batch_size=4, **QUIET)

    lines = [interrupted_at(0, partial(training, network()), files)[1] for _ in range(2)][1]  # the first call imports
    for moment in np.random.default_rng(0).integers(1, lines, 150, endpoint=True).tolist():
        model = network()
        result, ran = interrupted_at(moment, partial(training, model), files)
        assert ran >= moment
        assert reductions._listener.get() is None
        assert is_recording()
        if isinstance(result, History):
            assert result.interrupted
            assert all(module.training for module in model.modules())


# ---- what is not finite -----------------------------------------------------------------------------------


def poisoned(value: float = math.nan) -> tuple[np.ndarray, np.ndarray]:
    """32 samples. With seed 0, one in the third of four batches is not finite."""
    x, y = samples(32)
    x[list(datasets.Batches(np.arange(32), y, 8, seed=0))[2][0][5]] = value
    return x, y


def whole_state(model: nn.Module, optimizer: optim.Optimizer) -> str:
    return repr((state(model), optimizer.state_dict()))


def infinite_gradient(z: Tensor, y: np.ndarray) -> Tensor:
    """A finite loss whose gradient is infinite at 0, which it meets in the third call."""
    calls.append(None)
    return F.cross_entropy(z, y) + (F.abs(z * (len(calls) != 3)) ** 0.5).sum() * 1e-3


calls: list[None] = []

FAULTS = {
    "sample": ({"data": poisoned(), "seed": 0}, "the loss is nan, since the samples are not finite"),
    "infinite sample": ({"data": poisoned(value=-math.inf), "seed": 0}, "since the samples are not finite"),
    "gradient": ({"data": samples(32), "loss": infinite_gradient}, r"the gradient of inner\.[0-9]\.\w+ is not finite"),
}


@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_step_that_is_not_finite_stops_the_training_and_leaves_no_trace(fault, batch_norm, clip_norm):
    options, words = FAULTS[fault]
    calls.clear()
    model = network(batch_norm)
    optimizer = optim.Adam(model.parameters(), lr=0.1)
    states = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            states.append(whole_state(model, optimizer))
            return self.inner(x)

    options = {**options, "epochs": 2, "batch_size": 8, "optimizer": optimizer, "clip_norm": clip_norm}
    with pytest.raises(
        NonFiniteError, match=rf"^epoch 1, step (\d) of 4: .*{words}.*; parameters and running"
    ) as error:
        fit(Watched(), **options, **QUIET)
    assert len(states) == int(error.value.args[0].split("step ")[1][0])
    assert whole_state(model, optimizer) == states[-1]
    assert len(set(states)) == len(states) > 1
    assert (len(error.value.history), isinstance(error.value, ArithmeticError)) == (0, True)
    assert np.isfinite(np.concatenate([p.numpy().ravel() for p in model.parameters()])).all()


def test_batches_that_are_not_finite_are_skipped():
    x, y = poisoned()
    model, twin = network(), network()
    options = {"epochs": 3, "batch_size": 1, "seed": 0}
    for m in (model, twin):
        m[1].freeze()  # batches of one sample
    history = fit(model, (x, y), nonfinite="skip", **options, **QUIET)
    rng_order = datasets.Batches(x, y, 1, seed=0)
    optimizer = optim.Adam(twin.parameters())
    for _ in range(3):
        for xb, yb in rng_order:
            if np.isfinite(xb).all():
                twin.zero_grad()
                F.cross_entropy(twin(xb), yb).backward()
                optimizer.step()
    assert (history.skipped, len(history)) == (3, 3)
    assert all(map(math.isfinite, history["loss"]))
    assert state(model) == state(twin)


@pytest.mark.parametrize("optimizer", [optim.Adam, partial(optim.SGD, lr=0.1, momentum=0.9)])
def test_the_last_epoch_is_restored(optimizer):
    models, kept = [network(), network()], []
    optimizers = [optimizer(model.parameters()) for model in models]
    good, bad = samples(32), poisoned()
    x = good[0].copy()
    schedule = optim.StepLR(optimizers[0], 1, gamma=0.5)

    def callback(history: History, model: nn.Module) -> None:
        kept.append(whole_state(model, optimizers[0]))
        if len(history) == 2:
            x[:] = bad[0]

    options = {"epochs": 5, "batch_size": 8, "nonfinite": "restore", "callbacks": callback, "schedule": schedule}
    history = fit(models[0], (x, good[1]), optimizer=optimizers[0], **options, **QUIET)
    assert len(history) == 2
    assert history.diverged.startswith("epoch 3, step ")
    assert not history.interrupted
    assert whole_state(models[0], optimizers[0]) == kept[1]


OPTIMIZERS = {
    "sgd": partial(optim.SGD, lr=1.0, momentum=0.9),
    "adam": partial(optim.Adam, lr=1e-3),
    "rmsprop": partial(optim.RMSprop, momentum=0.9, centered=True),
    "adagrad": optim.Adagrad,
}


@pytest.mark.parametrize("nonfinite", ["raise", "skip", "restore"])
@pytest.mark.parametrize("at", [1, 2, 4, 8])  # the first step, and the last of the first and of the second epoch
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_would_make_a_parameter_infinite_leaves_no_trace(name, at, nonfinite):
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    states = [whole_state(model, optimizer)]

    class Watch(Callback):
        def on_step(self, training: Training) -> None:
            states.append(whole_state(model, optimizer))
            optimizer.param_groups[0]["lr"] = 1e300 if len(states) == at else rate

    rate = optimizer.param_groups[0]["lr"]
    if at == 1:
        optimizer.param_groups[0]["lr"], states = 1e300, [whole_state(model, optimizer)]
    options = {"epochs": 2, "batch_size": 8, "optimizer": optimizer, "callbacks": Watch(), "nonfinite": nonfinite}
    fault = (
        rf"epoch {(at + 3) // 4}, step {(at - 1) % 4 + 1} of 4: \S+ would become NaN or infinite: lower the learning"
    )
    if nonfinite == "raise":
        with pytest.raises(NonFiniteError, match=f"^{fault} rate; parameters and running statistics are those before"):
            fit(model, samples(32), **options, **QUIET)
        assert without_lr(whole_state(model, optimizer)) == without_lr(states[-1])
        return
    history = fit(model, samples(32), **options, **QUIET)
    assert np.isfinite(np.concatenate([p.numpy().ravel() for p in model.parameters()])).all()
    if nonfinite == "restore":
        assert re.match(fault, history.diverged)
        assert without_lr(whole_state(model, optimizer)) == without_lr(states[0 if at <= 4 else 4])
    else:
        assert history.skipped >= 1
        assert without_lr(states[at]) == without_lr(states[at - 1])


def without_lr(state: str) -> str:
    return re.sub(r"'lr': [^,}]+", "", state)


def test_a_buffer_that_would_no_longer_be_finite_stops_the_training():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            self.linear, self.seen = nn.Linear(4, 3), nn.Buffer(np.ones(2, np.float32))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.data = self.seen.numpy() * np.float32(1e20)
            return self.linear(x)

    model = Scaled()
    with pytest.raises(NonFiniteError, match=r"^epoch 1, step 2 of 4: seen would become NaN or infinite; parameters"):
        fit(model, samples(8), batch_size=2, **QUIET)
    assert model.seen.numpy().tolist() == [np.float32(1e20)] * 2


@pytest.mark.parametrize("capture", [True, False])
def test_the_only_step_of_a_training_may_not_overflow(capture):
    model = nn.Linear(1, 1, rng=np.random.default_rng(0))
    before, optimizer = state(model), optim.SGD(model.parameters(), lr=1e20)
    data = np.full((1, 1), 1e20, np.float32), np.zeros((1, 1), np.float32)
    with pytest.raises(NonFiniteError, match=r"^epoch 1, step 1 of 1"):
        fit(model, data, epochs=1, loss=F.mse_loss, optimizer=optimizer, capture=capture, **QUIET)
    assert state(model) == before


def test_a_parameter_that_is_not_finite_from_the_start_is_named():
    model = network()
    model[0].weight.data = np.full((16, 4), np.nan, np.float32)
    for nonfinite in ("raise", "skip"):
        with pytest.raises(NonFiniteError, match=r"the loss is nan; 0\.weight was not finite before this step"):
            fit(model, samples(8), nonfinite=nonfinite, **QUIET)
    masked = nn.Linear(4, 3)
    masked.bias.data = np.float32([0, 0, -np.inf])  # a class that is ruled out
    x, y = samples(32)
    assert len(fit(masked, (x, y % 2), epochs=2, optimizer=optim.SGD(masked.parameters()), **QUIET)) == 2


def test_what_is_not_finite_can_be_ignored():
    history = fit(network(batch_norm=False), poisoned(), epochs=2, nonfinite="ignore", **QUIET)
    assert all(map(math.isnan, history["loss"]))


def test_large_finite_gradients_are_not_taken_for_infinite():
    p = nn.Parameter(np.array([1.0]))

    class Model(nn.Module):
        def __init__(self) -> None:
            self.p = p

        def forward(self, x: Tensor) -> Tensor:
            return x * self.p

    sgd = optim.SGD([p], lr=1e-200)
    fit(Model(), (np.full((1, 1), 1e200), np.zeros(1)), epochs=1, loss=lambda z, y: z.sum(), optimizer=sgd, **QUIET)
    assert p.item() == 0.0


def test_a_restored_optimizer_has_the_options_of_the_last_epoch():
    """The rate that `on_step` sets in the epoch that fails is taken back too."""
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.25)

    class Watch(Callback):
        def on_epoch(self, training: Training) -> None:
            optimizer.param_groups[0]["lr"] = 0.5

        def on_step(self, training: Training) -> None:
            if optimizer.param_groups[0]["lr"] == 0.5:
                optimizer.param_groups[0]["lr"] = 1e300

    history = fit(
        model, samples(32), epochs=3, batch_size=8, optimizer=optimizer, callbacks=Watch(), nonfinite="restore", **QUIET
    )
    assert history.diverged.startswith("epoch 2, step 2")
    assert optimizer.param_groups[0]["lr"] == 0.5
