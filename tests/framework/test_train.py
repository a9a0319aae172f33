"""fit, evaluate and History."""

import csv
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_bn import Tensor, datasets, manual_seed, nn, optim
from tinygrad_bn import functional as F
from tinygrad_bn.train import Epoch, History, evaluate, fit, recalibrate, statistics_gap

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
