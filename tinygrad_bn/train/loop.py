"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from tinygrad_bn import functional as F
from tinygrad_bn import nn
from tinygrad_bn.arguments import expect_flags, expect_integer, expect_number, expect_text, shown, warn_caller
from tinygrad_bn.backend import Array
from tinygrad_bn.datasets import Batches, Seed
from tinygrad_bn.keywords import named
from tinygrad_bn.optim import Adam, Optimizer, Schedule
from tinygrad_bn.train.callback import Callback, Called, Function, Training
from tinygrad_bn.train.history import Epoch, History
from tinygrad_bn.train.saving import ModelCheckpoint, Saver
from tinygrad_bn.train.scores import Data, Loss, MeanScore, Score, arrays_of, evaluate, expect_model
from tinygrad_bn.train.signals import Signals
from tinygrad_bn.train.steps import NonFinite, Steps

Callbacks: TypeAlias = Function | Callback | Iterable[Function | Callback]


@named
def fit(
    model: nn.Module,
    data: Data,
    *,
    validation: Data | None = None,
    epochs: int = 10,
    batch_size: int = 32,
    optimizer: Optimizer | None = None,
    loss: Loss = F.cross_entropy,
    seed: Seed = None,
    drop_last: bool = False,
    schedule: Schedule | None = None,
    clip_norm: float | None = None,
    nonfinite: NonFinite = "raise",
    callbacks: Callbacks = (),
    capture: bool = True,
    progress: bool = True,
    description: str = "training",
    device: str | None = None,
    checkpoint: str | Path | ModelCheckpoint | None = None,
    every: int | None = None,
    resume: bool = False,
) -> History:
    """Train `model`.

    Args:
        model: maps samples (N, ...) to the outputs that `loss` takes. It is left in training mode.
        data: samples and targets: a `Dataset`, or two NumPy arrays of the same length. Each batch is copied to the
            model's device.
        validation: data to evaluate on after every epoch.
        epochs: passes over the data.
        batch_size: samples per batch.
        optimizer: the default is `Adam(model.parameters())`.
        loss: function (outputs, targets) that returns the mean loss of the batch. The mean over several batches is
            exact for the losses of `functional`, with class weights, ignored targets and `reduction="sum"` too. It is
            also exact for a loss that adds multiples of such sums and means: the loss is then computed once more, with
            each sample twice, which tells sums from means. Any other loss counts by its samples. One that counts
            otherwise returns a pair (mean loss, weight of the batch). `F.sum` of losses with `reduction="none"` is not
            known to be a sum: use `reduction="sum"` instead. A loss that adds a mean over the targets that count to
            other terms of the outputs counts by its samples too, with a warning. A batch of weight 0, such as one whose
            targets are all ignored in one of the means, takes no step of the optimizer.
        seed: for shuffling. An integer gives the same batches in every call. From a NumPy Generator, or by default
            from that of `manual_seed`, the orders go on: a second call sees others.
        drop_last: skip the last batch if it is smaller than `batch_size`.
        schedule: learning rate schedule of `optimizer`, stepped after every epoch.
        clip_norm: upper limit of the norm of all gradients together.
        nonfinite: what to do where a loss or a gradient is NaN or infinite, or a step makes a parameter or a buffer so.
            "raise" an error, "skip" the batch, or "restore" the model and the optimizer as the last completed epoch
            left them, and end the training. With "raise" and "skip" the model and the optimizer stay as they were
            before that step. "ignore": do not look.
        callbacks: functions (history, model), all called after every epoch; the training ends if one returns True. And
            objects of `train.Callback`, which see every step.
        capture: record forward and backward pass once, and run them as a straight line of array operations: the same
            bits, faster. See `tinygrad_bn.capture`. Steps that it refuses run as always, without a warning.
        progress: show a progress bar.
        description: label of the progress bar.
        device: "cpu" or "cuda". The model is moved there and stays there; the default is its present device.
        checkpoint: a folder for checkpoints, or a `ModelCheckpoint` that also says how many are kept and what is best.
            After Ctrl-C and SIGTERM one more is written, at the end of the step under way; then SIGTERM ends the
            process as usual.
        every: steps between checkpoints. There is always one after each epoch.
        resume: go on from the newest checkpoint of the folder, if there is one, with the same bits as if there had been
            no interruption: parameters, statistics, optimizer, schedule, generators, order of the samples, history and
            callbacks. The arguments and data have to be those of the training that was interrupted; `epochs` may be
            more. Options of the optimizer are those of the checkpoint. Of generators, the default one is restored, that
            of `seed`, and those that modules hold as attributes; not Python's `random`, nor what callbacks keep without
            a `state_dict`. An error that ends a training writes no checkpoint.

    Returns:
        The history. After Ctrl-C it holds the completed epochs, and the model keeps its updates. Without `checkpoint`
        the update that was under way may have reached only some of the parameters.

    Raises:
        ValueError: no data, data and targets of different lengths, an option out of range, or no parameter that
            requires a gradient.
        TypeError: an argument has the wrong type, or the data are on a GPU.
        NonFiniteError: see `nonfinite`. Also with "skip", where a parameter is not finite: no batch can help then.
        RuntimeError: the device is not available; the message says why.
        CheckpointError: the checkpoint does not belong to this training, or no file of the folder is whole.
        OSError: a checkpoint cannot be written; see `ModelCheckpoint` for going on then. BlockingIOError: another
            training writes into the folder.
    """
    expect_model(model, loss)
    epochs = expect_integer("epochs", epochs, 0)
    expect_flags(progress=progress, capture=capture)
    expect_text("description", description)
    if nonfinite not in ("raise", "skip", "restore", "ignore"):
        raise ValueError(f"nonfinite is one of 'raise', 'skip', 'restore' and 'ignore'; got {shown(nonfinite)}")
    if clip_norm is not None:
        clip_norm = expect_number("clip_norm", clip_norm, 0, finite=False)
    callbacks = _as_callbacks(callbacks)
    _expect_optimizer(optimizer, schedule)
    checkpoint = ModelCheckpoint.of(checkpoint, every, resume)
    batches = Batches(*arrays_of(data), batch_size, seed=seed, drop_last=drop_last)
    if not len(batches):
        raise ValueError(f"no batches: {len(batches.x)} samples, batch_size={batch_size}, drop_last={drop_last}")
    if validation is not None and not len(arrays_of(validation)[0]):
        raise ValueError("no samples to evaluate on: validation is empty")
    _warn_about_batch_of_one(model, batches)
    if device is not None:
        model.to(device)
    optimizer = optimizer or Adam(model.parameters())
    own = {p for p in model.parameters() if p.requires_grad}
    if not any(p.requires_grad for p in (*own, *optimizer._params())):
        raise ValueError(f"no parameter of {type(model).__name__} requires a gradient: call requires_grad_() on it")
    if own and own.isdisjoint(optimizer._params()):
        raise ValueError("optimizer has no parameter of the model: make it with model.parameters()")
    steps = Steps(model, optimizer, loss, clip_norm, nonfinite, capture)
    training = Training(model, optimizer, schedule, History(), epochs, len(batches), validation is not None)
    saver = None
    if checkpoint is not None:
        saver = Saver(checkpoint, training, batches, steps, callbacks, resume)
        if resume:
            saver.resume()
    loop = _Loop(training, steps, batches, callbacks, saver, validation, loss)
    return loop.run(_progress(progress), description)


