"""Loss and accuracy of a model, exact over any number of batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from tinygrad_bn import functional as F
from tinygrad_bn import nn
from tinygrad_bn.arguments import expect_number, is_real, shown, warn_caller
from tinygrad_bn.backend import Array, device_of
from tinygrad_bn.datasets import Batches, Dataset, expect_arrays
from tinygrad_bn.functional.reductions import Reduced, reductions
from tinygrad_bn.modes import no_grad, recording
from tinygrad_bn.tensor import Tensor

Data: TypeAlias = Dataset | tuple[Array, Array]
Loss: TypeAlias = Callable[[Tensor, Any], Any]


class Score(NamedTuple):
    """Mean loss, and accuracy: the fraction of targets whose class has the largest output (NaN without classes).

    Both are over the targets that count. The loss's `ignore_index` does not, nor does a negative class for accuracy.
    """

    loss: float
    accuracy: float


class Batch(NamedTuple):
    """The loss of a batch and its weight in a mean over batches; and the targets that were hit, of those that count.

    Of the loss, `sum_part` is a sum over the targets that count; the rest is a mean.
    """

    value: Any
    loss: float
    weight: float
    sum_part: float
    hits: int
    counted: int


class MeanScore:
    """The mean score of all targets so far."""

    def __init__(self) -> None:
        self.loss, self.weight, self.hits, self.counted = 0.0, 0.0, 0, 0

    def add(self, batch: Batch) -> None:
        """Take in a batch. Its loss is left out if no target counts, where it is 0 / 0."""
        if batch.weight:
            self.loss += batch.sum_part + (batch.loss - batch.sum_part) * batch.weight
            self.weight += batch.weight
        self.hits += batch.hits
        self.counted += batch.counted

    def score(self) -> Score:
        """NaN for what has no targets."""
        return Score(
            self.loss / self.weight if self.weight else float("nan"),
            self.hits / self.counted if self.counted else float("nan"),
        )


def evaluate(model: nn.Module, data: Data, *, loss: Loss = F.cross_entropy, batch_size: int = 1000) -> Score:
    """Mean loss and accuracy of `data` in evaluation mode. Afterwards each module is back in its mode.

    The result does not depend on `batch_size`, for the losses that `fit` can average.

    Raises:
        ValueError: no samples, or options out of range.
        TypeError: an argument of the wrong type.
    """
    expect_model(model, loss)
    with nn.evaluating(model):
        return score(model, Batches(*arrays_of(data), batch_size, shuffle=False), loss)


def confusion(model: nn.Module, data: Data, *, batch_size: int = 1000) -> Array:
    """How often each class was taken for each: counts (C, C), int64, rows by true class, columns by predicted class.

    In evaluation mode; afterwards each module is back in its mode. The model's outputs have C classes along axis 1, and
    the class with the largest output is predicted. Negative targets do not count. `viz.plot_confusion` draws it.

    Raises:
        ValueError: no samples; targets that are no classes of the outputs; outputs that are NaN.
        TypeError: an argument of the wrong type.
    """
    expect_model(model)
    counts: Array | None = None
    with nn.evaluating(model), no_grad():
        for x, y in Batches(*arrays_of(data), batch_size, shuffle=False):
            outputs = model(x)
            if not isinstance(outputs, Tensor):
                raise TypeError(f"{type(model).__name__} has to return a Tensor; got a {type(outputs).__name__}")
            scores = outputs.numpy()
            if y.dtype.kind not in "iu" or scores.ndim < 2 or scores.shape[:1] + scores.shape[2:] != y.shape:
                raise ValueError(
                    f"targets have to be integers, a class for each output; got {y.dtype} of shape {y.shape} for "
                    f"outputs of shape {scores.shape}"
                )
            if np.isnan(scores).any():
                raise ValueError("outputs of the model are NaN, so they predict no class")
            classes = scores.shape[1]
            if y.size and y.max() >= classes:
                raise ValueError(f"there is a target {y.max()}, and the outputs have the classes 0 to {classes - 1}")
            true, predicted = y[y >= 0].astype(np.int64), scores.argmax(axis=1)[y >= 0]
            found = np.bincount(classes * true + predicted, minlength=classes**2).reshape(classes, classes)
            counts = found if counts is None else counts + found
    if counts is None:
        raise ValueError("no samples to evaluate on")
    return counts


def score(model: nn.Module, batches: Iterable[tuple[Array, Array]], loss: Loss) -> Score:
    """Mean loss and accuracy in the model's present mode. Raises ValueError without samples."""
    mean, samples = MeanScore(), 0
    with no_grad():
        for x, y in batches:
            mean.add(measure(partial(outputs_and_loss, model, loss), x, y, loss))
            samples += len(x)
    if not samples:
        raise ValueError("no samples to evaluate on")
    return mean.score()


def outputs_and_loss(model: nn.Module, loss: Loss, x: Array, y: Array) -> tuple[Tensor, Any, Any]:
    """The outputs, the targets on their device, and what the loss returns."""
    outputs = model(x)
    if not isinstance(outputs, Tensor):
        raise TypeError(f"{type(model).__name__} has to return a Tensor; got a {type(outputs).__name__}")
    target = y if outputs.device == "cpu" else Tensor(y).to(outputs.device)
    return outputs, target, loss(outputs, target)


