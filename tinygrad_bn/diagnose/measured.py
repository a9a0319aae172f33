"""What the data show about a model: a forward pass of a batch, with every op watched."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np

from tinygrad_bn import nn
from tinygrad_bn.backend import Array, to_numpy
from tinygrad_bn.diagnose.findings import Finding
from tinygrad_bn.diagnose.seam import Call, Watcher
from tinygrad_bn.diagnose.structure import WEIGHTED, Named, Pair, dropout_before, label
from tinygrad_bn.hooks import listening, unseen
from tinygrad_bn.modes import no_grad
from tinygrad_bn.nn.batch_norm import BATCH_NORMS
from tinygrad_bn.nn.module import Module
from tinygrad_bn.tensor import Tensor

NORMALISED = ("batch_norm_training", "batch_norm_inference")
SATURATED = {"sigmoid": lambda y: y * (1 - y) < 0.0025, "tanh": lambda y: 1 - y * y < 0.01}  # 1 % of the largest slope
DEAD, FLAT = 0.5, 0.5  # the fraction of a layer from which dead units, or saturated ones, are reported
LEAST = 16  # values of a channel, below which its statistics are too rough to judge
SHIFT, RATIO = 0.5, 2.0  # of running statistics that fit: at most half a deviation off, a variance off by a factor of 2


class Norm(NamedTuple):
    """A BatchNorm and what it got: a batch's mean and biased variance (C,), and the values of each channel."""

    layer: Any
    x: Array
    mean: Array
    var: Array
    size: int


class Trace(Watcher):
    """Every call of a forward pass, in order. It keeps all arrays alive, so their identities are unique."""

    def __init__(self, model: Module) -> None:
        self.calls: list[Call] = []
        self.makers: dict[int, Call] = {}  # of each array
        self.dropped: dict[int, tuple[Named, Any]] = {}  # results of Dropout, by the identity of the array
        self.names = {module: name for name, module in model.named_modules()}

    def saw(self, call: Call) -> None:
        self.calls.append(call)
        self.makers[id(call.result)] = call

    def module(self, original: Any, m: Module, *args: Any, **options: Any) -> Any:
        """Dropout, which is off, gives a copy: an array of its own, by which it is known to lie on the way."""
        y = original(m, *args, **options)
        if isinstance(m, nn.Dropout) and m.p:
            y = Tensor(y)
            self.dropped[id(y._data)] = (self.names.get(m, ""), m), y
        return y

    def owner(self, call: Call | None) -> Named | None:
        """The innermost module that was running."""
        module = call.place.modules[-1] if call is not None and call.place.modules else None
        return None if module is None else (self.names.get(module, ""), module)

    def maker(self, array: Any) -> Named | None:
        """The module that computed an array."""
        return self.owner(self.makers.get(id(array)))

    def norms(self) -> Iterator[tuple[Named, Call]]:
        """Each BatchNorm that was called, with its call."""
        for call in self.calls:
            owner = self.owner(call)
            if owner is not None and isinstance(owner[1], BATCH_NORMS) and call.op.name in NORMALISED:
                yield owner, call

    def pairs(self) -> list[Pair]:
        """Each layer with weights whose output went to a BatchNorm and nowhere else, with that."""
        uses = Counter(id(a) for call in self.calls for a in call.arrays)
        found = [(self.maker(x), norm) for norm, call in self.norms() if uses[id(x := call.arrays[0])] == 1]
        return [(maker, norm) for maker, norm in found if maker is not None and isinstance(maker[1], WEIGHTED)]


def order(traced: Trace) -> Iterator[Finding]:
    """Dropouts on a way to a BatchNorm, with no other BatchNorm between."""
    known: set[int] = set()
    for norm, call in traced.norms():
        todo, seen = [call.arrays[0]], set()
        while todo:
            array = todo.pop()
            if id(array) in seen:
                continue
            seen.add(id(array))
            if id(array) in traced.dropped:
                dropout, _ = traced.dropped[id(array)]
                if id(array) not in known:
                    yield dropout_before(dropout, norm)
                known.add(id(array))
            elif (maker := traced.makers.get(id(array))) is not None and maker.op.name not in NORMALISED:
                todo += maker.arrays


def trace(model: Module, x: Any, by_batch: bool) -> tuple[Trace, Any]:
    """A forward pass without dropout, and its output. The model stays as it is. BatchNorm normalises by the batch, or
    in evaluation mode by running statistics."""
    traced = Trace(model)
    with ExitStack() as blocks:
        blocks.enter_context(nn.batch_statistics(model) if by_batch else nn.evaluating(model))
        blocks.enter_context(no_grad())
        blocks.enter_context(nn.observe(lambda module, y: None))  # so that no BatchNorm is fused with a ReLU
        blocks.enter_context(unseen())
        blocks.enter_context(listening(traced))
        y = model(x)
    return traced, y


def values_of_a_channel(call: Call) -> int:
    """How many values of each channel a BatchNorm got."""
    shape = call.arrays[0].shape
    return math.prod(shape) // max(1, shape[1])


