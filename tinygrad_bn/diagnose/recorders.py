"""Callbacks of `fit` that keep what the layers of a model do over time, and draw it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from tinygrad_bn import functional as F
from tinygrad_bn import hooks, nn, viz
from tinygrad_bn.arguments import expect_integer
from tinygrad_bn.autograd import grad
from tinygrad_bn.backend import Array, to_numpy
from tinygrad_bn.diagnose.measured import RATIO, SHIFT, running_gap, statistics, trace
from tinygrad_bn.diagnose.structure import label
from tinygrad_bn.modes import recording
from tinygrad_bn.nn.module import Module
from tinygrad_bn.tensor import Tensor
from tinygrad_bn.train.callback import Callback, Training
from tinygrad_bn.train.scores import Data, Loss, arrays_of, expect_model, measure, outputs_and_loss

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Kind = Literal["activations", "gradients"]


class Recorder(Callback):
    """Base of the recorders: a callback of one `fit`. Call `measure(model)` before it for the state at epoch 0.

    `epochs` are the epochs that were measured.
    """

    def __init__(self) -> None:
        self.epochs: list[int] = []

    def on_epoch(self, training: Training) -> None:
        """Measure the model after an epoch."""
        self.measure(training.model, training.epoch)

    def measure(self, model: Module, epoch: int = 0) -> None:
        """Measure `model` as it is now. Its state, modes and gradients stay; an explanation records nothing."""
        expect_model(model)
        with hooks.unseen():
            self._take(model)
        self.epochs.append(epoch)

    def state_dict(self) -> dict[str, Any]:
        """What was measured."""
        return {"epochs": self.epochs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a `state_dict`."""
        self.epochs = list(state["epochs"])

    def _take(self, model: Module) -> None:
        raise TypeError(f"{type(self).__name__} defines no _take")

    def _expect_epochs(self) -> None:
        if not self.epochs:
            raise ValueError(
                f"{type(self).__name__} has measured nothing: make it a callback of fit, or call measure()"
            )


class Histogram(NamedTuple):
    """How many values lie in bins of equal width from `low` to `high`, and how many are `left_out` as not finite."""

    counts: Array
    low: float
    high: float
    left_out: int

    @classmethod
    def of(cls, values: Array, bins: int) -> Histogram:
        """The histogram of all elements of an array."""
        finite = values[np.isfinite(values)].astype(np.float64)
        counts, edges = np.histogram(finite, bins)
        return cls(counts, float(edges[0]), float(edges[-1]), values.size - finite.size)


