"""Learning rates: with BatchNorm a network trains at rates at which it diverges without BatchNorm.

After Bjorck et al. 2018: 784-100-100-100-100-100-10, ReLU, initial weights as in He et al. 2015, gradient descent with
momentum 0.9, batches of 100; one training per learning rate. At small rates, both networks are about equally accurate:
the gain of BatchNorm is that larger rates work.
"""

import math
from itertools import pairwise

import numpy as np
from rich import box
from rich.table import Table

from demos.common import MODELS, Run
from tinygrad_bn import manual_seed, nn, optim, viz

SIZES = (784, 100, 100, 100, 100, 100)
CHANCE = math.log(10)  # loss of guessing among ten classes; a final training loss above it counts as diverged
TRAINS = 0.8  # a rate trains if the validation accuracy reaches this


def build(batch_norm: bool, seed: int) -> nn.Sequential:
    """The network. He initialisation keeps the variance of activations, so both variants start alike."""
    manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(SIZES):
        linear = nn.Linear(fan_in, fan_out)
        nn.init.kaiming_normal_(linear.weight)
        layers += [linear, *([nn.BatchNorm1d(fan_out)] if batch_norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(SIZES[-1], 10))


def main(argv: list[str] | None = None) -> Run:
    """Train both networks at every rate, and plot where each diverges."""
    run = Run("learning_rates", __doc__, argv, data="mnist5k", epochs=5, batch_size=100, check={"epochs": 2})
    training, validation = run.images()
    rates = np.logspace(-3, 1, 9 if run.args.check else 13)

    loss: dict[str, list[float]] = {name: [] for name in MODELS}
    accuracy: dict[str, list[float]] = {name: [] for name in MODELS}
    with np.errstate(over="ignore", invalid="ignore"):  # diverging networks overflow
        for lr in run.track(rates.tolist(), "learning rates"):
            for name, batch_norm in MODELS.items():
                model = build(batch_norm, run.args.seed)
                optimizer = optim.SGD(model.parameters(), lr=lr, momentum=0.9)
                history = run.fit(
                    model, training, validation, name, optimizer=optimizer, progress=False, nonfinite="ignore",
                    callbacks=lambda history, _: not math.isfinite(history["loss"][-1]),
                )  # fmt: skip
                loss[name].append(history["loss"][-1])
                accuracy[name].append(history["val_accuracy"][-1])

    diverged = {name: [not value < CHANCE for value in values] for name, values in loss.items()}
    table = Table("learning rate", box=box.SIMPLE_HEAD, caption="training loss, validation accuracy of the last epoch")
    for name in MODELS:
        table.add_column(name, justify="right")
    for i, lr in enumerate(rates):
        cells = [
            f"{'diverged' if diverged[name][i] else f'{loss[name][i]:8.4f}'} {accuracy[name][i]:.3f}" for name in MODELS
        ]
        table.add_row(f"{lr:.4f}", *cells)
    run.console.print(table)

    figure, grid = viz.subplots(1, 2, 11, 4.4)
    for position, name in enumerate(MODELS):
        mask, hue = np.array(diverged[name]), viz.colour(name)
        for axes, values, bottom in zip(grid[0], (loss[name], accuracy[name]), (1.35 * CHANCE, 0.03), strict=True):
            axes.semilogx(rates, np.where(mask, np.nan, values), "o-", color=hue, label=name)
            height = bottom * 1.3**position if values is loss[name] else bottom + 0.05 * position
            axes.plot(rates[mask], np.full(mask.sum(), height), "x", color=hue, markeredgewidth=2)
            axes.set_xlabel("learning rate")
    grid[0, 0].axhline(CHANCE, color="0.5", linewidth=1, linestyle=":")
    grid[0, 0].set(ylabel="training loss of the last epoch", yscale="log", title="dotted: loss of guessing")
    grid[0, 1].set(ylabel="validation accuracy", ylim=(0, 1), title="×: diverged")
    viz.legend_below(grid[0, 1])
    figure.suptitle(f"784-100×5-10 on {run.args.data}, momentum 0.9, epochs: {run.args.epochs}")
    run.save(figure, "learning_rates")

    largest = {
        name: max((lr for lr, value in zip(rates, values, strict=True) if value >= TRAINS), default=0.0)
        for name, values in accuracy.items()
    }
    best = int(np.argmax(accuracy["without BatchNorm"]))
    for name in MODELS:
        print(
            f"{name:17} largest rate that trains {largest[name]:.3g}; accuracy {accuracy[name][best]:.3f} at rate "
            f"{rates[best]:.3g} (best without BatchNorm), {max(accuracy[name]):.3f} at its best rate"
        )
    times = largest["with BatchNorm"] / (largest["without BatchNorm"] or math.nan)
    ahead = accuracy["with BatchNorm"][best] - accuracy["without BatchNorm"][best]
    run.console.print(
        f"With BatchNorm, the largest rate that trains (to an accuracy of {TRAINS}) is {times:.1f} times larger."
    )
    run.claim("with BatchNorm, the largest rate that trains is at least 5 times larger", times >= 5)
    run.claim("at the best rate without BatchNorm, BatchNorm gains less than 0.08", ahead < 0.08)
    return run.finish(
        rate=rates.tolist(),
        loss={name: [value if math.isfinite(value) else None for value in values] for name, values in loss.items()},
        accuracy=accuracy,
        largest_rate_that_trains=largest,
    )


if __name__ == "__main__":
    main()
