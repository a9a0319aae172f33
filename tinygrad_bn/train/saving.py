"""Checkpoints of a training, and going on from one with the same bits."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tinygrad_bn.arguments import expect_flags, expect_integer, expect_number, shown, warn_caller
from tinygrad_bn.checkpoint import CheckpointError, Contents, Folder, apply, read, save
from tinygrad_bn.datasets import Batches
from tinygrad_bn.train.callback import Callback, Training
from tinygrad_bn.train.history import Epoch, sign_of
from tinygrad_bn.train.steps import Steps

POSITION = ("epoch", "batch", "step", "loss", "order", "seconds", "stopped")
EPOCH = "epoch-start.safetensors"  # what nonfinite="restore" would restore


@dataclass(frozen=True)
class ModelCheckpoint:
    """Where `fit` writes checkpoints, and which are kept.

    Attributes:
        folder: made if it is missing. One training has a folder of its own.
        every: steps between checkpoints; None for one after each epoch only. There is always one after each epoch.
        min_seconds: a checkpoint is left out if the last one is not so old. The one at the end is always written.
        keep: how many of the newest are kept, beside `best.safetensors`, that of the best epoch.
        monitor: the column of the history that says which epoch is best; the default is "val_loss", or "loss" without
            validation. Accuracies are best at the top, losses at the bottom.
        on_error: what to do if a checkpoint cannot be written, as on a full disk: "raise" the OSError, or "warn" and go
            on. The checkpoints before it stay as they are.

    Raises TypeError or ValueError for an option that does not fit.
    """

    folder: str | Path
    every: int | None = None
    min_seconds: float = 0.0
    keep: int = 3
    monitor: str | None = None
    on_error: Literal["raise", "warn"] = "raise"
    advice: str = "give resume=True to go on"

    def __post_init__(self) -> None:
        if not isinstance(self.folder, str | Path):
            raise TypeError(f"a folder for checkpoints is a path; got {shown(self.folder)}")
        if self.every is not None:
            expect_integer("every", self.every, 1)
        expect_number("min_seconds", self.min_seconds, 0)
        expect_integer("keep", self.keep, 1)
        if self.monitor is not None:
            sign_of(self.monitor)
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


class Saver:
    """Writes the checkpoints of a training.

    Raises ValueError if the folder has checkpoints already and the training does not go on from them.
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
        self.callbacks, self.folder = callbacks, Folder(settings.folder, keep=settings.keep)
        if not resumes and (newest := self.folder.newest()):
            raise ValueError(
                f"{newest.parent} has checkpoints of a training: resume=True goes on from {newest.name}; or give "
                "another folder"
            )
        self.monitor = settings.monitor or ("val_loss" if training.validates else "loss")
        self.state: dict[str, Any] = {"optimizer": training.optimizer, "schedule": training.schedule}
        if isinstance(batches.seed, np.random.Generator):
            self.state["generators"] = {"batches": batches.seed}
        self.sign = sign_of(self.monitor)
        self.saved: tuple[int, int] | None = None  # epoch and step of the newest checkpoint
        self.time = time.monotonic()  # of the newest checkpoint, or of the start

    # ---- writing ----------------------------------------------------------------------------------------

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
        if self.is_time():
            *before, last = np.array(self.training.history[self.monitor]) * self.sign
            self.save(best=bool(last < np.nanmin([*before, np.inf])))

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
            self.at_end()
        newest = self.folder.newest()
        text = f"wrote {newest}; {self.settings.advice}" if newest else "there is no checkpoint yet"
        print(f"interrupted after step {self.training.step}: {text}", file=sys.stderr)

    def save(self, best: bool = False) -> None:
        """Write a checkpoint."""
        training = self.training
        extra = {
            "settings": self.fixed(), "position": {name: getattr(training, name) for name in POSITION},
            "mean": vars(training.mean), "history": asdict(training.history),
            "callbacks": [callback.state_dict() for callback in self.callbacks],
        }  # fmt: skip
        if self._write(lambda: self.folder.save(training.step, training.model, **self.state, extra=extra, best=best)):
            self.saved, self.time = (training.epoch, training.step), time.monotonic()

    def _write(self, write: Callable[[], object]) -> bool:
        """Whether it was written; else there is a warning, or the error."""
        try:
            write()
        except OSError as error:
            if self.settings.on_error == "raise":
                raise
            warn_caller(f"no checkpoint of step {self.training.step}, training goes on: {error}", RuntimeWarning)
            return False
        return True

    # ---- going on ---------------------------------------------------------------------------------------

    def fixed(self) -> dict[str, Any]:
        """What has to be the same to go on."""
        batches, seed = self.batches, self.batches.seed
        return {
            "batch_size": batches.batch_size,
            "drop_last": batches.drop_last,
            "seed": "a Generator" if isinstance(seed, np.random.Generator) else seed if seed is None else int(seed),
            "samples": [*batches.x.shape, str(batches.x.dtype)],
            "callbacks": [type(callback).__qualname__ for callback in self.callbacks],
        }

    def resume(self) -> None:
        """Load the newest checkpoint, if there is one."""
        training = self.training
        if self.folder.newest() is None:
            return
        contents = self.folder.read_newest()
        self.check(contents)
        apply(contents, training.model, **self.state)
        extra = contents.extra
        if len(extra["position"]["order"]):
            self._remember(contents)
        for name in POSITION:
            setattr(training, name, extra["position"][name])
        vars(training.mean).update(extra["mean"])
        vars(training.history).update(extra["history"], interrupted=False)
        training.history.epochs = [Epoch(**epoch) for epoch in extra["history"]["epochs"]]
        self.batches.epoch = training.epoch - (not len(training.order))
        for callback, own in zip(self.callbacks, extra["callbacks"], strict=True):
            callback.load_state_dict(own)
        self.saved = training.epoch, training.step

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