class LayerHistograms(Recorder):
    """Histograms of what each layer gives, and of the gradient of that, epoch by epoch.

    Layers are the modules without modules inside. Normalised by the statistics of the batch, without dropout.

    Args:
        data: samples and targets, some hundred: a `Dataset` or two arrays. They are one batch.
        loss: function (outputs, targets), as for `fit`.
        bins: of each histogram.

    `activations[layer]` and `gradients[layer]` are lists of a `Histogram` per epoch. That of a gradient g is of
    log₁₀|g|, and leaves out zeros. A layer without a gradient, such as a Flatten of the samples, has none.

    The cost: a forward and a backward pass of `data` after every epoch, and the memory of all layers' outputs.
    """

    def __init__(self, data: Data, loss: Loss = F.cross_entropy, bins: int = 40) -> None:
        super().__init__()
        self.x, self.y = arrays_of(data)
        if not len(self.x):
            raise ValueError("no samples to look at")
        self.loss, self.bins = loss, expect_integer("bins", bins, 1)
        self.activations: dict[str, list[Histogram]] = {}
        self.gradients: dict[str, list[Histogram]] = {}
        self._titles: dict[str, str] = {}

    def state_dict(self) -> dict[str, Any]:
        """The histograms so far."""
        return (
            super().state_dict()
            | {
                kind: {name: [(h.counts.tolist(), *h[1:]) for h in histograms] for name, histograms in layers.items()}
                for kind, layers in (("activations", self.activations), ("gradients", self.gradients))
            }
            | {"titles": self._titles}
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a `state_dict`."""
        super().load_state_dict(state)
        self._titles = dict(state["titles"])
        self.activations, self.gradients = (
            {name: [Histogram(np.array(counts), *rest) for counts, *rest in rows] for name, rows in state[kind].items()}
            for kind in ("activations", "gradients")
        )

    def _take(self, model: Module) -> None:
        names = {module: name for name, module in model.named_modules() if not any(module.named_children())}
        self._titles |= {name: label((name, module)) for module, name in names.items()}
        outputs: dict[str, Tensor] = {}

        def note(module: Module, y: Tensor) -> None:
            if module in names:
                outputs[names[module]] = y  # of its last call

        with nn.batch_statistics(model), nn.observe(note), recording(True):
            value = measure(partial(outputs_and_loss, model, self.loss), self.x, self.y, self.loss).value
        differentiable = {name: y for name, y in outputs.items() if y.requires_grad}
        gradients = dict(zip(differentiable, grad(value, list(differentiable.values())), strict=True))
        for name, y in outputs.items():
            self.activations.setdefault(name, []).append(Histogram.of(to_numpy(y), self.bins))
        for name, g in gradients.items():
            with np.errstate(divide="ignore"):
                sizes = np.log10(np.abs(to_numpy(g).astype(np.float64)))
            self.gradients.setdefault(name, []).append(Histogram.of(sizes, self.bins))

    def plot(self, what: Kind = "activations") -> Figure:
        """A panel for each layer, with a curve for each epoch, the first one at the bottom.

        Heights are the square roots of counts, so that the tails are seen beside a peak, as at the zeros of a ReLU.
        """
        self._expect_epochs()
        if what not in ("activations", "gradients"):
            raise ValueError(f"there are 'activations' and 'gradients'; got {what!r}")
        layers = self.activations if what == "activations" else self.gradients
        columns = min(4, len(layers))
        rows = -(-len(layers) // columns)
        figure, grid = viz.subplots(rows, columns, 3.2 * columns, 2.6 * rows + 0.6)
        for axes, (name, histograms) in zip(grid.flat, layers.items(), strict=False):
            self._ridges(axes, histograms)
            axes.set(title=self._titles[name], yticks=range(len(self.epochs)), yticklabels=self.epochs)
        for axes in grid.flat[len(layers) :]:
            axes.set_axis_off()
        grid[0, 0].set_ylabel("epoch")
        figure.suptitle(
            "outputs of each layer" if what == "activations" else "log₁₀ |gradient of the outputs of each layer|"
        )
        return figure

    @staticmethod
    def _ridges(axes: Axes, histograms: list[Histogram]) -> None:
        for i, h in reversed(list(enumerate(histograms))):  # the lower ones are drawn over those behind
            if not h.counts.any():
                continue
            width = (h.high - h.low) / len(h.counts)
            middles = h.low + width * (np.arange(len(h.counts)) + 0.5)
            heights = i + 1.6 * np.sqrt(h.counts / h.counts.max())
            axes.fill_between(middles, i, heights, color=viz.COLOURS[1], alpha=0.35, linewidth=0, zorder=2 - i / 1000)
            axes.plot(middles, heights, color=viz.COLOURS[1], linewidth=0.8, zorder=2 - i / 1000)


class UpdateRatios(Recorder):
    """How far each parameter moves, in parts of its size: ‖w − w_before‖ / ‖w_before‖, by steps and by epochs.

    `steps[name]` has a number per step of `fit`, or per call of `measure_step`. Around 1e-3 is usual; far below that a
    parameter hardly learns. `ratios[name]` has a number per epoch: that of the net way, in which steps that undo each
    other do not count. A number is NaN at the first, with which there is nothing to compare, and infinite where a
    parameter of zeros has moved.

    The cost: one pass over the parameters after every step, and the memory of two older copies of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[str, list[float]] = {}
        self.ratios: dict[str, list[float]] = {}
        self._before_step: dict[str, Any] = {}
        self._before: dict[str, Any] = {}

    def on_step(self, training: Training) -> None:
        """Measure the model after a step of `fit`."""
        self.measure_step(training.model)

    def measure_step(self, model: Module) -> None:
        """Measure `model` after a step of a loop of your own."""
        self._before_step = _note_ratios(self.steps, self._before_step, model)

    def state_dict(self) -> dict[str, Any]:
        """The ratios so far, and the parameters before the next step and epoch."""
        before = {"step": self._before_step, "epoch": self._before}
        return super().state_dict() | {"steps": self.steps, "ratios": self.ratios, "before": before}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a `state_dict`."""
        super().load_state_dict(state)
        self.steps, self.ratios = ({k: list(v) for k, v in state[kind].items()} for kind in ("steps", "ratios"))
        self._before_step, self._before = (dict(state["before"][kind]) for kind in ("step", "epoch"))

    def _take(self, model: Module) -> None:
        self._before = _note_ratios(self.ratios, self._before, model)
        self._before_step = self._before_step or self._before  # measured before the first step

    def plot(self) -> Figure:
        """The ratios of the parameters with two or more axes, which are all weights but those of normalisations.

        They are those of the steps if there are any, with the usual size, 1e-3, as a dotted line; else the epochs'.
        """
        if not self.steps:
            self._expect_epochs()
        figure, ((axes,),) = viz.subplots(1, 1, 8, 4.8)
        shown, last, unit = (
            (self.steps, self._before_step, "step") if self.steps else (self.ratios, self._before, "epoch")
        )
        names = [name for name in shown if last[name].ndim > 1] or list(shown)
        for name, hue in zip(names, _shades(len(names)), strict=True):
            xs = self.epochs if unit == "epoch" else range(1, len(shown[name]) + 1)
            axes.plot(
                xs, shown[name], "o-" if unit == "epoch" else "-", color=hue, markersize=3, linewidth=1, label=name
            )
        if unit == "step":
            axes.axhline(1e-3, color="0.3", linestyle=":", linewidth=1)
        axes.set(xlabel=unit, ylabel=f"‖change in the {unit}‖ / ‖weight‖", yscale="log")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False, bbox_to_anchor=(1, 1), loc="upper left")
        return figure


def _note_ratios(ratios: dict[str, list[float]], before: dict[str, Any], model: Module) -> dict[str, Any]:
    """Append the ratio of each parameter; the parameters as they are now, in float64."""
    now = {name: to_numpy(p).astype(np.float64) for name, p in model.named_parameters()}
    for name, w in now.items():
        old = before.get(name)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.nan if old is None else np.linalg.norm(w - old) / np.linalg.norm(old)
        ratios.setdefault(name, []).append(float(ratio))
    return now


class StatisticsGaps(Recorder):
    """How far BatchNorm's running statistics are from those of a batch, epoch by epoch.

    Args:
        x: samples, best some hundred: an array or a tensor. They are one batch.

    `shift[layer]` has the distance of the means in deviations of the batch, and `ratio[layer]` the factor, 1 or more,
    between the variances, per epoch: medians over the channels. `train.statistics_gap` says what this does to the
    scores, and `train.recalibrate` sets it right.

    The cost: a forward pass of `x` after every epoch, and the memory of all layers' outputs.
    """

    def __init__(self, x: Any) -> None:
        super().__init__()
        if len(x) < 2:
            raise ValueError(f"a batch needs several samples to have statistics; got {len(x)}")
        self.x = x
        self.shift: dict[str, list[float]] = {}
        self.ratio: dict[str, list[float]] = {}

    def state_dict(self) -> dict[str, Any]:
        """The gaps so far."""
        return super().state_dict() | {"shift": self.shift, "ratio": self.ratio}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a `state_dict`."""
        super().load_state_dict(state)
        self.shift, self.ratio = ({k: list(v) for k, v in state[kind].items()} for kind in ("shift", "ratio"))

    def _take(self, model: Module) -> None:
        traced, _ = trace(model, self.x, by_batch=True)
        for (name, _), norm in statistics(traced):
            if (gap := running_gap(norm)) is not None:
                self.shift.setdefault(name, []).append(gap[0])
                self.ratio.setdefault(name, []).append(gap[1])

    def plot(self) -> Figure:
        """Both, over the epochs; the dotted line is where `lint` begins to complain."""
        self._expect_epochs()
        if not self.shift:
            raise ValueError("there is nothing to draw: the model has no BatchNorm with running statistics")
        figure, grid = viz.subplots(1, 2, 11, 4.4)
        limits = (
            (self.shift, SHIFT, "distance of the means, in deviations"),
            (self.ratio, RATIO, "factor between the variances"),
        )
        for axes, (layers, limit, text) in zip(grid[0], limits, strict=True):
            for (name, values), hue in zip(layers.items(), _shades(len(layers)), strict=True):
                axes.plot(self.epochs, values, "o-", color=hue, markersize=3, label=name)
            axes.axhline(limit, color="0.3", linestyle=":", linewidth=1)
            axes.set(xlabel="epoch", ylabel=text, yscale="log")
            axes.xaxis.get_major_locator().set_params(integer=True)
        viz.legend_below(grid[0, 0])
        return figure


def _shades(n: int) -> Any:
    """A colour for each layer, from the first, dark, to the last."""
    from matplotlib import colormaps

    return colormaps["viridis"](np.linspace(0, 0.9, n))
