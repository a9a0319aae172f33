"""The search for a learning rate."""

from __future__ import annotations

import operator
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from tinygrad_bn import functional as F
from tinygrad_bn import nn, random
from tinygrad_bn.arguments import expect_integer, expect_number
from tinygrad_bn.backend import Array
from tinygrad_bn.datasets import Batches, Seed
from tinygrad_bn.keywords import named
from tinygrad_bn.modes import Block, attributes_as_before
from tinygrad_bn.optim import Adam, Optimizer
from tinygrad_bn.train.scores import Data, Loss, MeanScore, arrays_of, expect_model
from tinygrad_bn.train.steps import Steps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMOOTHING = 0.98  # of the running mean, as in fastai and Lightning
DIVERGED = 4  # a loss that is so many times the least ends the search, as in these


@dataclass(frozen=True)
class RateSearch:
    """What `find_learning_rate` measured.

    Attributes:
        rates: the learning rates (N,), rising; fewer than `steps` if the loss diverged.
        raw: the loss of the batch at each, before the step.
        losses: the running mean of these, whose bias towards 0 is corrected as in Adam.
        suggestion: the rate at which `losses` falls fastest, or None if it never falls.
    """

    rates: Array
    raw: Array
    losses: Array
    suggestion: float | None

    def plot(self) -> Figure:
        """Plot the losses over the rates, and the suggestion."""
        from tinygrad_bn import viz

        figure, grid = viz.subplots(1, 1, 6.4, 4.4)
        axes = grid[0, 0]
        axes.plot(self.rates, self.raw, color=viz.COLOURS[1], alpha=0.25, linewidth=1, label="of the batch")
        axes.plot(self.rates, self.losses, color=viz.COLOURS[1], label="smoothed")
        if self.suggestion is not None:
            axes.axvline(self.suggestion, color=viz.COLOURS[0], label=f"suggestion: {self.suggestion:.2g}")
        top = self.losses.max() if len(self.losses) else 1.0
        axes.set(xlabel="learning rate", ylabel="loss", xscale="log", ylim=(0, 1.05 * top))
        viz.legend_below(axes)
        return figure


@named
def find_learning_rate(
    model: nn.Module,
    data: Data,
    *,
    loss: Loss = F.cross_entropy,
    optimizer: Optimizer | None = None,
    low: float = 1e-7,
    high: float = 10.0,
    steps: int = 100,
    batch_size: int = 32,
    seed: Seed = None,
) -> RateSearch:
    """Train with a learning rate that rises exponentially from step to step, and see where the loss falls fastest.

    The range test of Smith 2017, "Cyclical learning rates for training neural networks", with the rule of fastai and
    Lightning: the suggestion is where the smoothed loss has its steepest descent over the logarithm of the rate, the
    first tenth of the steps left out. Here it is also before the least smoothed loss, since a loss that goes up after
    that may fall again. The search ends before `steps` where the smoothed loss exceeds four times its least value, or
    where a step would not be finite. Losses of batches are noisy: compare several seeds, and look at the plot.

    Afterwards everything is as before, also after an error or Ctrl-C: parameters, buffers, gradients and modes of the
    model, the optimizer, and the generators.

    Args:
        model: maps samples (N, ...) to the outputs that `loss` takes.
        data: samples and targets, as `fit` takes them.
        loss: function (outputs, targets) that returns the mean loss of the batch.
        optimizer: the default is `Adam(model.parameters())`. All its groups get the same rate.
        low, high: the first and the last rate.
        steps: how many rates are tried.
        batch_size: samples per batch; all of them, if there are fewer.
        seed: for shuffling, as in `fit`.

    Raises:
        ValueError: no samples, an option out of range, or a first step that is not finite.
        TypeError: an argument of the wrong type.
    """
    expect_model(model, loss)
    low, high = expect_number("low", low, 0), expect_number("high", high, 0)
    if not 0 < low < high:
        raise ValueError(f"low has to be greater than 0 and less than high; got low={low}, high={high}")
    steps = expect_integer("steps", steps, 2)
    batch_size = expect_integer("batch_size", batch_size, 1)
    if not isinstance(optimizer, Optimizer | None):
        raise TypeError(f"optimizer has to be an Optimizer, such as optim.Adam(model.parameters()); got {optimizer!r}")
    x, y = arrays_of(data)
    if not len(x):
        raise ValueError("no samples to train on")
    batches = Batches(x, y, min(batch_size, len(x)), seed=seed, drop_last=True)
    optimizer = optimizer or Adam(model.parameters())
    rates = np.geomspace(low, high, steps)
    with _as_before(model, optimizer, seed):
        raw = _losses(model, optimizer, loss, batches, rates)
    losses = _smoothed(raw)
    return RateSearch(rates[: len(raw)], raw, losses, _steepest(rates[: len(raw)], losses, steps // 10))


def _losses(model: nn.Module, optimizer: Optimizer, loss: Loss, batches: Batches, rates: Array) -> Array:
    """The loss of a batch before the step with each rate, until it diverges."""
    model.train()
    runner, found = Steps(model, optimizer, loss, None, "skip", True), list[float]()
    runner.remember()
    while True:
        for x, y in batches:
            for group in optimizer.param_groups:
                group["lr"] = float(rates[len(found)])
            fault = runner.take(x, y, MeanScore())
            if fault and not found:
                raise ValueError(f"find_learning_rate: no learning rate can be found: at the first step {fault}")
            if not fault:
                found.append(runner.value)
            smooth = _smoothed(np.array(found))
            if fault or len(found) == len(rates) or smooth[-1] > DIVERGED * smooth.min():
                return np.array(found)


def _smoothed(raw: Array) -> Array:
    mean, means = 0.0, []
    for i, value in enumerate(raw):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        means.append(mean / (1 - SMOOTHING ** (i + 1)))
    return np.array(means)


def _steepest(rates: Array, losses: Array, first: int) -> float | None:
    """Where the losses fall fastest on their way to the least, without the `first`; None if they do not."""
    way = slice(first, int(losses.argmin()) + 1)  # after the least one, a loss may fall from a peak that it went up to
    rates, losses = rates[way], losses[way]
    if len(losses) < 2:
        return None
    slopes = np.gradient(losses, np.log10(rates))
    return float(rates[slopes.argmin()]) if slopes.min() < 0 else None


def _as_before(model: nn.Module, optimizer: Optimizer, seed: Seed) -> Block[None]:
    """A block after which model, optimizer and generators are as before. Arrays of tensors are never written into."""

    def prepare() -> tuple[Any, Any]:
        tensors = {*model.parameters(), *model.buffers(), *(p for g in optimizer.param_groups for p in g["params"])}
        held = [value for module in model.modules() for value in vars(module).values()]
        generators = [g for g in (random.generator(), seed, *held) if isinstance(g, np.random.Generator)]
        undo = [
            attributes_as_before((module, "training") for module in model.modules()),
            partial(vars(optimizer).update, dict(vars(optimizer))),
            *(partial(group.update, dict(group)) for group in optimizer.param_groups),
            *(partial(setattr, t, name, getattr(t, name)) for t in tensors for name in ("_data", "grad")),
            *(partial(setattr, g.bit_generator, "state", g.bit_generator.state) for g in generators),
        ]

        def change() -> None:
            state = {p: dict(own) for p, own in optimizer.state.items()}
            vars(optimizer).update(state=state, _runs=[])  # without runs, the first step joins copies of the state

        calls: Any = map(operator.call, undo)  # type: ignore[arg-type]
        return partial(deque, calls, 0), change

    return Block(prepare)
