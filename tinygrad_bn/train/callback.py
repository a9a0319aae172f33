"""What callbacks of a training see, and when they are called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np

from tinygrad_bn import nn
from tinygrad_bn.arguments import expect_text, shown
from tinygrad_bn.backend import Array
from tinygrad_bn.keywords import Named
from tinygrad_bn.optim import Optimizer, Schedule
from tinygrad_bn.train.history import History
from tinygrad_bn.train.scores import MeanScore


@dataclass
class Training:
    """A training under way. Callbacks read it, and end it by `stop`.

    Attributes:
        model, optimizer, schedule: those of `fit`.
        history: the completed epochs.
        epochs: how many epochs are to be completed.
        batches: batches per epoch.
        validates: whether there are validation data.
        epoch: the number of the epoch under way, from 1.
        batch: batches of it that are done.
        step: batches that are done in all epochs.
        loss: of the last batch; NaN before the first.
        mean: loss and accuracy of the batches of this epoch: `mean.score()`.
        order: positions of the samples in the order of this epoch; empty before it begins.
        seconds: that this epoch took so far.
        completed: whether the training has come to its end, and was not interrupted.
    """

    model: nn.Module
    optimizer: Optimizer
    schedule: Schedule | None
    history: History
    epochs: int
    batches: int
    validates: bool = False
    epoch: int = 1
    batch: int = 0
    step: int = 0
    loss: float = float("nan")
    mean: MeanScore = field(default_factory=MeanScore)
    order: Array = field(default_factory=lambda: np.arange(0))
    seconds: float = 0.0
    completed: bool = False

    def stop(self, reason: str) -> None:
        """End the training after the callbacks of this step or epoch. Raises TypeError unless `reason` is text."""
        expect_text("reason", reason)
        self.history.stopped = self.history.stopped or reason or "stopped"


class Callback(Named):
    """Base of callbacks of `fit` that are more than a function. Each method may be left as it is: it does nothing.

    Those that keep something from epoch to epoch return it as `state_dict`, so that a training goes on from a
    checkpoint as if it had not been interrupted.

    >>> class Loud(Callback):
    ...     def on_epoch(self, training):
    ...         print(f"epoch {training.epoch} of {training.epochs}: {training.history['loss'][-1]:.1f}")
    ...         if training.history["loss"][-1] < 0.1:
    ...             training.stop("the loss is low enough")
    """

    def on_begin(self, training: Training) -> None:
        """Before the first step. After a resume `training.step` is above 0, and `load_state_dict` was called before."""

    def on_step(self, training: Training) -> None:
        """After each batch."""

    def on_epoch(self, training: Training) -> None:
        """After each epoch, validation and step of the schedule included."""

    def on_end(self, training: Training) -> None:
        """At the end, also after an interrupt or an error: `training.completed` tells."""

    def state_dict(self) -> dict[str, Any]:
        """What is kept: numbers, text, None, arrays, and lists, tuples and dictionaries of these."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a `state_dict`."""


Function: TypeAlias = Callable[[History, nn.Module], bool | None]


class Called(Callback):
    """A function (history, model) as a callback."""

    def __init__(self, function: Function) -> None:
        self.function = function

    def on_epoch(self, training: Training) -> None:
        """Call it. The training ends if it returns True."""
        if self.function(training.history, training.model):
            training.stop(f"{getattr(self.function, '__qualname__', 'a callback')} returned True")


class Measure(Callback):
    """Keeps what `function(training)` gives, in `values`: before the first step, and after each epoch or step.

    The values are part of every checkpoint, so do not keep much at each step.

    Args:
        function: it gives numbers, arrays, or lists and tuples of them.
        each: "epoch" or "step".

    >>> rates = Measure(lambda training: training.optimizer.param_groups[0]["lr"])
    """

    def __init__(self, function: Callable[[Training], Any], each: Literal["epoch", "step"] = "epoch") -> None:
        if each not in ("epoch", "step"):
            raise ValueError(f"each is 'epoch' or 'step'; got {shown(each)}")
        if not callable(function):
            raise TypeError(f"a Measure takes a function of the training; got {shown(function)}")
        self.function, self.each = function, each
        self.values: list[Any] = []

    def on_begin(self, training: Training) -> None:
        """Measure before the first step; a training that goes on from a checkpoint keeps its values."""
        if not training.step:
            self.values = [self.function(training)]

    def on_step(self, training: Training) -> None:
        """Measure after a step, if so asked."""
        if self.each == "step":
            self.values.append(self.function(training))

    def on_epoch(self, training: Training) -> None:
        """Measure after an epoch, if so asked."""
        if self.each == "epoch":
            self.values.append(self.function(training))

    def state_dict(self) -> dict[str, Any]:
        """The values."""
        return {"values": self.values}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a `state_dict`."""
        self.values = list(state["values"])