class _Loop:
    """The epochs of a training, and how it ends."""

    def __init__(
        self,
        training: Training,
        steps: Steps,
        batches: Batches,
        callbacks: list[Callback],
        saver: Saver | None,
        validation: Data | None,
        loss: Loss,
    ) -> None:
        self.training, self.steps, self.batches, self.callbacks = training, steps, batches, callbacks
        self.saver, self.validation, self.loss = saver, validation, loss
        self.signals = Signals()
        self.whole = True  # no step was left in the middle

    def run(self, bar: Any, description: str) -> History:
        """Train to the end, or until an interrupt."""
        training, saver = self.training, self.saver
        training.model.train()
        total = training.epochs * training.batches
        self.show = partial(bar.update, bar.add_task(description, total=total, completed=training.step, status=""))
        with ExitStack() as stack:
            if saver is not None:
                stack.enter_context(self.signals)
                stack.callback(saver.close)
            try:
                with bar:
                    for callback in self.callbacks:
                        stack.callback(callback.on_end, training)
                        callback.on_begin(training)
                    if saver is not None:
                        saver.at_begin()
                    while training.epoch <= training.epochs and not (
                        training.history.stopped or training.history.diverged
                    ):
                        self.epoch()
                    if saver is not None:
                        saver.at_end()
                training.completed = True
            except KeyboardInterrupt:
                training.history.interrupted = True
                training.model.train()  # a callback may not have come to leave evaluation mode
                if saver is not None:
                    saver.interrupted(self.whole)
        return training.history

    def epoch(self) -> None:
        """The rest of the epoch under way."""
        training = self.training
        start = time.perf_counter() - training.seconds
        if not len(training.order):
            with self.step():
                training.order, training.mean = self.batches.next_order(), MeanScore()
                self.steps.remember()
                if self.saver is not None:
                    self.saver.before_epoch()
        for x, y in self.batches.in_order(training.order, training.batch):
            with self.step():
                self.batch(x, y)
                training.seconds = time.perf_counter() - start
                if self.saver is not None:
                    self.saver.after_step()
            if training.history.ended:
                return
        with self.step():  # also the validation, which may draw random numbers
            val = Score(math.nan, math.nan)
            if self.validation is not None:
                val = evaluate(training.model, self.validation, loss=self.loss)
            score, seconds = training.mean.score(), time.perf_counter() - start
            training.history.epochs.append(Epoch(training.epoch, *score, *val, seconds))
            self.show(status=_status(training, score, val))
            if training.schedule is not None:
                training.schedule.step()
            for callback in self.callbacks:
                callback.on_epoch(training)
            training.epoch, training.batch, training.seconds = training.epoch + 1, 0, 0.0
            training.order = training.order[:0]
            if self.saver is not None:
                self.saver.after_epoch()

    @contextmanager
    def step(self) -> Iterator[None]:
        """A block that a signal does not interrupt, if there are checkpoints."""
        with self.signals.held():
            self.whole = False
            yield
            self.whole = True

    def batch(self, x: Array, y: Array) -> None:
        """A step of the optimizer, or what happens instead."""
        training = self.training
        if fault := self.steps.take(x, y, training.mean):
            where = f"epoch {training.epoch}, step {training.batch + 1} of {training.batches}"
            self.steps.handle(f"{where}: {fault}", training.history)
            if training.history.diverged:
                return
        training.batch, training.step, training.loss = training.batch + 1, training.step + 1, self.steps.value
        for callback in self.callbacks:
            callback.on_step(training)
        self.show(advance=1, status=_status(training, training.mean.score()))


