"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np

from tinygrad_bn import captured, nn
from tinygrad_bn import functional as F
from tinygrad_bn.arguments import expect_flags, expect_integer, expect_number, expect_text, shown, warn_caller
from tinygrad_bn.backend import Array, to_numpy
from tinygrad_bn.datasets import Batches, Seed
from tinygrad_bn.optim import Adam, Optimizer, Schedule, clip_grad_norm_
from tinygrad_bn.optim.gradients import all_finite
from tinygrad_bn.tensor import Tensor
from tinygrad_bn.train.history import Epoch, History
from tinygrad_bn.train.scores import (
    Data,
    Loss,
    MeanScore,
    Score,
    arrays_of,
    evaluate,
    expect_model,
    measure,
    outputs_and_loss,
)

Callback: TypeAlias = Callable[[History, nn.Module], bool | None]
NonFinite: TypeAlias = Literal["raise", "skip", "restore", "ignore"]


class NonFiniteError(FloatingPointError):
    """A loss, a gradient or a parameter became NaN or infinite. `history` holds the completed epochs."""

    history: History


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
    callbacks: Callback | Iterable[Callback] = (),
    capture: bool = True,
    progress: bool = True,
    description: str = "training",
    device: str | None = None,
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
        callbacks: functions (history, model), all called after every epoch. Training ends if one returns True. The
            method `on_step(model)` of a callback, if it has one, is called after every step.
        capture: record forward and backward pass once, and run them as a straight line of array operations: the same
            bits, faster. See `tinygrad_bn.capture`. Steps that it refuses run as always, without a warning.
        progress: show a progress bar.
        description: label of the progress bar.
        device: "cpu" or "cuda". The model is moved there and stays there; the default is its present device.

    Returns:
        The history. After Ctrl-C it holds the completed epochs, and the model keeps its updates; one that was under
        way may have reached only some of the parameters.

    Raises:
        ValueError: no data, data and targets of different lengths, an option out of range, or no parameter that
            requires a gradient.
        TypeError: an argument has the wrong type, or the data are on a GPU.
        NonFiniteError: see `nonfinite`. Also with "skip", where a parameter is not finite: no batch can help then.
        RuntimeError: the device is not available; the message says why.
    """
    expect_model(model, loss)
    epochs = expect_integer("epochs", epochs, 0)
    expect_flags(progress=progress, capture=capture)
    expect_text("description", description)
    if nonfinite not in ("raise", "skip", "restore", "ignore"):
        raise ValueError(f"nonfinite is one of 'raise', 'skip', 'restore' and 'ignore'; got {shown(nonfinite)}")
    if clip_norm is not None:
        clip_norm = expect_number("clip_norm", clip_norm, 0, finite=False)
    callbacks = list(callbacks) if isinstance(callbacks, Iterable) and not callable(callbacks) else [callbacks]
    if not all(map(callable, callbacks)):
        raise TypeError(f"callbacks are functions (history, model); got {shown(callbacks)}")
    _expect_optimizer(optimizer, schedule)
    each_step = [c.on_step for c in callbacks if hasattr(c, "on_step")]
    if not all(map(callable, each_step)):
        raise TypeError(f"on_step of a callback is a function of the model; got {each_step!r}")
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
    steps = _Steps(model, optimizer, loss, clip_norm, nonfinite, capture)
    history = History()
    model.train()
    bar = _progress(progress)
    task = bar.add_task(description, total=epochs * len(batches), status="")
    try:
        with bar:
            for number in range(1, epochs + 1):
                start = time.perf_counter()
                mean = MeanScore()
                steps.remember()
                for i, (x, y) in enumerate(batches, 1):
                    if fault := steps.take(x, y, mean):
                        steps.handle(f"epoch {number}, step {i} of {len(batches)}: {fault}", history)
                        if history.diverged:
                            return history
                    for watch in each_step:
                        watch(model)
                    bar.update(task, advance=1, status=_status(number, epochs, mean.score()))
                val = evaluate(model, validation, loss=loss) if validation is not None else Score(np.nan, np.nan)
                history.epochs.append(Epoch(number, *mean.score(), *val, time.perf_counter() - start))
                bar.update(task, status=_status(number, epochs, mean.score(), val))
                if schedule is not None:
                    schedule.step()
                stop = [callback(history, model) for callback in callbacks]  # a list: all are called
                if any(stop):
                    break
    except KeyboardInterrupt:
        history.interrupted = True
        model.train()  # a callback may not have come to leave evaluation mode
    return history


class _Steps:
    """The steps of the optimizer, and what happens where one would not be finite."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss: Loss,
        clip_norm: float | None,
        nonfinite: NonFinite,
        captures: bool,
    ) -> None:
        self.model, self.optimizer, self.loss, self.clip_norm = model, optimizer, loss, clip_norm
        self.nonfinite = nonfinite
        self.params = [p for group in optimizer.param_groups for p in group["params"]]

        def both_ways(x: Array, y: Array) -> tuple[Tensor, Any, Any]:
            outputs, target, value = outputs_and_loss(model, loss, x, y)
            optimizer.zero_grad()
            mean = value[0] if isinstance(value, tuple) else value
            if isinstance(mean, Tensor) and mean.size == 1:  # what else it may be is reported later
                mean.backward()
            return outputs, target, value

        self.run = captured.capture(both_ways, quiet=True) if captures else both_ways

    def remember(self) -> None:
        """Note what the epoch that begins may have to restore. Arrays of tensors are replaced, never written into."""
        self.buffers = list(self.model.buffers())
        if self.nonfinite == "restore":
            tensors = {*self.params, *self.model.parameters(), *self.buffers}
            self.epoch = [(t, t._data) for t in tensors], self.optimizer._undoing()

    def take(self, x: Array, y: Array, mean: MeanScore) -> str:
        """Take a step on a batch, and its score into the mean; or say why not, with the model as it was before."""
        tensors = [*self.params, *self.buffers]
        before = [t._data for t in tensors]
        batch = measure(self.run, x, y, self.loss)
        if not isinstance(batch.value, Tensor):
            raise TypeError(f"loss has to return a Tensor; got a {type(batch.value).__name__}")
        looks, fault, undo = self.nonfinite != "ignore", "", None
        if batch.weight:
            fault = f"the loss is {batch.loss}" if looks and not math.isfinite(batch.loss) else self._clipped()
            if not fault:
                undo = self.optimizer._undoing() if looks else None
                self.optimizer.step()
        if looks and not fault:
            fault = self._overflow([pair for pair in zip(tensors, before, strict=True) if pair[0]._data is not pair[1]])
        if not fault:
            mean.add(batch)
            return ""
        if undo is not None:
            undo()
        for t, array in zip(tensors, before, strict=True):
            t._data = array
        return fault if np.isfinite(x).all() else f"{fault}, since the samples are not finite"

    def _clipped(self) -> str:
        """Clip the gradients; why that is not possible, or "" if all are finite."""
        if self.nonfinite == "ignore" and self.clip_norm is None:
            return ""
        norm = clip_grad_norm_(self.params, math.inf if self.clip_norm is None else self.clip_norm)
        if math.isfinite(norm) or self.nonfinite == "ignore":
            return ""
        wrong = [p for p in self.params if p.grad is not None and not _is_finite(p.grad)]
        return (
            f"the gradient of {self._name(wrong[0])} is not finite" if wrong else "the norm of the gradients overflows"
        )

    def _overflow(self, changed: list[tuple[Tensor, Array]]) -> str:
        """Which of the changed tensors, each with its array before, becomes NaN or infinite; "" if none does."""
        if all_finite([t._data for t, _ in changed if t._data.dtype.kind == "f"]):
            return ""
        for t, old in changed:
            was, now = to_numpy(old), to_numpy(t)
            if (~np.isfinite(now) & (now != was) & ~np.isnan(was)).any():
                cure = "" if isinstance(t, nn.module.Buffer) else ": lower the learning rate"
                return f"{self._name(t)} would become NaN or infinite{cure}"
        return ""

    def handle(self, fault: str, history: History) -> None:
        """Skip the step, or restore the last completed epoch, or raise the error."""
        if self.nonfinite == "restore":
            tensors, undo = self.epoch
            undo()
            for t, array in tensors:
                t._data = array
            history.diverged = fault
            return
        wrong = [p for p in self.params if not _is_finite(p)]
        if self.nonfinite == "skip" and not wrong:
            history.skipped += 1
            return
        kept = "parameters and running statistics are those before this step"
        if wrong:
            kept = f"{self._name(wrong[0])} was not finite before this step"
        error = NonFiniteError(f"{fault}; {kept}. See the option nonfinite of fit")
        error.history = history
        raise error

    def _name(self, p: Tensor) -> str:
        names = {t: name for name, t in self.model.named_tensors()}
        return names.get(p, f"a parameter of shape {p.shape}")


def _is_finite(t: Tensor) -> bool:
    return bool(np.isfinite(to_numpy(t)).all())


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


def _status(number: int, epochs: int, score: Score, val: Score | None = None) -> str:
    text = f"{number:>3}/{epochs}  loss {score.loss:.3f}  acc {score.accuracy:.3f}"
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
