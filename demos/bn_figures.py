"""The figures of `bn_backward`: the steps with their numbers, and the paths with their shares."""

from itertools import pairwise

import numpy as np

from tinygrad_bn import viz
from tinygrad_bn.explain import Explanation
from tinygrad_bn.tensor import Array

from .common import Run

PLACES = {  # of the steps in the figure
    "x": (0, 1), "mu": (0.5, 2), "xmu": (1, 1), "sq": (1, 0), "var": (2, 0), "sqrtvar": (3, 0), "ivar": (3, 1),
    "xhat": (2, 1), "gammax": (2, 2), "out": (3, 2),
}  # fmt: skip
ARROWS = (  # the path that is straight on, and where the others leave it
    ("x xmu xhat gammax out", 0), ("xmu sq var sqrtvar ivar xhat", 1), ("x mu xmu", 2),
)  # fmt: skip


def name_of(path: str) -> str:
    """A short name for a path of the engine: `x → mu → xmu → xhat → out` is "through mu"."""
    through = [name for name in ("mu", "var") if name in path.split(" → ")]
    return f"through {' and '.join(through)}" if through else "direct"


def draw(run: Run, e: Explanation, paths: dict[str, Array]) -> None:
    """The steps of sample 1 and channel 1 with value and gradient; and the share of each path in each sample."""
    figure, ((steps,),) = viz.subplots(1, 1, 6.5, 5)
    shape = e["x"].value.shape
    for name in filter(e.__contains__, PLACES):
        numbers = (np.nan if of is None else np.broadcast_to(of, shape)[0, 0] for of in (e[name].value, e[name].grad))
        steps.annotate(
            "{}\n{:.3f}\n∂ {:.3f}".format(name, *numbers).replace("∂ nan", "constant"), PLACES[name], ha="center",
            va="center", fontsize=11, bbox={"boxstyle": "round", "facecolor": "white", "edgecolor": "0.6"},
        )  # fmt: skip
    for route, hue in ARROWS:
        for tail, head in pairwise(route.split()):
            if tail not in e or head not in e:
                continue  # in evaluation
            arrow = {"arrowstyle": "-|>", "color": viz.COLOURS[hue], "linewidth": 2, "shrinkA": 30, "shrinkB": 32}
            steps.annotate("", PLACES[head], PLACES[tail], arrowprops=arrow)
    steps.set(xlim=(-0.4, 3.4), ylim=(-0.4, 2.4), title="sample 1, channel 1: value and gradient ∂")
    steps.set_axis_off()
    run.save(figure, "steps")
    figure, ((bars,),) = viz.subplots(1, 1, 6.5, 4.5)
    samples, width = np.arange(1, shape[0] + 1), 0.8 / (len(paths) + 1)
    shares = {name_of(path): share for path, share in paths.items()} | {"their sum: ∂x": np.asarray(e["x"].grad)}
    for i, (name, share) in enumerate(shares.items()):
        colour = viz.COLOURS[i] if i < len(paths) else "0.3"
        bars.bar(samples + width * (i - len(paths) / 2), share[:, 0], width, color=colour, label=name)
    bars.axhline(0, color="0.3", linewidth=1)
    bars.set(xlabel="sample", ylabel="gradient", title="the gradient of x in channel 1, path by path")
    figure.legend(frameon=False, loc="outside lower center", ncols=3)
    run.save(figure, "paths")
