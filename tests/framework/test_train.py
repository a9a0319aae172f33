"""fit, its options, and History."""

import csv
import json
import math
import warnings

import numpy as np
import pytest

from tests.tools.training import QUIET, network, samples, state, timeless
from tinygrad_bn import Tensor, datasets, nn, optim
from tinygrad_bn import functional as F
from tinygrad_bn.train import Epoch, History, NonFiniteError, evaluate, fit, recalibrate, statistics_gap

IRIS = datasets.load("iris")


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


def test_history_columns_and_files(tmp_path):
    nan = float("nan")
    history = History([Epoch(1, 0.75, 0.5, nan, nan, 1.5), Epoch(2, 1 / 3, 0.625, 0.25, 1.0, 0.5)], interrupted=True)
    assert (len(history), history.seconds, history["accuracy"]) == (2, 2.0, [0.5, 0.625])
    with pytest.raises(KeyError, match="no column 'acc'; the columns are epoch, loss, accuracy, val_loss"):
        history["acc"]
    history.save(tmp_path / "h.json")
    read = json.loads((tmp_path / "h.json").read_text())
    assert read == {"interrupted": True, "skipped": 0, "diverged": "", "stopped": "", "epochs": history.rows()}
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


def test_options_of_fit_are_checked():
    model, data = network(), samples(8)
    sgd, other = optim.SGD(model.parameters()), optim.SGD(network().parameters())
    wrong = {
        "epochs": [-1, 2.5, "3", True, math.nan], "batch_size": [0, 2.5, "8", None], "seed": ["0", -1, 1.5],
        "drop_last": ["no", 1], "progress": ["no", 1], "clip_norm": ["1", -1.0, math.nan],
        "nonfinite": ["stop", None, 3],
        "callbacks": [[1], "ab", [None], None, 3], "loss": ["mse", None, 3], "optimizer": ["adam", optim.Adam],
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


def test_a_frozen_model_is_not_trained():
    model = network().requires_grad_(False)
    before = state(model)
    for optimizer in (None, optim.SGD(model.parameters())):
        with pytest.raises(
            ValueError, match=r"no parameter of Sequential requires a gradient: call requires_grad_\(\)"
        ):
            fit(model, samples(8), optimizer=optimizer, **QUIET)
    assert state(model) == before


def test_recalibrate_says_that_samples_alone_are_right():
    x, _ = samples(8)
    for wrong in (Tensor(x), x.tolist(), None):
        with pytest.raises(TypeError, match=r"a Dataset or a pair of arrays \(x, y\), or an array x alone; got a"):
            recalibrate(network(), wrong)


def test_a_rate_beyond_the_dtype_is_what_nonfinite_is_about():
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(NonFiniteError, match="would become NaN or infinite: lower the learning rate"):
            fit(model, samples(8), optimizer=optim.SGD(model.parameters(), lr=1e300), **QUIET)
