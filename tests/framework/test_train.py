"""fit, evaluate and History."""

import csv
import json
import math
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tinygrad_bn import Tensor, datasets, manual_seed, nn, optim
from tinygrad_bn import functional as F
from tinygrad_bn.train import Epoch, History, NonFiniteError, evaluate, fit, recalibrate, statistics_gap

IRIS = datasets.load("iris")
QUIET = {"progress": False}


def network(batch_norm: bool = True, seed: int = 0) -> nn.Sequential:
    manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 16), *([nn.BatchNorm1d(16)] if batch_norm else []), nn.ReLU(), nn.Linear(16, 3))


def state(model: nn.Module) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in model.state_dict().items()}


def samples(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 4)).astype(np.float32), rng.integers(0, 3, n)


def by_hand(model: nn.Sequential, x: np.ndarray, y: np.ndarray, by_batch: bool = False) -> tuple[float, float]:
    """Mean loss and accuracy of `network`, normalised by running statistics or those of x."""
    w1, b1, gamma, beta, mean, var, _, w2, b2 = model.state_dict().values()
    h = x @ w1.T + b1
    mean, var = (h.mean(0), h.var(0)) if by_batch else (mean, var)
    z = np.maximum((h - mean) / np.sqrt(var + 1e-5) * gamma + beta, 0) @ w2.T + b2
    return np.mean(np.log(np.exp(z).sum(1)) - z[np.arange(len(y)), y]), np.mean(z.argmax(1) == y)


def timeless(history: History) -> list[tuple[float, ...]]:
    return [(e.epoch, e.loss, e.accuracy, e.val_loss, e.val_accuracy) for e in history.epochs]


class InterruptedAt(nn.Module):
    """Ctrl-C in the n-th forward pass."""

    def __init__(self, model: nn.Module, n: int) -> None:
        self.model, self.left = model, n

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.model(x)


def test_iris_is_learned_and_the_same_seed_gives_the_same_numbers():
    training, validation = IRIS.split(30)
    runs, models = [], []
    for seed in (0, 0, 1):
        models.append(network(batch_norm=False).eval())  # fit sets training mode
        optimizer = optim.Adam(models[-1].parameters(), lr=1e-2)
        options = {"validation": validation, "batch_size": 16, "optimizer": optimizer, "seed": seed, **QUIET}
        runs.append(fit(models[-1], training, epochs=15, **options))
    assert runs[0]["val_accuracy"][-1] >= 0.9
    assert runs[0]["epoch"] == list(range(1, 16))
    assert timeless(runs[0]) == timeless(runs[1])
    assert state(models[0]) == state(models[1])
    assert timeless(runs[0]) != timeless(runs[2]), "the seed is used"
    assert all(module.training for module in models[0].modules())
    assert runs[0].seconds == sum(runs[0]["seconds"]) > 0


def test_an_epoch_by_hand():
    """Losses are means over samples, so the batches of 4, 4 and 3 have different weights."""
    x, y = samples(11)
    model, twin = network(), network()
    options = {"epochs": 2, "batch_size": 4, "seed": 0, **QUIET}
    history = fit(model, (x, y), optimizer=optim.SGD(model.parameters(), lr=0.5), **options)
    batches, sgd = datasets.Batches(x, y, 4, seed=0), optim.SGD(twin.parameters(), lr=0.5)
    for epoch in history.epochs:
        losses, hits = [], []
        for xb, yb in batches:
            twin.zero_grad()
            z = twin(Tensor(xb))
            rows = F.cross_entropy(z, yb, reduction="none")
            F.cross_entropy(z, yb).backward()
            sgd.step()
            losses += rows.numpy().tolist()
            hits += (z.numpy().argmax(1) == yb).tolist()
        assert epoch.loss == pytest.approx(np.mean(losses), rel=1e-5)
        assert epoch.accuracy == pytest.approx(np.mean(hits), rel=1e-12)
    assert state(model) == state(twin)


def test_callbacks():
    calls = []

    def first(history, model):
        calls.append(("first", len(history), model))
        return len(history) == 2

    def second(history, model):
        calls.append(("second", len(history), model))

    model = network()
    history = fit(model, samples(8), epochs=5, callbacks=iter([first, second]), **QUIET)
    assert calls == [(name, n, model) for n in (1, 2) for name in ("first", "second")]
    assert len(history) == 2
    assert not history.interrupted