def too_few(traced: Trace) -> Iterator[Finding]:
    """BatchNorms that got one or two values per channel."""
    for norm, call in traced.norms():
        n = values_of_a_channel(call)
        if n in (1, 2):
            what = (
                "one value per channel has no deviation: in training this is an error"
                if n == 1
                else "of two values per channel, the normalised ones are always −1 and 1, whatever the input is"
            )
            yield Finding("batch-of-one", label(norm), what, "larger batches (drop_last=True), or a LayerNorm")


def statistics(traced: Trace) -> list[tuple[Named, Norm]]:
    """The BatchNorms and the statistics of what they got."""
    found = []
    for norm, call in traced.norms():
        x = to_numpy(call.arrays[0])
        axes, wide = (0, *range(2, x.ndim)), x.astype(np.float64)
        if np.isfinite(wide).all():
            found.append((norm, Norm(norm[1], x, wide.mean(axes), wide.var(axes), values_of_a_channel(call))))
    return found


def running_gap(norm: Norm) -> tuple[float, float] | None:
    """How far the running statistics of a layer are from a batch's: medians over the channels.

    The distance of the means in deviations of the batch, and the factor, 1 or more, between the variances. None
    for a layer without running statistics.
    """
    layer = norm.layer
    if layer.running_mean is None:
        return None
    unbiased = norm.var * norm.size / max(1, norm.size - layer.running_var_correction)
    mean, var = (to_numpy(t).astype(np.float64) for t in (layer.running_mean, layer.running_var))
    shift = np.abs(mean - norm.mean) / np.sqrt(norm.var + layer.eps)
    ratio = np.abs(np.log((var + layer.eps) / (unbiased + layer.eps)))
    return float(np.median(shift)), float(np.exp(np.median(ratio)))


def of_statistics(norms: list[tuple[Named, Norm]]) -> Iterator[Finding]:
    """What the statistics of BatchNorms' inputs show."""
    for named, norm in norms:
        where, channels = label(named), norm.layer.num_features
        deviation = np.sqrt(norm.var)
        resolution = float(np.finfo(norm.x.dtype).eps)
        constant = deviation <= np.abs(norm.mean) * resolution
        if constant.any():
            yield Finding(
                "constant-channels", where,
                f"{constant.sum()} of {channels} channels are constant in this batch: it gives its bias there",
                "look at what makes them: dead units, a feature that never varies, weights of 0",
            )  # fmt: skip
        lost = np.abs(norm.mean[~constant]) / deviation[~constant]
        if lost.size and lost.max() > max(10, 1e-4 / resolution):
            yield Finding(
                "digits-lost", where,
                f"mean/deviation is {lost.max():.0e}: of the {-math.log10(resolution):.0f} digits of {norm.x.dtype}, "
                f"the mean takes {math.log10(lost.max()):.0f} before BatchNorm can subtract it",
                "subtract the mean from the samples in float64, before they become tensors",
            )  # fmt: skip
        rest = norm.var[~constant]
        if rest.size and np.median(rest) < norm.layer.eps:
            yield Finding(
                "eps-dominates", where,
                f"the variance of its input is {np.median(rest):.0e} (median), below eps = {norm.layer.eps:g}: the "
                "output has a deviation far below 1",
                "larger initial weights before it, or a smaller eps",
            )  # fmt: skip
        gap = running_gap(norm)
        tracked = norm.layer.num_batches_tracked
        if gap and int(tracked.item()) and norm.size >= LEAST and (gap[0] > SHIFT or gap[1] > RATIO):
            yield Finding(
                "stale-statistics", where,
                f"its running mean is {gap[0]:.2g} deviations from this batch's, and its running variance off by a "
                f"factor of {gap[1]:.2g} (medians): evaluation computes another function than training",
                "train.recalibrate(model, training_data); or more steps, or a larger momentum",
            )  # fmt: skip


def of_activations(traced: Trace, output: Any) -> Iterator[Finding]:
    """Units that pass on nothing."""
    for call in traced.calls:
        owner, name = traced.owner(call), call.op.name
        if owner is None or call.result is output or (name != "relu" and name not in SATURATED):
            continue
        y = to_numpy(call.result)
        if name in SATURATED:
            share = float(np.mean(SATURATED[name](y.astype(np.float64))))
            if share > FLAT:
                yield Finding(
                    "saturated", label(owner),
                    f"{share:.0%} of its outputs are where {name} is flat: the slope there is below 1 % of the largest",
                    "smaller initial weights, or a BatchNorm before it",
                )  # fmt: skip
        elif len(y) >= LEAST and y.ndim > 1:
            dead = (y == 0).all(axis=(0, *range(2, y.ndim)))
            if dead.mean() > DEAD:
                yield Finding(
                    "dead-units", label(owner),
                    f"{dead.sum()} of {dead.size} units are 0 for all {len(y)} samples: no gradient passes them",
                    "a smaller learning rate, a BatchNorm before it, He initial weights and biases of 0, or LeakyReLU",
                )  # fmt: skip
