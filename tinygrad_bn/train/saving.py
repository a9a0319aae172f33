"""Checkpoints of a training, and going on from one with the same bits."""

from __future__ import annotations

import hashlib
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import numpy as np

from tinygrad_bn import nn
from tinygrad_bn.arguments import expect_flags, expect_integer, expect_number, expect_text, shown, warn_caller
from tinygrad_bn.backend import Array
from tinygrad_bn.checkpoint import CheckpointError, Contents, Folder, apply, read, save
from tinygrad_bn.datasets import Batches
from tinygrad_bn.keywords import Named
from tinygrad_bn.train.callback import Callback, Training
from tinygrad_bn.train.history import Epoch, sign_of
from tinygrad_bn.train.steps import Steps

POSITION = ("epoch", "batch", "step", "loss", "order", "seconds")
TRAINED: set[Path] = set()  # folders of the trainings under way in this process
LOCK = Lock()
EPOCH = "epoch-start.safetensors"  # what nonfinite="restore" would restore


@dataclass(frozen=True)
class ModelCheckpoint(Named):
    """Where `fit` writes checkpoints, and which are kept.

    Attributes:
        folder: made if it is missing. One training has a folder of its own.
        every: steps between checkpoints, beside the one after each epoch; None for none.
        min_seconds: a checkpoint is left out if the last one is not so old. The best one, the one at the end and the
            one after an interrupt are always written.
        best: whether the best epoch is kept as `best.safetensors`.
        keep: how many of the newest are kept.
        monitor: the column of the history that says which epoch is best; the default is "val_loss", or "loss" without
            validation. Accuracies are best at the top, losses at the bottom.
        on_error: what to do if a checkpoint cannot be written, as on a full disk: "raise" the OSError, or "warn" and go
            on. The checkpoints before it stay as they are.
        advice: how to go on, which is printed after an interrupt.

    Raises TypeError or ValueError for an option that does not fit.
    """

    folder: str | Path
    every: int | None = None
    min_seconds: float = 0.0
    best: bool = True
    keep: int = 3
    monitor: str | None = None
    on_error: Literal["raise", "warn"] = "raise"
    advice: str = "give resume=True to go on"

    def __post_init__(self) -> None:
        if not isinstance(self.folder, str | Path):
            raise TypeError(f"a folder for checkpoints is a path; got {shown(self.folder)}")
        if not str(self.folder):
            raise ValueError('the folder for checkpoints has no name; "." is the present one')
        if self.every is not None:
            expect_integer("every", self.every, 1)
        expect_number("min_seconds", self.min_seconds, 0)
        expect_flags(best=self.best)
        expect_integer("keep", self.keep, 1)
        if self.monitor is not None:
            sign_of(self.monitor)
        expect_text("advice", self.advice)
        if self.on_error not in ("raise", "warn"):
            raise ValueError(f"on_error is 'raise' or 'warn'; got {shown(self.on_error)}")

    @staticmethod
    def of(checkpoint: Any, every: Any, resume: Any) -> ModelCheckpoint | None:
        """What the options `checkpoint`, `every` and `resume` of `fit` say together."""
        expect_flags(resume=resume)
        if checkpoint is None:
            if every is not None or resume:
                raise ValueError(f"{'resume' if resume else 'every'} needs a folder of checkpoints: give checkpoint=…")
            return None
        if not isinstance(checkpoint, ModelCheckpoint):
            return ModelCheckpoint(checkpoint, every)
        if every is not None:
            raise ValueError("every is given twice: it is an option of the ModelCheckpoint")
        return checkpoint


