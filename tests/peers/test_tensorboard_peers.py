"""The logs as TensorBoard reads them."""

import numpy as np
import pytest

from tests.tools.training import QUIET, network, samples, state
from tinygrad_bn.optim import SGD, Adam
from tinygrad_bn.train import Callback, ModelCheckpoint, TensorBoardLog, fit

pytest.importorskip("tensorboardX")
accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

DATA, VALIDATION = samples(60), samples(40, seed=1)


def read(folder):
    """What TensorBoard shows of a folder."""
    return accumulator.EventAccumulator(str(folder), {"scalars": 0, "histograms": 0}).Reload()


def scalars(folder):
    return {tag: [(e.step, e.value) for e in read(folder).Scalars(tag)] for tag in read(folder).Tags()["scalars"]}


class Record(Callback):
    """The losses of the steps."""

    def __init__(self):
        self.losses = []

    def on_step(self, training):
        """Note one."""
        self.losses.append(training.loss)


def train(folder, epochs=3, every=1, histograms=False, callbacks=(), model=None, **options):
    record, model = Record(), model or network()
    log = TensorBoardLog(folder, every=every, histograms=histograms)
    options = {"optimizer": SGD(model.parameters(), lr=0.1), "validation": VALIDATION, **options}
    history = fit(
        model, DATA, epochs=epochs, batch_size=20, seed=0, callbacks=[*callbacks, log, record], **options, **QUIET
    )
    return history, record, model


@pytest.mark.parametrize("capture", [True, False])
def test_what_is_logged_is_what_happened(tmp_path, capture):
    history, record, model = train(tmp_path, capture=capture)
    found = scalars(tmp_path)
    assert set(found) == {
        "step/loss", "step/lr", "epoch/epoch", "epoch/loss", "epoch/accuracy", "epoch/val_loss", "epoch/val_accuracy",
        "epoch/seconds",
    }  # fmt: skip
    single = np.float32  # in which events hold numbers
    assert found["step/loss"] == [(i, single(loss)) for i, loss in enumerate(record.losses, 1)]
    assert found["step/lr"] == [(i, single(0.1)) for i in range(1, 10)]
    for name in ("epoch", "loss", "accuracy", "val_loss", "val_accuracy", "seconds"):
        assert found[f"epoch/{name}"] == [(3 * i, single(v)) for i, v in enumerate(history[name], 1)]
    alone = network()
    fit(
        alone, DATA, epochs=3, batch_size=20, seed=0, validation=VALIDATION, capture=capture,
        optimizer=SGD(alone.parameters(), lr=0.1), **QUIET,
    )  # fmt: skip
    assert state(alone) == state(model), "a log changes nothing"


def test_some_steps_groups_of_parameters_and_no_validation(tmp_path):
    model = network()
    groups = [{"params": [p], "lr": rate} for p, rate in zip(model.parameters(), range(1, 7), strict=True)]
    train(tmp_path, every=4, model=model, optimizer=Adam(groups), validation=None)
    found = scalars(tmp_path)
    assert [step for step, _ in found["step/loss"]] == [4, 8]
    assert [found[f"step/lr/{i}"] for i in range(6)] == [[(4, i), (8, i)] for i in range(1, 7)]
    assert not any("val_" in tag for tag in found)


def test_histograms_hold_the_parameters(tmp_path):
    seen = []
    _, _, model = train(tmp_path, histograms=True, callbacks=[lambda _, m: seen.append(m.state_dict())])
    events = read(tmp_path)
    assert set(events.Tags()["histograms"]) == {f"parameters/{name}" for name, _ in model.named_parameters()}
    for name, _ in model.named_parameters():
        got = events.Histograms(f"parameters/{name}")
        assert [e.step for e in got] == [3, 6, 9]
        for event, parameters in zip(got, seen, strict=True):
            values = parameters[name].astype(np.float64)
            h = event.histogram_value
            assert (h.min, h.max, h.num) == (values.min(), values.max(), values.size)
            assert h.sum == pytest.approx(values.sum())


@pytest.mark.filterwarnings("ignore:BatchNorm1d.*not finite")
def test_histograms_leave_out_what_is_not_finite(tmp_path):
    model = network()
    model[0].bias.data = np.r_[np.nan, np.inf, np.ones(14)]
    model[0].weight.data = np.full((16, 4), np.nan)
    train(tmp_path, histograms=True, model=model, nonfinite="ignore", optimizer=SGD([model[3].bias], lr=1e-9), epochs=1)
    assert read(tmp_path).Histograms("parameters/0.bias")[0].histogram_value.num == 14
    assert "parameters/0.weight" not in read(tmp_path).Tags()["histograms"]


class Interrupt(Callback):
    """Ctrl-C after a step."""

    def __init__(self, at):
        self.at = at

    def on_step(self, training):
        """Raise it."""
        if training.step == self.at:
            raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_log_has_each_step_once(tmp_path):
    train(tmp_path / "whole", callbacks=[Interrupt(0)])
    for i, at in enumerate((5, 8, 0)):  # each in an epoch, after a step that is logged and not in a checkpoint
        train(
            tmp_path / "parts", callbacks=[Interrupt(at)], model=network(seed=i),
            checkpoint=ModelCheckpoint(tmp_path / "run", every=2), resume=bool(i),
        )  # fmt: skip
    assert len(list((tmp_path / "parts").iterdir())) == 3
    whole, parts = scalars(tmp_path / "whole"), scalars(tmp_path / "parts")
    assert whole.pop("epoch/seconds") != parts.pop("epoch/seconds")
    assert whole == parts


def test_a_second_training_in_the_folder_replaces_the_first(tmp_path):
    train(tmp_path / "both", epochs=3)
    history, *_ = train(tmp_path / "both", epochs=2, every=2, model=network(seed=9))
    assert [step for step, _ in scalars(tmp_path / "both")["epoch/loss"]] == [3, 6]
    assert scalars(tmp_path / "both")["epoch/loss"][0][1] == np.float32(history["loss"][0])


def test_what_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="every has to be at least 1"):
        TensorBoardLog(tmp_path, every=0)
    with pytest.raises(TypeError, match="folder has to be a path; got 3"):
        TensorBoardLog(3)
    with pytest.raises(TypeError, match="histograms has to be True or False"):
        TensorBoardLog(tmp_path, histograms=1)
    (tmp_path / "file").write_text("")
    model = network()
    before = state(model)
    with pytest.raises(OSError, match="file"):
        train(tmp_path / "file", model=model)
    assert state(model) == before
