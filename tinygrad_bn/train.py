"""The training loop: `fit`, `evaluate`, `History`. For BatchNorm: `statistics_gap` compares batch and running
statistics, `recalibrate` recomputes the running statistics."""

from __future__ import annotations

import csv
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from tinygrad_bn import functional as F
from tinygrad_bn import nn
from tinygrad_bn.backend import Array, device_of
from tinygrad_bn.datasets import Batches, Dataset
from tinygrad_bn.modes import no_grad
from tinygrad_bn.optim import Adam, Optimizer, Schedule, clip_grad_norm_
from tinygrad_bn.tensor import Tensor

__all__ = ["Epoch", "Gap", "History", "Score", "evaluate", "fit", "recalibrate", "statistics_gap"]

Data: TypeAlias = Dataset | tuple[Array, Array]
Loss: TypeAlias = Callable[[Tensor, Array], Tensor]
Callback: TypeAlias = Callable[["History", nn.Module], bool | None]


class Score(NamedTuple):
    """Mean loss, and accuracy: the fraction of samples whose largest output is their class (NaN without classes)."""

    loss: float
    accuracy: float


class Gap(NamedTuple):
    """Scores of the same samples with batch statistics and with running statistics."""

    batch: Score
    running: Score


@dataclass(frozen=True)
class Epoch:
    """Metrics of one epoch; `seconds` is its wall time, validation included.

    `loss` and `accuracy` are means over the epoch's samples, taken during training in training mode, as in Keras.
    `val_loss` and `val_accuracy` are taken after the epoch in evaluation mode; NaN without validation data.
    """

    epoch: int
    loss: float
    accuracy: float
    val_loss: float
    val_accuracy: float
    seconds: float


@dataclass
class History:
    """The result of `fit`: the completed epochs, and whether Ctrl-C ended the training."""

    epochs: list[Epoch] = field(default_factory=list)
    interrupted: bool = False

    def __getitem__(self, column: str) -> list[float]:
        """One column, such as `history["val_accuracy"]`. Raises KeyError for an unknown name."""
        if column not in (names := [f.name for f in fields(Epoch)]):
            raise KeyError(f"no column {column!r}; the columns are {', '.join(names)}")
        return [getattr(e, column) for e in self.epochs]

    def __len__(self) -> int:
        return len(self.epochs)

    @property
    def seconds(self) -> float:
        """Wall time of all epochs."""
        return sum(e.seconds for e in self.epochs)

    def rows(self) -> list[dict[str, Any]]:
        """The epochs as dictionaries. NaN and Inf become None: JSON has no such numbers."""
        return [{k: v if math.isfinite(v) else None for k, v in asdict(e).items()} for e in self.epochs]

    def save(self, path: str | Path) -> None:
        """Write the epochs to a `.json` or `.csv` file. Raises ValueError for another suffix."""
        path = Path(path)
        if path.suffix == ".json":
            path.write_text(json.dumps({"interrupted": self.interrupted, "epochs": self.rows()}, indent=1))
        elif path.suffix == ".csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, [f.name for f in fields(Epoch)])
                writer.writeheader()
                writer.writerows(self.rows())
        else:
            raise ValueError(f"history can be saved as .json or .csv, not as {path.name!r}")


