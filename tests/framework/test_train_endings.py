"""Training that ends early: by Ctrl-C, or before a step that is not finite."""

import math
import sys
from collections.abc import Callable
from functools import partial
from linecache import getline
from types import FrameType

import numpy as np
import pytest

from tests.tools.training import QUIET, network, samples, state, timeless
from tinygrad_bn import Tensor, datasets, nn, optim, train
from tinygrad_bn import functional as F
from tinygrad_bn.functional import reductions
from tinygrad_bn.modes import is_recording
from tinygrad_bn.train import History, NonFiniteError, fit

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


def interrupted_at(moment: int, function: Callable[[], object]) -> tuple[object, int]:
    """The result of `function`, or None after KeyboardInterrupt; and how many lines it ran.

    Ctrl-C comes before a line of the training loop or of a context that it enters; not before a `with`, whose end would
    be left out.
    """
    files, lines = (*train.__path__, nn.module.__file__, reductions.__file__), 0

    def trace(frame: FrameType, event: str, arg: object) -> object:
        nonlocal lines
        if event == "line" and not getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with "):
            lines += 1
            if lines == moment:
                raise KeyboardInterrupt
        return trace

    former = sys.gettrace()
    sys.settrace(lambda frame, *_: trace if frame.f_code.co_filename.startswith(files) else None)
    try:
        return function(), lines
    except KeyboardInterrupt:
        return None, lines
    finally:
        sys.settrace(former)


def test_ctrl_c_at_any_moment_leaves_everything_in_order():
    def training(model: nn.Module) -> History:
        return fit(model, samples(4), validation=samples(4), epochs=1, batch_size=4, **QUIET)

    lines = [interrupted_at(0, partial(training, network()))[1] for _ in range(2)][1]  # the first call imports
    for moment in np.random.default_rng(0).integers(1, lines, 150, endpoint=True).tolist():
        model = network()
        result, ran = interrupted_at(moment, partial(training, model))
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


def test_parameters_that_overflowed_are_named_even_where_batches_are_skipped():
    for nonfinite in ("raise", "skip"):
        model = network(batch_norm=False)
        optimizer = optim.SGD(model.parameters(), lr=3e38)
        with pytest.raises(NonFiniteError, match=r"0\.weight is not finite itself, after the step before: lower"):
            fit(model, samples(32, seed=1), optimizer=optimizer, loss=lambda z, y: F.cross_entropy(z, y) * 1e3,
                batch_size=8, nonfinite=nonfinite, **QUIET)  # fmt: skip


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
