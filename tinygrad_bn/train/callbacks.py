"""Callbacks of `fit`: early stopping, a table of the epochs, and logs for TensorBoard."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinygrad_bn.arguments import expect_flags, expect_integer, expect_number, shown
from tinygrad_bn.backend import Array
from tinygrad_bn.train.callback import Callback, Training
from tinygrad_bn.train.history import sign_of


class EarlyStopping(Callback):
    """Ends the training when a metric has not improved for some epochs, and restores the best epoch.

    An epoch is the best so far if it improves on the best before it by more than `min_delta`. Accuracies improve
    upwards, losses downwards; NaN is no improvement.

    Args:
        monitor: a column of the history: "loss", "accuracy", "val_loss" or "val_accuracy".
        patience: epochs without an improvement after which the training ends.
        min_delta: what an improvement has to exceed.
        restore_best: at the end, give the model the parameters and buffers of the best epoch. The optimizer stays as
            the last epoch left it. After an interrupt or an error nothing is restored: the training can go on.

    Attributes:
        best: the metric of the best epoch, or None before the first.
        epoch: the number of the best epoch, or 0.
        waited: epochs since then.

    Raises:
        ValueError: an option out of range. In `fit`: `monitor` needs validation data and there are none, or it is an
            accuracy and the targets are no classes.
        TypeError: an option of the wrong type.

    >>> EarlyStopping("val_accuracy", patience=3).patience
    3
    """

    def __init__(
        self, monitor: str = "val_loss", *, patience: int = 5, min_delta: float = 0.0, restore_best: bool = True
    ) -> None:
        self.monitor, self._sign = monitor, sign_of(monitor)
        self.patience = expect_integer("patience", patience, 1)
        self.min_delta = expect_number("min_delta", min_delta, 0)
        expect_flags(restore_best=restore_best)
        self.restore_best = restore_best
        self._forget()

    def _forget(self) -> None:
        self.best: float | None = None
        self.epoch = self.waited = 0
        self._model: dict[str, Array] = {}  # the state of the best epoch

    def on_begin(self, training: Training) -> None:
        """Begin anew, unless this training goes on from a checkpoint."""
        if self.monitor.startswith("val_") and not training.validates:
            raise ValueError(f"EarlyStopping monitors {self.monitor}: give fit validation=…, or monitor another column")
        if not training.step:
            self._forget()

    def on_epoch(self, training: Training) -> None:
        """Look at the last epoch."""
        value = training.history[self.monitor][-1]
        if math.isnan(value) and self.monitor.endswith("accuracy"):
            raise ValueError(f"EarlyStopping monitors {self.monitor}, and the targets are no classes: monitor a loss")
        least = math.inf if self.best is None else self._sign * self.best - self.min_delta
        if self._sign * value < least:
            self.best, self.epoch, self.waited = value, training.epoch, 0
            if self.restore_best:
                self._model = training.model.state_dict()
            return
        self.waited += 1
        if self.waited >= self.patience:
            since = f"since epoch {self.epoch}" if self.epoch else "at all"
            training.stop(f"{self.monitor} did not improve {since}")

    def on_end(self, training: Training) -> None:
        """Restore the best epoch."""
        if training.completed and self._model:
            training.model.load_state_dict(self._model)

    def state_dict(self) -> dict[str, Any]:
        """Which epoch is the best, its metric and its model."""
        return {"best": self.best, "epoch": self.epoch, "waited": self.waited, "model": self._model}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a `state_dict`."""
        self.best, self.epoch, self.waited = state["best"], state["epoch"], state["waited"]
        self._model = dict(state["model"])


class CSVLog(Callback):
    """Writes the history to a `.csv` file after every epoch, whole, so that a reader never sees half a row.

    Raises ValueError for another suffix. In `fit`, OSError if the file cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = _as_path("path", path)
        if self.path.suffix != ".csv":
            raise ValueError(f"a CSVLog writes a .csv file; got {shown(str(path))}")

    def on_begin(self, training: Training) -> None:
        """Make the folder, and write the heading and the epochs so far."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        training.history.save(self.path)

    def on_epoch(self, training: Training) -> None:
        """Write all epochs."""
        training.history.save(self.path)


class TensorBoardLog(Callback):
    """Writes event files for TensorBoard, by tensorboardX: `pip install 'tinygrad-bn[tensorboard]'`.

    The loss of the batches and the learning rate are under `step/`, the metrics of the epochs under `epoch/`, and
    parameters under `parameters/`, all over the number of the step. One training has a folder of its own: of what is in
    it, TensorBoard hides the steps from the first of this `fit` on. So no step appears twice after a resume.

    Args:
        folder: made if it is missing.
        every: steps between two points of the loss and the learning rate.
        histograms: after every epoch, write a histogram of each parameter; numbers that are not finite are left out.

    Raises:
        ImportError: tensorboardX is not installed.
        ValueError or TypeError: an option does not fit.
        OSError: in `fit`, the folder cannot be written to.
    """

    def __init__(self, folder: str | Path, *, every: int = 1, histograms: bool = False) -> None:
        try:
            import tensorboardX  # noqa: F401
        except ImportError as error:
            raise ImportError("TensorBoardLog needs tensorboardX: pip install 'tinygrad-bn[tensorboard]'") from error
        self._events: Any = None
        self.folder = _as_path("folder", folder)
        self.every = expect_integer("every", every, 1)
        expect_flags(histograms=histograms)
        self.histograms = histograms

    def on_begin(self, training: Training) -> None:
        """Open a file, named by the step too: two may be opened within the second that the library names it by.

        The library's `SummaryWriter` would write on a thread of its own, and wait forever after an error there.
        """
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        following = training.step + 1
        self.folder.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(str(self.folder / "events"), f".{following}")
        self._add(following, session_log=SessionLog(status=SessionLog.START))

    def on_step(self, training: Training) -> None:
        """Write the loss and the learning rate."""
        if training.step % self.every == 0:
            groups = training.optimizer.param_groups
            self._write("step/loss", training.loss, training)
            for i, group in enumerate(groups):
                self._write(f"step/lr/{i}" if len(groups) > 1 else "step/lr", group["lr"], training)

    def on_epoch(self, training: Training) -> None:
        """Write the metrics, without those that are not measured."""
        for name, value in training.history.rows()[-1].items():
            if value is not None:
                self._write(f"epoch/{name}", value, training)
        if self.histograms and self._events is not None:
            from tensorboardX import summary

            for name, p in training.model.named_parameters():
                values = p.numpy().astype(np.float64)
                if (finite := values[np.isfinite(values)]).size:
                    histogram = summary.histogram(f"parameters/{name}", finite, bins=64)
                    self._add(training.step, summary=histogram)
        if self._events is not None:
            self._events.flush()

    def on_end(self, training: Training) -> None:
        """Close the file."""
        if self._events is not None:
            self._events.close()
        self._events = None

    def _write(self, name: str, value: float, training: Training) -> None:
        if self._events is not None:
            from tensorboardX import summary

            self._add(training.step, summary=summary.scalar(name, value))

    def _add(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._events.write_event(Event(wall_time=time.time(), step=step, **content))


def _as_path(name: str, value: Any) -> Path:
    if not isinstance(value, str | Path):
        raise TypeError(f"{name} has to be a path; got {shown(value)}")
    return Path(value)