def test_schedule_is_stepped_after_every_epoch():
    model, rates = network(), []
    optimizer = optim.SGD(model.parameters(), lr=1.0)
    schedule = optim.StepLR(optimizer, 1, gamma=0.5)
    record = [lambda history, model: rates.append(optimizer.param_groups[0]["lr"])]
    fit(model, samples(8), epochs=3, batch_size=2, optimizer=optimizer, schedule=schedule, callbacks=record, **QUIET)
    assert rates == [0.5, 0.25, 0.125]


def test_clip_norm_limits_each_step():
    def moved(clip_norm: float | None) -> float:
        model = network(batch_norm=False)
        before = [np.array(p) for p in model.parameters()]
        optimizer = optim.SGD(model.parameters(), lr=1.0)
        fit(model, samples(8), epochs=1, batch_size=8, optimizer=optimizer, clip_norm=clip_norm, **QUIET)
        squares = [np.sum((b - p.numpy()) ** 2) for b, p in zip(before, model.parameters(), strict=True)]
        return math.sqrt(sum(squares))

    free = moved(None)
    assert free > 0.1
    assert moved(0.01) == pytest.approx(0.01, rel=1e-3)
    assert moved(10 * free) == free


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


def test_a_last_batch_of_one():
    x, y = samples(9)
    warning = pytest.warns(UserWarning, match=r"9 samples in batches of 4.*drop_last=True")
    with warning as record, pytest.raises(ValueError, match="more than one value per channel"):
        fit(network(), (x, y), epochs=1, batch_size=4, **QUIET)
    assert record[0].filename == __file__
    frozen = network()
    frozen[1].freeze()
    dropped = network()
    for model, options in (
        (dropped, {"batch_size": 4, "drop_last": True}),
        (network(), {"batch_size": 3}),
        (network(batch_norm=False), {"batch_size": 4}),
        (frozen, {"batch_size": 4}),
    ):
        assert len(fit(model, (x, y), epochs=1, **options, **QUIET)) == 1  # warnings are errors here
    assert dropped[1].num_batches_tracked.item() == 2


def test_regression():
    x = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    data = x, x @ np.array([[1.0], [-2.0], [0.5], [0.0]], np.float32)
    model = nn.Linear(4, 1, rng=np.random.default_rng(0))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    history = fit(model, data, validation=data, epochs=30, loss=F.mse_loss, optimizer=optimizer, **QUIET)
    assert history["val_loss"][-1] < 1e-4 < history["val_loss"][0]
    assert all(math.isnan(a) for a in history["accuracy"] + history["val_accuracy"])


def test_without_validation_there_is_nan():
    epoch = fit(network(), IRIS, epochs=1, **QUIET).epochs[0]
    assert np.isnan([epoch.loss, epoch.accuracy, epoch.val_loss, epoch.val_accuracy]).tolist() == [0, 0, 1, 1]


def test_progress(capsys):
    for progress in (False, True):
        fit(network(), samples(8), validation=samples(8), epochs=2, progress=progress, description="my bar")
        printed = capsys.readouterr()
        assert printed.err == ""
        assert ("my bar" in printed.out and "2/2" in printed.out) if progress else printed.out == ""


def test_errors():
    with pytest.raises(ValueError, match="no batches: 0 samples, batch_size=32"):
        fit(network(), samples(0))
    with pytest.raises(ValueError, match="no batches: 5 samples, batch_size=8, drop_last=True"):
        fit(network(), samples(5), batch_size=8, drop_last=True)
    for function in (fit, evaluate, statistics_gap):
        with pytest.raises(ValueError, match="5 samples, but 4 targets"):
            function(network(), (samples(5)[0], samples(4)[1]))
    with pytest.raises(ValueError, match="no samples to evaluate"):
        evaluate(network(), samples(0))
    with pytest.raises(ValueError, match="no samples"):
        statistics_gap(network(), samples(0))


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


