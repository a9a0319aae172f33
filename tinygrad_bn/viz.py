"""Figures of training, in the colours of Okabe and Ito, which colour-blind readers can tell apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinygrad_bn.arguments import shown
from tinygrad_bn.tensor import Array
from tinygrad_bn.train import History
from tinygrad_bn.train.interval import interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def colour(name: str, position: int = 0) -> str:
    """The colour of a model: fixed by name for models with and without BatchNorm, otherwise `COLOURS[position]`."""
    known = {"without BatchNorm": COLOURS[0], "with BatchNorm": COLOURS[1], "with noisy BatchNorm": COLOURS[2]}
    return known.get(name, COLOURS[position % len(COLOURS)])


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of `width` by `height` inches. A notebook shows it, although pyplot does not know it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    setattr(figure, "_repr_png_", partial(_png, figure))  # noqa: B010 - it has no such method
    return figure


def _png(figure: Figure) -> bytes:
    data = BytesIO()
    figure.savefig(data, dpi=100)
    return data.getvalue()


def subplots(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, Array]:
    """A figure of `width` by `height` inches and its axes, an array (rows, columns), with a light grid and no frame.

    `options` go to `matplotlib.figure.Figure.subplots`.
    """
    figure = new_figure(width, height)
    grid: Array = figure.subplots(rows, columns, squeeze=False, **options)
    for axes in grid.flat:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid


def legend_below(axes: Axes) -> None:
    """Draw the legend of `axes` in one row below the figure."""
    handles, labels = axes.get_legend_handles_labels()
    axes.figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=len(labels))


def plot_histories(histories: Mapping[str, History | Sequence[History]], title: str = "") -> Figure:
    """Plot loss and accuracy over the epochs, one colour per model: validation solid, training dashed.

    Several histories of a model, one per seed, become their mean and its 95 % interval, up to the shortest.

    Raises TypeError unless `histories` holds histories by name, ValueError if there are none.
    """
    if not isinstance(histories, Mapping) or not all(map(_are_histories, histories.values())):
        raise TypeError(f"histories are a dictionary of names and what fit returned; got {shown(histories)}")
    if not histories:
        raise ValueError("histories is empty: there is nothing to plot")
    figure, grid = subplots(1, 2, 11, 4.4)
    for axes, measure in zip(grid[0], ("loss", "accuracy"), strict=True):
        for position, (name, given) in enumerate(histories.items()):
            seeds = [given] if isinstance(given, History) else list(given)
            epochs = min(map(len, seeds))
            style = "o" if epochs == 1 else ""
            for column, line, of in ((f"val_{measure}", "-", "validation"), (measure, "--", "training")):
                values = [history[column][:epochs] for history in seeds]
                plot_mean(axes, range(1, epochs + 1), values, colour(name, position), f"{name}, {of}", line + style)
        axes.set(xlabel="epoch", ylabel=measure)
        axes.set_ylim(bottom=0, top=1.02 if measure == "accuracy" else None)
        axes.xaxis.get_major_locator().set_params(integer=True)
    legend_below(axes)
    figure.suptitle(title)
    return figure


def plot_confusion(matrix: Any, names: Sequence[str] | None = None, title: str = "") -> Figure:
    """Draw how often each class was taken for each.

    Each row is shaded by its shares: dark blue is all of a class. Counts are written for up to 20 classes, percentages
    of the row for up to 12; a count of 0 is left out.

    Args:
        matrix: counts (C, C), rows by true class, as `train.confusion` gives them.
        names: of the C classes; the default is their numbers.
        title: of the figure.

    Raises ValueError unless the counts are a square of numbers of at least 0, with a name for each class.
    """
    from matplotlib.colors import LinearSegmentedColormap

    try:
        counts = np.asarray(matrix)
    except ValueError as error:
        raise ValueError(f"the rows of a confusion matrix have equal lengths; got {shown(matrix)}") from error
    if counts.ndim != 2 or len(counts) != counts.shape[-1] or not counts.size or counts.dtype.kind not in "iuf":
        raise ValueError(f"a confusion matrix has shape (C, C) and counts; got {counts.dtype} of shape {counts.shape}")
    if not (np.isfinite(counts) & (counts >= 0)).all():
        raise ValueError("the counts of a confusion matrix are at least 0, and finite")
    classes = len(counts)
    labels = [str(i) for i in range(classes)] if names is None else [str(name) for name in names]
    if len(labels) != classes:
        raise ValueError(f"{len(labels)} names for {classes} classes")
    total = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, total, out=np.zeros(counts.shape), where=total > 0)
    size = float(np.clip(2.5 + 0.55 * classes, 4.5, 11))
    figure = new_figure(size + 0.9, size)
    axes = figure.subplots()
    shades = LinearSegmentedColormap.from_list("confusion", ["white", COLOURS[1]])
    image = axes.imshow(shares, cmap=shades, vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts if classes <= 20 else counts[:0]):
        if count:
            share = f"\n{shares[row, column]:.1%}" if classes <= 12 else ""
            dark = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{count:,g}{share}", color=dark, ha="center", va="center", fontsize=8)
    labelled = range(0, classes, -(-classes // 40))  # more labels than 40 would overlap
    tilt = 90 if max(map(len, labels)) > 3 else 0
    axes.set_xticks(labelled, [labels[i] for i in labelled], rotation=tilt, fontsize=8)
    axes.set_yticks(labelled, [labels[i] for i in labelled], fontsize=8)
    axes.set(xlabel="predicted class", ylabel="true class", title=title)
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    return figure


def _are_histories(given: Any) -> bool:
    several = isinstance(given, list | tuple) and bool(given) and all(isinstance(h, History) for h in given)
    return several or isinstance(given, History)


def plot_seeds(
    axes: Axes,
    x: Any,
    values: Any,
    name: str,
    label: str | None = None,
    style: str = "-",
    hue: str | None = None,
    log: bool = False,
) -> None:
    """Plot one thin line per seed, their mean and its 95 % interval, in the colour of the model `name` or in `hue`.

    Args:
        axes: the axes to draw on.
        x: positions (T,).
        values: a line per seed (S, T). NaN draws nothing, and no mean: that of the other seeds would mislead.
        name: the model.
        label: text in the legend; the default is `name`.
        style: matplotlib's line style and marker.
        hue: a colour; the default is that of the model.
        log: make the y axis logarithmic. The mean there is the geometric one, and its interval stays above 0.
    """
    values = np.asarray(values, float)
    if log:
        axes.set_yscale("log")
    hue = hue or colour(name)
    if len(values) > 1:
        axes.plot(x, values.T, style, color=hue, alpha=0.2, linewidth=0.8, markersize=3)
    plot_mean(axes, x, values, hue, label or name, style)


def plot_mean(axes: Axes, x: Any, values: Any, hue: str, label: str, style: str = "-") -> None:
    """Plot the mean over the seeds, values (S, T), and its 95 % interval; none where a seed has NaN.

    The interval is a band, or bars where `style` has no line. On a logarithmic axis it is that of the geometric mean.
    """
    logarithmic = axes.get_yscale() == "log"
    columns = np.asarray(values, float).T
    with np.errstate(divide="ignore", invalid="ignore"):  # of a 0, or of seeds whose logarithms are −∞
        known = [interval(np.log(column) if logarithmic else column) for column in columns]
    parts = np.array([(i.mean, i.low, i.high) for i in known]).T
    mean, low, high = np.exp(parts) if logarithmic else parts
    axes.plot(x, mean, style, color=hue, label=label)
    if style.startswith(" "):
        axes.vlines(x, low, high, color=hue, alpha=0.5)
    else:
        axes.fill_between(x, low, high, color=hue, alpha=0.2, linewidth=0)


def percentile_bands(axes: Axes, steps: Array, values: Array, name: str) -> None:
    """Plot the 15th, 50th and 85th percentile of a distribution over time, as in Ioffe and Szegedy 2015, figure 1.

    Args:
        axes: the axes to draw on.
        steps: training steps (T,).
        values: N samples at each step (T, N).
        name: the model; it selects the colour and is the label.
    """
    low, middle, high = np.percentile(values, (15, 50, 85), axis=1)
    axes.fill_between(steps, low, high, color=colour(name), alpha=0.2, linewidth=0)
    axes.plot(steps, middle, color=colour(name), label=name)


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure and return its path. The suffix selects the format: PNG, SVG or PDF."""
    figure.savefig(path, dpi=150)
    return Path(path)