def measure(run: Callable[[Array, Array], tuple[Tensor, Any, Any]], x: Array, y: Array, loss: Loss) -> Batch:
    """The loss and the hits of a batch. `run` gives what `outputs_and_loss` does."""
    made: list[Reduced] = []
    with reductions(made), np.errstate(invalid="ignore", divide="ignore"):  # 0 / 0 where no target counts
        outputs, target, value = run(x, y)
    pair = isinstance(value, tuple) and len(value) == 2
    if pair:
        value, weight = value[0], value[1]
        weight = float(expect_number("the weight of a loss", weight.item() if _is_one_number(weight) else weight, 0))
    if not isinstance(value, float | int) and not _is_one_number(value):
        what = f"{value.dtype} of shape {value.shape}" if hasattr(value, "shape") else f"a {type(value).__name__}"
        raise TypeError(f"loss has to return one number in a Tensor, or a pair of it and its weight; got {what}")
    used = [r for r in made if getattr(r.result, "_data", r.result) is getattr(value, "_data", value)] or made
    sum_part = 0.0
    if not pair:
        weight, sum_part = _weight_and_sum(value, used, len(y), outputs, target, loss)
    return Batch(value, float(value), weight, sum_part, *_hits(outputs, y, {r.ignored for r in used}))


def _weight_and_sum(
    value: Any, used: list[Reduced], samples: int, outputs: Tensor, target: Any, loss: Loss
) -> tuple[float, float]:
    """The weight of a loss in a mean over batches, and the part of it that is a sum.

    `used` is the reduction that the loss is; or all, where it was made of several or of one that was changed. In the
    first case the others were made for other ends, such as to be printed.
    """
    only = used[0] if len(used) == 1 else None
    if only and getattr(only.result, "_data", only.result) is getattr(value, "_data", value):
        return only.total, float(value) if only.summed else 0.0
    if any(r.summed for r in used):
        sum_part = _sum_part(float(value), outputs, target, loss)
        by_total = only and (sum_part or _is_quotient(value, only.result, only.total, samples))
        return only.total if only and by_total else samples, sum_part
    return _weight(used, samples, lambda: _has_other_terms(value, used, outputs, target, loss)), 0.0


def _is_one_number(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray | np.generic) and value.size == 1 and value.dtype.kind in "fiub"


def _sum_part(value: float, outputs: Tensor, target: Any, loss: Loss) -> float:
    """What a loss grows by if each sample counts twice: sums do, and means do not."""
    try:
        with no_grad(), np.errstate(invalid="ignore", divide="ignore"):
            again = loss(*(F.concatenate([both, both]) for both in (outputs.detach(), target)))
    except Exception as error:  # whatever a loss of one batch size raises
        warn_caller(f"the sums in the loss are taken to be divided by its samples; of twice as many it gives: {error}")
        return 0.0
    grown, close = float(again) - value, 1e-4 * abs(value)
    return 0.0 if abs(grown) < close else value if abs(grown - value) < close else grown


def _is_quotient(value: Any, total: Any, divisor: float, other: float) -> bool:
    """Whether value is total / divisor, and not total / other."""
    by_divisor, by_other = (np.isclose(float(value) * n, float(total)) for n in (divisor, other))
    return bool(by_divisor and not by_other)


def _weight(made: list[Reduced], samples: int, has_other_terms: Callable[[], bool]) -> float:
    """What the mean of a loss was divided by, where it is made of such means."""
    shares = {round(r.total / r.size, 12) for r in made if r.size}
    if len(shares) > 1 or (shares - {1.0} and has_other_terms()):
        warn_caller(
            "the loss adds means over different numbers or weights of targets: its mean over batches is approximate. "
            "Let it return a pair (loss, weight)"
        )
        return samples if all(r.total for r in made) else 0  # one of the means is 0 / 0
    return made[0].total if made else samples


def _has_other_terms(value: Any, made: list[Reduced], outputs: Tensor, target: Any, loss: Loss) -> bool:
    """Whether a loss depends on the outputs in other ways than through those that were reduced."""
    if not isinstance(value, Tensor):
        return all(float(r.result) != value for r in made)
    if value.node is None or not value.node.inputs:  # nothing was recorded, or a backward pass has freed it
        outputs, made = Tensor(outputs.detach(), requires_grad=True), []
        with recording(True), reductions(made), np.errstate(invalid="ignore"):
            value = loss(outputs, target)
    seen, todo = {r.result for r in made}, [value]
    while todo:
        t = todo.pop()
        for x in t.node.inputs if isinstance(t, Tensor) and t.node else ():
            if x is outputs:
                return True
            if isinstance(x, Tensor) and x not in seen:
                seen.add(x)
                todo.append(x)
    return False


def _hits(outputs: Tensor, y: Array, ignored: set[int | None]) -> tuple[int, int]:
    """How many targets have the largest output, and how many count; 0, 0 without classes."""
    classes = outputs.shape[1] if outputs.ndim > 1 else 1
    if y.dtype.kind not in "iu" or classes == 1 or outputs.shape[:1] + outputs.shape[2:] != y.shape:
        return 0, 0
    counts = y >= 0
    for target in ignored - {None}:
        counts &= y != target
    scores = outputs.numpy()
    hits = (np.argmax(scores, axis=1) == y) & ~np.isnan(scores).any(axis=1)  # argmax takes NaN for the largest
    return int(np.count_nonzero(hits & counts)), int(np.count_nonzero(counts))


def expect_model(model: Any, loss: Any = F.cross_entropy) -> None:
    """Raise TypeError unless these are a module and a function."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model has to be a module; got a {type(model).__name__}")
    if not callable(loss):
        raise TypeError(f"loss has to be a function of outputs and targets; got {shown(loss)}")


def arrays_of(data: Data) -> tuple[Array, Array]:
    """Samples and targets as NumPy arrays, checked."""
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
    expect_arrays(x, y)
    for name, a in (("x", x), ("y", y)):
        if not is_real(a.dtype):
            raise TypeError(f"data has to be arrays of real numbers; got {name} of dtype {a.dtype}")
    return x, y