def test_history_columns_and_files(tmp_path):
    nan = float("nan")
    history = History([Epoch(1, 0.75, 0.5, nan, nan, 1.5), Epoch(2, 1 / 3, 0.625, 0.25, 1.0, 0.5)], interrupted=True)
    assert (len(history), history.seconds, history["accuracy"]) == (2, 2.0, [0.5, 0.625])
    with pytest.raises(KeyError, match="no column 'acc'; the columns are epoch, loss, accuracy, val_loss"):
        history["acc"]
    history.save(tmp_path / "h.json")
    read = json.loads((tmp_path / "h.json").read_text())
    assert read == {"interrupted": True, "epochs": history.rows()}
    assert read["epochs"][0]["val_loss"] is None
    assert read["epochs"][1]["loss"] == 1 / 3
    history.save(str(tmp_path / "h.csv"))
    with (tmp_path / "h.csv").open(newline="") as file:
        assert [{k: float(v) if v else None for k, v in r.items()} for r in csv.DictReader(file)] == history.rows()
    with pytest.raises(ValueError, match=r"\.json or \.csv, not as 'h\.txt'"):
        history.save(tmp_path / "h.txt")


def test_a_diverged_run_is_saved_as_valid_json(tmp_path):
    History([Epoch(1, float("inf"), 0.1, float("nan"), 0.1, 1.0)]).save(tmp_path / "h.json")
    text = (tmp_path / "h.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["epochs"][0]["loss"] is None


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
pytestmark = pytest.mark.filterwarnings(
    "ignore:BatchNorm1d.*met a batch whose statistics are not finite:RuntimeWarning",
    "ignore:(divide by zero|invalid value|overflow) encountered:RuntimeWarning",
)


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


def test_options_of_fit_are_checked():
    model, data = network(), samples(8)
    sgd, other = optim.SGD(model.parameters()), optim.SGD(network().parameters())
    wrong = {
        "epochs": [-1, 2.5, "3", True, math.nan], "batch_size": [0, 2.5, "8", None], "seed": ["0", -1, 1.5],
        "drop_last": ["no", 1], "progress": ["no", 1], "clip_norm": ["1", -1.0, math.nan],
        "nonfinite": ["stop", None, 3],
        "callbacks": [[1], "ab", [None]], "loss": ["mse", None, 3], "optimizer": ["adam", optim.Adam],
        "schedule": ["step", optim.StepLR(other, 1), optim.StepLR], "device": ["gpu", 3],
    }  # fmt: skip
    before = state(model)
    for option, values in wrong.items():
        for value in values:
            with pytest.raises((TypeError, ValueError), match=option):
                fit(model, data, **{"optimizer": sgd, "progress": False, option: value})
    with pytest.raises(ValueError, match="schedule belongs to another"):
        fit(model, data, schedule=optim.StepLR(sgd, 1), **QUIET)
    with pytest.raises(ValueError, match="no samples to evaluate on: validation"):
        fit(model, data, validation=samples(0), **QUIET)
    for function in (fit, evaluate, statistics_gap, recalibrate):
        with pytest.raises(TypeError, match="model has to be a module; got a list"):
            function([model], data)
        for pair in (data[0], list(data), None, 3, (data[0],)):
            if function is not recalibrate or pair is not data[0]:
                with pytest.raises(TypeError, match="data has to be a Dataset or a pair"):
                    function(model, pair)
        for pair in ((3, 4), (None, data[1])):
            with pytest.raises(TypeError, match="arrays of shape"):
                function(model, pair)
        if function is not fit:
            for size in (0, 2.5, "8", None, True):
                with pytest.raises((TypeError, ValueError), match="batch_size has to be"):
                    function(model, data, batch_size=size)
    assert state(model) == before


# ---- BatchNorm's running statistics ------------------------------------------------------------------------


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def deep(**options: object) -> nn.Sequential:
    """Two BatchNorms, the statistics of the second depending on how the first normalises; and dropout."""
    manual_seed(0)
    first, second = nn.BatchNorm1d(16, **options), nn.BatchNorm1d(8, **options)
    layers = nn.Linear(4, 16), first, nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 8), second, nn.ReLU(), nn.Linear(8, 3)
    return nn.Sequential(*layers)


