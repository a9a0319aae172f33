"""Pictures of training. Colours are Okabe and Ito's, told apart by colour-blind readers too."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from tinygrad_bn.train import History

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def plot_histories(histories: Mapping[str, History], title: str = "") -> Figure:
    """Loss and accuracy over the epochs, one colour a model: validation solid, training dashed."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    for axes, measure in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for (name, history), colour in zip(histories.items(), cycle(COLOURS), strict=False):
            marker = "o" if len(history) == 1 else ""
            for column, style, of in ((f"val_{measure}", "-", "validation"), (measure, "--", "training")):
                axes.plot(history["epoch"], history[column], style, color=colour, label=f"{name}, {of}", marker=marker)
        axes.set(xlabel="epoch", ylabel=measure)
        axes.set_ylim(bottom=0, top=1.02 if measure == "accuracy" else None)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.suptitle(title)
    return figure


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure (PNG, SVG, PDF by its ending) and give the path back."""
    figure.savefig(path, dpi=150)
    return Path(path)
