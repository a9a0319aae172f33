"""Batch size: how many samples BatchNorm's statistics need, and when its running statistics are wrong.

784-100-100-100-10, ReLU, Adam. First: batches of 2 to 256, the same number of epochs for each. Then: batches of 256,
normalised in smaller ghost batches (Hoffer et al. 2017), so that the number of steps is the same. Then: four cases in
which running statistics do not match the data. Each network is validated with batch statistics, in batches as large as
in training, with running statistics, and with running statistics after `train.recalibrate`.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, zip_longest
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from demos.common import Run
from tinygrad_bn import datasets, manual_seed, nn, optim, train, viz

STYLES = {"batch": "x:", "running": "o-", "recalibrated": "s--"}


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


def measure(
    run: Run,
    training: datasets.Dataset,
    validation: datasets.Dataset,
    batch_norm: bool = True,
    transform: Callable[[datasets.Dataset], datasets.Dataset] = lambda data: data,
    **options: Any,
) -> list[float]:
    """Train, then return the validation accuracies with batch, running, and recalibrated running statistics."""
    size, epochs, lr = (options.pop(name, getattr(run.args, name)) for name in ("batch_size", "epochs", "lr"))
    model = build(batch_norm, run.args.seed, **options)
    optimizer = optim.Adam(model.parameters(), lr=lr)
    settings = {"optimizer": optimizer, "epochs": epochs, "batch_size": size, "drop_last": True, "progress": False}
    run.fit(model, training, **settings)
    gap = train.statistics_gap(model, transform(validation), batch_size=size)
    train.recalibrate(model, transform(training))
    return [gap.batch.accuracy, gap.running.accuracy, train.evaluate(model, transform(validation)).accuracy]


def main(argv: list[str] | None = None) -> Run:
    """Train with each batch size, each ghost batch size, and each case of wrong running statistics."""
    run = Run(
        "batch_size", __doc__, argv,
        data="mnist5k", epochs=2, batch_size=32, lr=1e-3, check={"epochs": 1},
    )  # fmt: skip
    training, validation = run.images()
    data = training.take(np.arange(min(2000, len(training)))) if run.args.check else training, validation
    sizes = [3, 16, 256] if run.args.check else [2, 4, 8, 16, 32, 64, 128, 256]
    plan: dict[str, dict[str, Any]] = {f"batches of {n}": {"batch_size": n} for n in sizes}
    plan |= {f"ghost batches of {n}": {"batch_size": 256, "virtual_batch_size": n} for n in sizes[:-1]} | CASES
    accuracy = {label: measure(run, *data, **options) for label, options in run.track(list(plan.items()), "networks")}
    plain = [measure(run, *data, batch_size=n, batch_norm=False)[1] for n in run.track(sizes, "without BatchNorm")]

    caption = "validation accuracy by statistics; ghost batches are parts of batches of 256"
    table = Table("", *STYLES, "without BatchNorm", box=box.SIMPLE_HEAD, caption=caption)
    for (label, scores), beside in zip_longest(accuracy.items(), plain):
        table.add_row(label, *(f"{score:.3f}" for score in scores), f"{beside:.3f}" if beside else "")
    run.console.print(table)

    batches, rest = np.split(np.array(list(accuracy.values())), [len(sizes)])
    ghosts, wrong = [*rest[: -len(CASES)], batches[-1]], rest[-len(CASES) :]
    figure, grid = viz.subplots(1, 3, 15, 4.8, sharey=True)
    for axes, part, of in zip(
        grid[0], (batches, ghosts, wrong), ("batch", "ghost batch, in batches of 256", ""), strict=True
    ):
        for values, (name, style) in zip(np.array(part).T, STYLES.items(), strict=True):
            at, line = (sizes, style) if of else (range(len(CASES)), style[0])
            axes.plot(at, values, line, color=viz.colour("with BatchNorm"), label=f"with BatchNorm, {name} statistics")
        if of:
            axes.set_xscale("log", base=2)
            axes.set(xlabel=f"samples in a {of}", xticks=sizes, xticklabels=sizes)
    grid[0, 2].set_xticks(range(len(CASES)), [label.replace(", ", ",\n") for label in CASES], fontsize="small")
    grid[0, 2].set(xlabel="why running statistics are wrong", xlim=(-0.5, len(CASES) - 0.5))
    grid[0, 0].plot(sizes, plain, "o-", color=viz.colour("without BatchNorm"), label="without BatchNorm")
    grid[0, 0].set(ylabel="validation accuracy", ylim=(0, 1))
    grid[0, 0].legend(frameon=False, loc="lower right")
    figure.suptitle(f"784-100-100-100-10 on {run.args.data}, {run.args.epochs} epochs")
    run.save(figure, "batch_size")

    run.claim("with the smallest batches, accuracy is higher without BatchNorm", batches[0, 2] < plain[0])
    enough = [values[2] > beside for n, values, beside in zip(sizes, batches, plain, strict=True) if n >= 16]
    run.claim("from batches of 16 on, it is higher with BatchNorm, statistics recalibrated", all(enough))
    run.claim("in batches of 256, the smallest ghost batches lower the accuracy", ghosts[0][2] < batches[-1, 2])
    gain = min(wrong[:, 2] - wrong[:, 1])
    run.claim("where running statistics are wrong, recalibration gains at least 0.02", gain >= 0.02)
    run.claim("and is then at most 0.02 below batch statistics", min(wrong[:, 2] - wrong[:, 0]) > -0.02)
    return run.finish(sizes=sizes, without_batch_norm=plain, with_batch_norm=accuracy)


if __name__ == "__main__":
    main()
