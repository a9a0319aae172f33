"""Batch size: how many samples BatchNorm's statistics need, and when its running statistics are wrong.

784-100-100-100-10, ReLU, Adam. First: batches of 2 to 256, the same number of epochs for each. Then: batches of 256,
normalised in smaller ghost batches (Hoffer et al. 2017), so that the number of steps is the same. Then: four cases in
which running statistics do not match the data. Each network is validated with batch statistics, in batches as large as
in training, with running statistics, and with running statistics after `train.recalibrate`.
"""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from tinygrad_bn import datasets, manual_seed, nn, optim, train, viz
from tinygrad_bn.train.interval import number

from .common import Run, recalibrate
from .output import start

Parts = tuple[datasets.Dataset, datasets.Dataset]  # training and validation
STYLES = {"batch": ":x", "running": "-o", "recalibrated": "--s"}


def low_contrast(data: datasets.Dataset) -> datasets.Dataset:
    """The same images with less contrast: pixels 0 … 1 become 0.35 … 0.65."""
    return replace(data, x=data.x * np.float32(0.3) + np.float32(0.35))


CASES: dict[str, dict[str, Any]] = {  # of running statistics that do not match the data
    "few steps, batch 500": {"batch_size": 500, "epochs": 1, "lr": 1e-2},
    "momentum 1, batch 8": {"batch_size": 8, "momentum": 1.0},
    "momentum 0.001": {"momentum": 0.001},
    "new data, less contrast": {"transform": low_contrast},
}


def build(batch_norm: bool, seed: int, **options: Any) -> nn.Sequential:
    """The network; `options` go to its BatchNorm layers."""
    manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise((784, 100, 100, 100)):
        norm = [nn.BatchNorm1d(fan_out, **options)] if batch_norm else []
        layers += [nn.Linear(fan_in, fan_out), *norm, nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(100, 10))


def measure(run: Run, data: Parts, seed: int, plan: dict[str, Any]) -> list[float]:
    """Train, then return the validation accuracies with batch, running, and recalibrated running statistics."""
    options = {"batch_norm": True, "transform": lambda data: data, **plan}
    size, epochs, lr = (options.pop(name, getattr(run.args, name)) for name in ("batch_size", "epochs", "lr"))
    training, validation = data
    transform = options.pop("transform")
    model = build(seed=seed, **options)
    optimizer = optim.Adam(model.parameters(), lr=lr)
    run.fit(model, training, seed=seed, optimizer=optimizer, epochs=epochs, batch_size=size, drop_last=True)
    gap = train.statistics_gap(model, transform(validation), batch_size=size)
    recalibrate(model, transform(training))
    return [gap.batch.accuracy, gap.running.accuracy, train.evaluate(model, transform(validation)).accuracy]


def main(argv: list[str] | None = None) -> Run:
    """Train with each batch size, each ghost batch size, and each case of wrong running statistics."""
    run = Run(
        "batch_size", __doc__, argv,
        data="mnist5k", epochs=2, batch_size=32, lr=1e-3, seeds=10, check={"epochs": 1},
    )  # fmt: skip
    data = run.images(check=1200)
    sizes = [2, 16, 256] if run.args.check else [2, 4, 8, 16, 32, 64, 128, 256]
    plan: dict[str, dict[str, Any]] = {f"batches of {n}": {"batch_size": n} for n in sizes}
    plan |= {f"ghost batches of {n}": {"batch_size": 256, "virtual_batch_size": n} for n in sizes[:-1]} | CASES
    plan |= {f"without BatchNorm, batches of {n}": {"batch_size": n, "batch_norm": False} for n in sizes}

    def networks(seed: int) -> list[list[float]]:
        return [measure(run, data, seed, options) for options in plan.values()]

    accuracy = np.array(run.each(networks, run.seeds, "seeds"))  # by seed, network, statistics
    of = {label: accuracy[:, i] for i, label in enumerate(plan)}
    plain = np.stack([of[f"without BatchNorm, batches of {n}"][:, 1] for n in sizes], axis=1)
    batches = np.stack([of[f"batches of {n}"] for n in sizes], axis=1)
    ghosts = np.stack([*(of[f"ghost batches of {n}"] for n in sizes[:-1]), batches[:, -1]], axis=1)
    wrong = np.stack([of[label] for label in CASES], axis=1)

    figure, grid = viz.subplots(1, 3, 15, 5.2, sharey=True)
    for axes, part in zip(grid[0], (batches, ghosts, wrong), strict=True):
        at, dots = (range(len(CASES)), True) if part is wrong else (sizes, False)
        for i, (name, style) in enumerate(STYLES.items()):
            line = " " + style[-1] if dots else style
            viz.plot_seeds(axes, at, part[..., i], "with BatchNorm", f"with BatchNorm, {name} statistics", line)
    for axes, label in zip(grid[0, :2], ("batch", "ghost batch, in batches of 256"), strict=True):
        axes.set_xscale("log", base=2)
        axes.set(xlabel=f"samples in a {label}", xticks=sizes, xticklabels=sizes)
    grid[0, 2].set_xticks(range(len(CASES)), [label.replace(", ", ",\n") for label in CASES], fontsize="small")
    grid[0, 2].set(xlabel="why running statistics are wrong", xlim=(-0.5, len(CASES) - 0.5))
    viz.plot_seeds(grid[0, 0], sizes, plain, "without BatchNorm", style="-o")
    grid[0, 0].set(ylabel="validation accuracy", ylim=(0, 1))
    viz.legend_below(grid[0, 0])
    figure.suptitle(f"784-100-100-100-10 on {run.args.data}, epochs: {run.args.epochs}, seeds: {len(accuracy)}")
    run.save(figure, "batch_size")

    rows = [[label, *map(number, of[label].mean(axis=0))] for label in plan if "batch_norm" not in plan[label]]
    rows = [[*row, number(plain[:, i].mean()) if i < len(sizes) else ""] for i, row in enumerate(rows)]
    caption = "validation accuracy by statistics; ghost batches are parts of batches of 256"
    run.print(run.table(("", *STYLES, "without BatchNorm"), rows, caption=caption))
    large = [i for i, n in enumerate(sizes) if n >= 16]
    ahead = (batches[:, large, 2] - plain[:, large]).mean(axis=1)
    gain, gap = ((wrong[..., 2] - wrong[..., i]).mean(axis=1) for i in (1, 0))
    smallest = f"batches of {sizes[0]}"
    run.claim_mean(f"with {smallest}, accuracy is higher without BatchNorm", plain[:, 0] - batches[:, 0, 2], above=0)
    run.claim_mean("from batches of 16 on, higher with it, statistics recalibrated", ahead, above=0)
    lost = batches[:, -1, 2] - ghosts[:, 0, 2]
    run.claim_mean(f"ghost {smallest} lower the accuracy of batches of 256", lost, above=0)
    run.claim_mean("where running statistics are wrong, recalibration gains, mean of the cases", gain, above=0.05)
    compared = wrong.mean(axis=1)[:, [0, 2]].T
    run.claim_mean("and is then not below batch statistics", gap, above=-0.02, learned=compared)
    return run.finish(sizes=sizes, statistics=tuple(STYLES), accuracy={k: v.tolist() for k, v in of.items()})


if __name__ == "__main__":
    start(lambda: main().code)