def _expect_optimizer(optimizer: Any, schedule: Any) -> None:
    if not (optimizer is None or isinstance(optimizer, Optimizer)):
        raise TypeError(
            f"optimizer has to be an Optimizer, such as optim.Adam(model.parameters()); got {shown(optimizer)}"
        )
    if schedule is None:
        return
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule has to be a Schedule, such as optim.StepLR(optimizer, 10); got {shown(schedule)}")
    if schedule.optimizer is not optimizer:
        raise ValueError("schedule belongs to another optimizer than the one that is given")


def _warn_about_batch_of_one(model: nn.Module, batches: Batches) -> None:
    if batches.smallest == 1 and any(isinstance(m, nn.BatchNorm1d) and not m.stats_frozen for m in model.modules()):
        warn_caller(
            f"{len(batches.x)} samples in batches of {batches.batch_size} leave a batch of one; BatchNorm1d cannot "
            "normalise one sample (1, C) in training: use drop_last=True or another batch_size"
        )


def _as_callbacks(callbacks: Any) -> list[Callback]:
    given = [callbacks] if callable(callbacks) or not isinstance(callbacks, Iterable) else list(callbacks)
    for callback in given:
        if isinstance(callback, ModelCheckpoint):
            raise TypeError("a ModelCheckpoint is no callback: give it as checkpoint=…")
        if not (isinstance(callback, Callback) or (callable(callback) and not isinstance(callback, type))):
            raise TypeError(f"callbacks are functions (history, model), or Callbacks; got {shown(callback)}")
    return [callback if isinstance(callback, Callback) else Called(callback) for callback in given]


def _status(training: Training, score: Score, val: Score | None = None) -> str:
    text = f"{training.epoch:>3}/{training.epochs}  loss {score.loss:.3f}  acc {score.accuracy:.3f}"
    return text if val is None or math.isnan(val.accuracy) else f"{text}  valid {val.accuracy:.3f}"


def _progress(show: bool) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns: Sequence[Any] = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=10),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
    )
    console = Console(quiet=not show)  # older versions of Rich end a bar that is not shown with an empty line
    return Progress(*columns, disable=not show, console=console)