def fit(
    model: nn.Module,
    data: Data,
    *,
    validation: Data | None = None,
    epochs: int = 10,
    batch_size: int = 32,
    optimizer: Optimizer | None = None,
    loss: Loss = F.cross_entropy,
    seed: int = 0,
    drop_last: bool = False,
    schedule: Schedule | None = None,
    clip_norm: float | None = None,
    callbacks: Callback | Iterable[Callback] = (),
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
        loss: function (outputs, targets) that returns the mean loss of the batch.
        seed: for shuffling; the same seed gives the same batches.
        drop_last: skip the last batch if it is smaller than `batch_size`.
        schedule: learning rate schedule, stepped after every epoch.
        clip_norm: upper limit of the norm of all gradients together.
        callbacks: functions (history, model), all called after every epoch. Training ends if one returns True.
        progress: show a progress bar.
        description: label of the progress bar.
        device: "cpu" or "cuda". The model is moved there and stays there; the default is its present device.

    Returns:
        The history. After Ctrl-C it holds the completed epochs, and the model keeps its updates.

    Raises:
        ValueError: no data, data and targets of different lengths, or an option out of range.
        TypeError: `data` or `optimizer` has the wrong type, or the data are on a GPU.
        RuntimeError: the device is not available; the message says why.
    """
    if epochs < 0:
        raise ValueError(f"epochs has to be 0 or more; got {epochs}")
    if not (optimizer is None or isinstance(optimizer, Optimizer)):
        raise TypeError(f"optimizer has to be an Optimizer, such as optim.Adam(model.parameters()); got {optimizer!r}")
    x, y = _arrays(data)
    batches = Batches(x, y, batch_size, seed=seed, drop_last=drop_last)
    if not len(batches):
        raise ValueError(f"no batches: {len(x)} samples, batch_size={batch_size}, drop_last={drop_last}")
    _warn_about_batch_of_one(model, batches)
    if device is not None:
        model.to(device)
    optimizer = optimizer or Adam(model.parameters())
    callbacks = [callbacks] if callable(callbacks) else list(callbacks)
    history = History()
    model.train()
    bar = _progress(progress)
    task = bar.add_task(description, total=epochs * len(batches), status="")
    try:
        with bar:
            for number in range(1, epochs + 1):
                start = time.perf_counter()
                mean = _MeanScore()
                for xb, yb in batches:
                    mean.add(_train_step(model, xb, yb, loss, optimizer, clip_norm), len(xb))
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
    return history


class _MeanScore:
    """The mean score of all samples so far: batches may differ in size, so each counts by its samples."""

    def __init__(self) -> None:
        self.loss, self.accuracy, self.samples = 0.0, 0.0, 0  # sums over the samples, and their number

    def add(self, score: Score, samples: int) -> None:
        self.loss += score.loss * samples
        self.accuracy += score.accuracy * samples
        self.samples += samples

    def score(self) -> Score:
        return Score(self.loss / self.samples, self.accuracy / self.samples)


def _train_step(
    model: nn.Module, x: Array, y: Array, loss: Loss, optimizer: Optimizer, clip_norm: float | None
) -> Score:
    outputs = model(x)
    value = loss(outputs, _target(y, outputs))
    optimizer.zero_grad()
    value.backward()
    if clip_norm is not None:
        clip_grad_norm_((p for group in optimizer.param_groups for p in group["params"]), clip_norm)
    optimizer.step()
    return Score(float(value), _accuracy(outputs, y))


def evaluate(model: nn.Module, data: Data, *, loss: Loss = F.cross_entropy, batch_size: int = 1000) -> Score:
    """Mean loss and accuracy of `data` in evaluation mode. Afterwards each module is back in its mode."""
    with nn.evaluating(model):
        return _score(model, Batches(*_arrays(data), batch_size, shuffle=False), loss)


def statistics_gap(model: nn.Module, data: Data, *, loss: Loss = F.cross_entropy, batch_size: int = 32) -> Gap:
    """Scores of `data`, normalised by batch statistics and by BatchNorm's running statistics.

    Nothing else differs: dropout is off in both, and the model's state and modes do not change. A large gap means
    that the running statistics do not match the data: the batches were too small or too few, or the training data
    were different. `recalibrate` corrects this.

    Args:
        model, data, loss: as for `fit`.
        batch_size: samples per batch, as in training. The data are split into equal batches of at least this size.

    Raises:
        ValueError: no samples, a `batch_size` below 1, or batches with one value per channel.
    """
    x, y = _arrays(data)
    batches = [(x[chosen], y[chosen]) for chosen in _split(len(x), batch_size)]
    with nn.batch_statistics(model):
        batch = _score(model, batches, loss)
    with nn.evaluating(model):
        return Gap(batch, _score(model, batches, loss))


def recalibrate(model: nn.Module, data: Data | Array, *, batch_size: int = 1000) -> None:
    """Set BatchNorm's running statistics to those of `data`; every value has equal weight, momentum is not used.

    Each layer gets the mean and variance of all its inputs while batch statistics normalise. The variance is the one
    within the batches plus the one of their means (PreciseBN, Wu & Johnson 2021; PyTorch's `update_bn` omits the
    second term, so small batches give too small a variance). Dropout is off, as in evaluation. Parameters and frozen
    layers do not change. On an error nothing changes.

    Args:
        model: any module; without BatchNorm nothing happens.
        data: usually the training data: samples, or samples and targets. Targets are not used.
        batch_size: samples per batch. The data are split in a fixed random order into equal batches of at least
            this size.

    Raises:
        ValueError: no samples, a `batch_size` below 1, batches with one value per channel, or statistics that are
            not finite.
    """
    x = data if isinstance(data, np.ndarray) else _arrays(data)[0]
    with nn.batch_statistics(model) as collected, no_grad():
        for chosen in _split(len(x), batch_size):
            model(x[chosen])
    new = {}
    for layer, batches in collected.items():
        if batches:  # empty if the model does not use this layer
            values = (*_pooled(batches, layer.running_var_correction), len(batches))
            for buffer, value in zip(layer.buffers(), values, strict=True):
                new[buffer] = np.asarray(value, buffer.dtype)
                if not np.isfinite(new[buffer]).all():
                    raise ValueError(f"the statistics of the data are not finite in {layer!r}; nothing was changed")
    for buffer, value in new.items():
        buffer.data = value


def _pooled(batches: Sequence[nn.BatchStatistics], correction: int) -> tuple[Array, Array]:
    """Mean and variance (C,) over the values of all batches."""
    means, variances, counts = map(np.array, zip(*batches, strict=True))
    with np.errstate(over="ignore", invalid="ignore"):
        mean = np.average(means, axis=0, weights=counts)
        var = np.average(variances + (means - mean) ** 2, axis=0, weights=counts)
    return mean, var * counts.sum() / (counts.sum() - correction)


def _split(n: int, batch_size: int) -> list[Array]:
    """Indices 0 … n − 1 in a fixed random order, split into equal parts (±1) of at least `batch_size`, or one part."""
    if batch_size < 1:
        raise ValueError(f"batch_size has to be at least 1; got {batch_size}")
    if not n:
        raise ValueError("no samples to compute statistics from")
    return np.array_split(np.random.default_rng(0).permutation(n), max(1, n // batch_size))


def _score(model: nn.Module, batches: Iterable[tuple[Array, Array]], loss: Loss) -> Score:
    """Mean loss and accuracy in the model's present mode."""
    mean = _MeanScore()
    with no_grad():
        for x, y in batches:
            outputs = model(x)
            mean.add(Score(float(loss(outputs, _target(y, outputs))), _accuracy(outputs, y)), len(x))
    if not mean.samples:
        raise ValueError("no samples to evaluate on")
    return mean.score()


def _target(y: Array, outputs: Tensor) -> Any:
    """The targets on the device of the outputs; on the CPU the array itself."""
    return y if outputs.device == "cpu" else Tensor(y).to(outputs.device)


def _accuracy(outputs: Tensor, y: Array) -> float:
    classes = outputs.shape[1] if outputs.ndim > 1 else 1
    if y.dtype.kind not in "iu" or classes == 1 or outputs.shape[:1] + outputs.shape[2:] != y.shape:
        return float("nan")
    return float(np.mean(np.argmax(outputs.numpy(), axis=1) == y))


def _arrays(data: Data) -> tuple[Array, Array]:
    if not isinstance(data, Dataset) and not (isinstance(data, tuple) and len(data) == 2):
        raise TypeError(f"data has to be a Dataset or a pair of arrays (x, y); got a {type(data).__name__}")
    x, y = (data.x, data.y) if isinstance(data, Dataset) else data
    for a in (x, y):
        if device_of(a) != "cpu":
            raise TypeError(
                "data has to be on the CPU, as each batch is copied to the model's device; got arrays on "
                f"{device_of(a)}: copy them with .numpy()"
            )
    x, y = np.asarray(x), np.asarray(y)
    if len(x) != len(y):
        raise ValueError(f"{len(x)} samples, but {len(y)} targets")
    return x, y


def _warn_about_batch_of_one(model: nn.Module, batches: Batches) -> None:
    if batches.smallest == 1 and any(isinstance(m, nn.BatchNorm1d) and not m.stats_frozen for m in model.modules()):
        warnings.warn(
            f"{len(batches.x)} samples in batches of {batches.batch_size} leave a batch of one; BatchNorm1d cannot "
            "normalise one sample (1, C) in training: use drop_last=True or another batch_size",
            stacklevel=3,
        )


def _status(number: int, epochs: int, score: Score, val: Score | None = None) -> str:
    text = f"{number:>3}/{epochs}  loss {score.loss:.3f}  acc {score.accuracy:.3f}"
    return text if val is None or math.isnan(val.accuracy) else f"{text}  valid {val.accuracy:.3f}"


def _progress(show: bool) -> Any:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns: Sequence[Any] = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=10),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
    )
    return Progress(*columns, disable=not show)