def _attributes(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What callbacks may change of modules, by path: numbers, texts and flags, and which parameters are trained."""
    found = {}
    for path, module in model.named_modules():
        own = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str) and k != "training"}
        trained = {
            f"{k}.requires_grad": v.requires_grad for k, v in vars(module).items() if isinstance(v, nn.Parameter)
        }
        found[path] = own | trained
    return found


def _set_attributes(model: nn.Module, saved: Mapping[str, Mapping[str, Any]]) -> None:
    """Set what differs from what `_attributes` gave."""
    now = _attributes(model)
    for path, module in model.named_modules():
        for name, value in saved.get(path, {}).items():
            if name in now[path] and now[path][name] != value:
                parameter, dot, attribute = name.partition(".")
                setattr(getattr(module, parameter) if dot else module, attribute or name, value)


def _digest(*arrays: Array) -> str:
    """SHA-256 of the bytes of arrays."""
    digest = hashlib.sha256()
    for a in arrays:
        digest.update(np.ascontiguousarray(a).view(np.uint8).data if a.size else b"")
    return digest.hexdigest()


def _name_of(function: Any) -> str:
    """A function by name, a partial one with its options."""
    if isinstance(function, partial):
        return f"{_name_of(function.func)} with {function.args!r} and {function.keywords!r}"
    return str(getattr(function, "__qualname__", type(function).__qualname__))


class Saver:
    """Writes the checkpoints of a training.

    Raises ValueError if the folder has checkpoints already and the training does not go on from them; BlockingIOError
    if another training writes into it; OSError if it cannot be written to.
    """

    def __init__(
        self,
        settings: ModelCheckpoint,
        training: Training,
        batches: Batches,
        steps: Steps,
        callbacks: list[Callback],
        resumes: bool,
    ) -> None:
        self.settings, self.training, self.batches, self.steps = settings, training, batches, steps
        self.stateful = [c for c in callbacks if type(c).state_dict is not Callback.state_dict]
        self.folder = Folder(settings.folder, keep=settings.keep)
        if not resumes and (newest := self.folder.newest()):
            raise ValueError(
                f"{newest.parent} has checkpoints of a training: resume=True goes on from {newest.name}; or give "
                "another folder"
            )
        if settings.monitor in ("val_loss", "val_accuracy") and not training.validates:
            raise ValueError(f"there is no {settings.monitor} without validation data: monitor another column")
        self.digest = _digest(batches.x, batches.y)
        self.monitor = settings.monitor or ("val_loss" if training.validates else "loss")
        self.state: dict[str, Any] = {"optimizer": training.optimizer, "schedule": training.schedule}
        if isinstance(batches.seed, np.random.Generator):
            self.state["generators"] = {"batches": batches.seed}
        self.sign, self.best = sign_of(self.monitor), math.inf  # the value of the best checkpoint, the less the better
        self.saved: tuple[int, int] | None = None  # epoch and step of the newest checkpoint
        self.time = time.monotonic()  # of the newest checkpoint, or of the start
        self._write(self.folder.lock)  # so that another process in this folder shows now
        self.key = self.folder.path.resolve()
        with LOCK:
            if self.key in TRAINED:
                raise BlockingIOError(f"{self.folder.path}: another training of this process writes checkpoints there")
            TRAINED.add(self.key)

    # ---- writing ----------------------------------------------------------------------------------------

    def at_begin(self) -> None:
        """Write a first checkpoint, so that what cannot be saved shows now."""
        if self.saved is None and self.is_time():
            self.save()

    def before_epoch(self) -> None:
        """Keep what `nonfinite="restore"` may have to restore, until the next epoch."""
        if self.steps.nonfinite == "restore":
            start = {"epoch": self.training.epoch}
            self._write(lambda: save(self.folder.path / EPOCH, self.training.model, **self.state, extra=start))

    def after_step(self) -> None:
        """Write a checkpoint, if it is time for one."""
        every, training = self.settings.every, self.training
        if every is not None and training.step % every == 0 and training.batch < training.batches and self.is_time():
            self.save()

    def after_epoch(self) -> None:
        """Write a checkpoint, also as the best one if it is."""
        value = self.training.history[self.monitor][-1] * self.sign
        if self.settings.best and value < self.best:
            self.save(best=value)
        elif self.is_time():
            self.save()

    def is_time(self) -> bool:
        """Whether the last checkpoint is old enough for another one."""
        return time.monotonic() >= self.time + self.settings.min_seconds

    def at_end(self) -> None:
        """Write a checkpoint, unless the newest is of this moment."""
        if self.saved != (self.training.epoch, self.training.step):
            self.save()

    def interrupted(self, whole: bool) -> None:
        """Write a checkpoint, unless a step was left in the middle; and say how to go on."""
        if whole:
            try:
                self.at_end()
            except OSError as error:
                print(error, file=sys.stderr)
        newest = self.folder.newest()
        text = f"the newest checkpoint is {newest}; {self.settings.advice}" if newest else "there is no checkpoint yet"
        print(f"interrupted after step {self.training.step}: {text}", file=sys.stderr)

    def save(self, best: float | None = None) -> None:
        """Write a checkpoint; as the best one too, if it is one: `best` is its value."""
        training, is_best = self.training, best is not None
        value = self.best if best is None else best
        extra = {
            "settings": self.fixed(), "position": {name: getattr(training, name) for name in POSITION},
            "mean": vars(training.mean), "history": asdict(training.history),
            "callbacks": [callback.state_dict() for callback in self.stateful], "best": value,
            "attributes": _attributes(training.model),
        }  # fmt: skip
        state = {**self.state, "extra": extra}
        if self._write(lambda: self.folder.save(training.step, training.model, best=is_best, **state)):
            self.saved, self.time, self.best = (training.epoch, training.step), time.monotonic(), value

    def _write(self, write: Callable[[], object]) -> bool:
        """Whether it was written; else there is a warning, or the error."""
        try:
            write()
        except OSError as error:
            if self.settings.on_error == "raise" or isinstance(error, BlockingIOError):  # another process writes there
                raise
            warn_caller(f"no checkpoint of step {self.training.step}, training goes on: {error}", RuntimeWarning)
            return False
        return True

    def close(self) -> None:
        """Let other processes write into the folder."""
        self.folder.close()
        with LOCK:
            TRAINED.discard(self.key)

    # ---- going on ---------------------------------------------------------------------------------------

    def fixed(self) -> dict[str, Any]:
        """What has to be the same to go on."""
        batches, seed = self.batches, self.batches.seed
        return {
            "batch_size": batches.batch_size,
            "drop_last": batches.drop_last,
            "seed": "a Generator" if isinstance(seed, np.random.Generator) else seed if seed is None else int(seed),
            "samples": [*batches.x.shape, str(batches.x.dtype)],
            "data": self.digest,
            "loss": _name_of(self.steps.loss),
            "clip_norm": self.steps.clip_norm,
            "nonfinite": self.steps.nonfinite,
            "validation": self.training.validates,
            "callbacks": [type(callback).__qualname__ for callback in self.stateful],
        }

    def resume(self) -> None:
        """Load the newest checkpoint, if there is one."""
        try:
            if self.folder.newest() is not None:
                self._resume()
        except BaseException:
            self.close()
            raise

    def _resume(self) -> None:
        training = self.training
        contents = self.folder.read_newest()
        self.check(contents)
        extra = contents.extra
        for callback, own in zip(self.stateful, extra["callbacks"], strict=True):
            try:
                callback.load_state_dict(own)
            except Exception as error:
                name = type(callback).__qualname__
                raise CheckpointError(
                    contents.path, f"the state of the callback {name} does not fit: {error}"
                ) from error
        apply(contents, training.model, **self.state)
        _set_attributes(training.model, extra["attributes"])
        if len(extra["position"]["order"]):
            self._remember(contents)
        for name in POSITION:
            setattr(training, name, extra["position"][name])
        vars(training.mean).update(extra["mean"])
        vars(training.history).update(extra["history"], interrupted=False)
        training.history.epochs = [Epoch(**epoch) for epoch in extra["history"]["epochs"]]
        self.batches.epoch = training.epoch - (not len(training.order))
        self.best = extra["best"]
        self.saved = training.epoch, training.step
        if training.history.stopped:
            warn_caller(f"the training in {self.folder.path} has ended, and does not go on: {training.history.stopped}")

    def _remember(self, contents: Contents) -> None:
        """Note what the epoch that `contents` are from the middle of may have to restore."""
        path = self.folder.path / EPOCH
        start = read(path) if self.steps.nonfinite == "restore" and path.exists() else None
        if start is not None and start.extra["epoch"] == contents.extra["position"]["epoch"]:
            apply(start, self.training.model, **self.state)
            self.steps.remember()
            apply(contents, self.training.model, **self.state)
        else:
            self.steps.remember()

    def check(self, contents: Contents) -> None:
        """Raise CheckpointError if a file is not one of this training."""
        was = contents.extra.get("settings") if isinstance(contents.extra, Mapping) else None
        if not isinstance(was, Mapping):
            raise CheckpointError(contents.path, "it was not written by fit; load it with checkpoint.load")
        for name, value in self.fixed().items():
            if was.get(name) != value:
                raise CheckpointError(
                    contents.path,
                    f"it belongs to a training with {name}={shown(was.get(name))}, and this one has "
                    f"{name}={shown(value)}; give the arguments of the training that was interrupted",
                )