@given(
    st.sampled_from([nn.BatchNorm1d, nn.BatchNorm2d]),
    st.integers(2, 40),
    st.integers(2, 9),
    st.sampled_from([0, 1]),
    st.sampled_from([0.1, 0.0, None]),
)
def test_recalibrated_statistics_are_those_of_all_data_for_any_batch_size(layer, n, batch_size, correction, momentum):
    x = np.random.default_rng(n).normal(size=(n, 3) if layer is nn.BatchNorm1d else (n, 3, 2, 5))
    x += np.arange(n).reshape(-1, *[1] * (x.ndim - 1))  # the samples differ, so batches have different means
    bn = layer(3, momentum=momentum, running_var_correction=correction).astype(np.float64)
    bn(x * 100)
    recalibrate(bn, x, batch_size=batch_size)
    axes = (0, *range(2, x.ndim))
    np.testing.assert_allclose(bn.running_mean.numpy(), x.mean(axes), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(bn.running_var.numpy(), x.var(axes, ddof=correction), rtol=1e-10)
    assert bn.num_batches_tracked.item() == max(1, n // batch_size)
    assert bn.momentum == momentum


@given(st.integers(3, 60), st.integers(0, 99))
def test_recalibrated_on_one_batch_there_is_no_gap_in_any_layer(n, seed):
    data = samples(n, seed)
    model = deep(running_var_correction=0)
    fit(model, samples(12, seed + 1), epochs=1, batch_size=4, **QUIET)
    before = statistics_gap(model, data, batch_size=n)
    recalibrate(model, data, batch_size=n)
    gap = statistics_gap(model, data, batch_size=n)
    assert gap.running == pytest.approx(gap.batch, rel=1e-5)
    assert gap.batch == before.batch, "the batch's statistics do not depend on the running ones"
    assert abs(before.running.loss - before.batch.loss) > 1e-4


def test_recalibrate_changes_running_statistics_and_nothing_else():
    model = deep()
    model[5].freeze()
    model[6].eval()
    before, was = state(model), modes(model)
    recalibrate(model, samples(50), batch_size=7)
    after = state(model)
    assert {key for key in after if after[key] != before[key]} == {
        "1.running_mean", "1.running_var", "1.num_batches_tracked",
    }  # fmt: skip
    assert modes(model) == was
    again = state(model)
    recalibrate(model, samples(50)[0], batch_size=7)
    assert state(model) == again, "the same data, the same statistics, and no label is needed"
    for unchanged in (network(batch_norm=False), nn.BatchNorm1d(4, track_running_stats=False)):
        recalibrate(unchanged, samples(5))


@pytest.mark.parametrize(
    ("x", "batch_size", "message"),
    [
        (samples(0)[0], 10, "no samples"),
        (samples(5)[0], 0, "batch_size has to be at least 1; got 0"),
        (samples(5)[0], 1, "more than one value per channel"),
        (np.where(np.arange(20)[:, None] == 13, np.float32(np.nan), samples(20)[0]), 4, "not finite in BatchNorm1d"),
        (np.where(np.arange(20)[:, None] == 13, np.float32(3e38), samples(20)[0]), 4, "not finite in BatchNorm1d"),
    ],
)
def test_an_error_leaves_the_statistics_as_they_were(x, batch_size, message):
    model = deep()
    fit(model, samples(12), epochs=1, batch_size=4, **QUIET)
    before, was = state(model), modes(model)
    with pytest.raises(ValueError, match=message), np.errstate(all="ignore"):
        recalibrate(model, x, batch_size=batch_size)
    assert state(model) == before
    model(samples(4)[0])  # statistics are tracked again
    assert state(model) != before
    assert modes(model) == was


@pytest.mark.parametrize("n", [5, 7, 32])
def test_the_gap_by_hand(n):
    model = network()
    fit(model, samples(32), epochs=2, **QUIET)
    x, y = samples(n, seed=1)
    model[1].eval()
    before, was = state(model), modes(model)
    gap = statistics_gap(model, (x, y), batch_size=max(n - 2, n // 2 + 1))  # one batch: no other may be smaller
    assert (state(model), modes(model)) == (before, was)
    assert gap.running == pytest.approx(evaluate(model, (x, y)), rel=1e-6)
    loss, accuracy = by_hand(model, x, y, by_batch=True)
    assert gap.batch.loss == pytest.approx(loss, rel=1e-4)
    assert gap.batch.accuracy == pytest.approx(accuracy, rel=1e-12)
    assert abs(gap.batch.loss - gap.running.loss) > 1e-3


def test_without_running_statistics_in_use_there_is_no_gap():
    frozen = network()
    frozen[1].freeze()
    for model in (frozen, network(batch_norm=False)):
        gap = statistics_gap(model, samples(20), batch_size=4)
        assert gap.batch == gap.running
