"""Early stopping against a reference written by hand, alone and in trainings; tables and logs of the epochs."""

import csv
import math
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tools.training import QUIET, network, samples, state, timeless
from tinygrad_bn import nn
from tinygrad_bn.functional import mse_loss
from tinygrad_bn.optim import SGD
from tinygrad_bn.train import CSVLog, EarlyStopping, Epoch, History, Measure, TensorBoardLog, Training, fit

DATA, VALIDATION = samples(60), samples(40, seed=1)


def reference(values, patience, min_delta, upwards):
    """The best epoch and the last one, from 1; the best is 0 if there is none."""
    best = 0
    for epoch, value in enumerate(values, 1):
        gain = math.inf if not best else value - values[best - 1] if upwards else values[best - 1] - value
        if not math.isnan(value) and gain > min_delta:
            best = epoch
        elif epoch - best == patience:
            return best, epoch
    return best, len(values)


def drive(stopping, values, split=None):
    """The epochs of a training with these metrics, the bias of its model being the number of the epoch.

    After `split` epochs, go on with a new object and model that get the states.
    """
    model = nn.Linear(1, 1)
    training = Training(model, SGD(model.parameters(), lr=1.0), None, History(), len(values), 1, True)
    stopping.on_begin(training)
    for training.epoch, value in enumerate(values, 1):
        model.bias.data = [training.epoch]
        training.step += 1
        metrics = {"loss": 0.5, "accuracy": 0.5, "val_loss": 0.5, "val_accuracy": 0.5} | {stopping.monitor: value}
        training.history.epochs.append(Epoch(epoch=training.epoch, seconds=0.0, **metrics))
        stopping.on_epoch(training)
        if training.history.stopped:
            break
        if training.epoch == split:
            saved = stopping.state_dict()
            stopping = EarlyStopping(stopping.monitor, patience=stopping.patience, min_delta=stopping.min_delta)
            stopping.load_state_dict(saved)
            stopping.on_begin(training)
    training.completed = True
    stopping.on_end(training)
    return training, stopping


@given(
    st.lists(st.one_of(st.integers(0, 8).map(lambda n: n / 8), st.floats(0, 1)), min_size=1, max_size=20),
    st.sampled_from(["loss", "accuracy", "val_loss", "val_accuracy"]),
    st.integers(1, 5),
    st.sampled_from([0.0, 0.125, 0.3]),
    st.sets(st.integers(0, 19)),
    st.none() | st.integers(1, 20),
)
def test_early_stopping_is_the_reference(values, monitor, patience, min_delta, nans, split):
    upwards = monitor.endswith("accuracy")
    if not upwards:
        values = [math.nan if i in nans else value for i, value in enumerate(values)]
    training, stopping = drive(EarlyStopping(monitor, patience=patience, min_delta=min_delta), values, split)
    best, last = reference(values, patience, min_delta, upwards)
    assert (stopping.epoch, training.epoch) == (best, last)
    assert training.model.bias.item() == (best or last), "without a best epoch, the model stays"
    assert bool(training.history.stopped) == (last - best == patience)
    assert stopping.best == (values[best - 1] if best else None)


def test_the_reason_names_the_epoch():
    assert (
        drive(EarlyStopping(patience=2), [0.5, 0.4, 0.4, 0.6])[0].history.stopped
        == "val_loss did not improve since epoch 2"
    )
    assert drive(EarlyStopping(patience=1), [math.nan])[0].history.stopped == "val_loss did not improve at all"


def train(stopping, model=None, **options):
    """A training whose validation loss, of targets at random, soon rises; and its model."""
    model = model or network()
    options = {"epochs": 30, "batch_size": 20, "seed": 3, "validation": VALIDATION, **options, **QUIET}
    optimizer = options.pop("optimizer", None) or SGD(model.parameters(), lr=0.01, momentum=0.9)
    return fit(model, DATA, callbacks=stopping, optimizer=optimizer, **options), model


@pytest.mark.parametrize("capture", [True, False])
def test_the_model_is_that_of_the_best_epoch(capture):
    stopping = EarlyStopping(patience=3)
    history, model = train(stopping, capture=capture)
    best = int(np.argmin(history["val_loss"])) + 1
    assert 1 < best < len(history) == best + 3 < 30, "else this shows nothing"
    assert (stopping.epoch, stopping.best, stopping.waited) == (best, min(history["val_loss"]), 3)
    alone, same = train((), epochs=best)
    assert timeless(alone) == timeless(history)[:best]
    assert state(model) == state(same), "parameters and running statistics"
    _, last = train(EarlyStopping(patience=3, restore_best=False))
    assert state(last) == state(train((), epochs=best + 3)[1])


def test_a_second_training_begins_anew():
    stopping = EarlyStopping(patience=3)
    first, second = train(stopping), train(stopping)
    assert timeless(first[0]) == timeless(second[0])
    assert state(first[1]) == state(second[1])


def interrupting(at):
    def interrupt(history, model):
        if len(history) == at:
            raise KeyboardInterrupt

    return interrupt


@pytest.mark.parametrize("after", [1, 2])
def test_a_resumed_training_stops_and_restores_as_one_without_an_interrupt(after, tmp_path):
    whole, model = train([EarlyStopping(patience=3), interrupting(0), CSVLog(tmp_path / "whole.csv")])
    at = len(whole) - 3 + after
    part = [EarlyStopping(patience=3), interrupting(at), CSVLog(tmp_path / "log" / "part.csv")]
    history, interrupted = train(part, checkpoint=tmp_path / "run")
    assert history.interrupted
    assert state(interrupted) == state(train((), epochs=at)[1]), "nothing is restored: it goes on"
    again = [EarlyStopping(patience=3), interrupting(0), CSVLog(tmp_path / "log" / "part.csv")]
    history, resumed = train(again, network(seed=5), checkpoint=tmp_path / "run", resume=True)
    assert timeless(history) == timeless(whole)
    assert state(resumed) == state(model)
    rows = [list(csv.DictReader((tmp_path / name).read_text().splitlines())) for name in ("whole.csv", "log/part.csv")]
    assert [row.pop("seconds") != "" for part in rows for row in part] == [True] * 2 * len(whole)
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: EarlyStopping("accuracies"), ValueError, "monitor is one of loss, accuracy, val_loss, val_accuracy"),
        (lambda: EarlyStopping(["loss"]), ValueError, "monitor is one of"),
        (lambda: EarlyStopping(patience=0), ValueError, "patience has to be at least 1"),
        (lambda: EarlyStopping(min_delta=-1), ValueError, "min_delta has to be 0 or more"),
        (lambda: EarlyStopping(restore_best="yes"), TypeError, "restore_best has to be True or False"),
        (lambda: CSVLog("log.txt"), ValueError, "a CSVLog writes a .csv file; got 'log.txt'"),
        (lambda: CSVLog(3), TypeError, "path has to be a path; got 3"),
    ],
)
def test_options_that_do_not_fit(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_column_that_is_not_measured():
    model = network()
    before = state(model)
    with pytest.raises(ValueError, match="monitors val_loss: give fit validation=…, or monitor another column"):
        train(EarlyStopping(), model, validation=None)
    assert state(model) == before
    x = DATA[0]
    with pytest.raises(ValueError, match="monitors accuracy, and the targets are no classes: monitor a loss"):
        fit(model, (x, x[:, :3]), loss=mse_loss, callbacks=EarlyStopping("accuracy"), **QUIET)


def test_a_table_has_the_epochs_so_far_at_any_time(tmp_path):
    seen = []

    def look(history, model):
        seen.append(len((tmp_path / "log.csv").read_text().splitlines()))

    history, _ = train([CSVLog(tmp_path / "log.csv"), look], epochs=3)
    assert seen == [2, 3, 4], "with the heading"
    history.save(tmp_path / "same.csv")
    assert (tmp_path / "log.csv").read_bytes() == (tmp_path / "same.csv").read_bytes()


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"needs tensorboardX: pip install 'tinygrad-bn\[tensorboard\]'"):
        TensorBoardLog("logs")


def test_a_measure_begins_anew_with_each_training():
    seen = Measure(lambda training: training.step, "step")
    x, y = np.ones((4, 2), np.float32), np.array([0, 1, 0, 1])
    for _ in range(2):
        fit(nn.Linear(2, 2), (x, y), epochs=2, batch_size=2, callbacks=[seen], progress=False)
        assert seen.values == [0, 1, 2, 3, 4]


def test_an_error_of_the_disk_ends_the_training(tmp_path, monkeypatch):
    """It is raised in `fit`, and nothing waits for a thread that has ended."""
    pytest.importorskip("tensorboardX")
    from tensorboardX.record_writer import RecordWriter

    flush, errors = RecordWriter.flush, [OSError(28, "No space left on device")]

    def full_once(self):  # so that the file can be closed
        if errors:
            raise errors.pop()
        flush(self)

    monkeypatch.setattr(RecordWriter, "flush", full_once)
    x, y = np.ones((4, 2), np.float32), np.array([0, 1, 0, 1])
    with pytest.raises(OSError, match="No space left"):
        fit(nn.Linear(2, 2), (x, y), epochs=20, batch_size=1, callbacks=[TensorBoardLog(tmp_path)], progress=False)
