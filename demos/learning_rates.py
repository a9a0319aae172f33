"""Learning rates: with BatchNorm a network trains at rates at which it diverges without BatchNorm.

After Bjorck et al. 2018: 784-100-100-100-100-100-10, ReLU, initial weights as in He et al. 2015, gradient descent with
momentum 0.9, batches of 100; one training per learning rate and seed. At small rates, both networks are about equally
accurate: the gain of BatchNorm is that larger rates work. A training has diverged if its loss overflows, or if it ends
no better than guessing although a smaller rate does better.
"""

import math
from itertools import pairwise, product

import numpy as np

from tinygrad_bn import datasets, manual_seed, nn, optim, viz
from tinygrad_bn.tensor import Array
from tinygrad_bn.train.interval import interval, number

from .common import MODELS, Run
from .output import start

SIZES = (784, 100, 100, 100, 100, 100)
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


def guessing(validation: datasets.Dataset) -> float:
    """The accuracy that guessing stays below: the share of the largest class, and three standard errors."""
    share = float(np.bincount(validation.y).max()) / len(validation)
    return share + 3 * math.sqrt(share * (1 - share) / len(validation))


def diverged(accuracy: Array, guess: float) -> Array:
    """Which trainings diverged. `accuracy` (…, rates), by rising rate, is NaN where the loss overflowed."""
    best_below = np.fmax.accumulate(accuracy, axis=-1)
    return np.asarray(np.isnan(accuracy) | ((accuracy <= guess) & (best_below > guess)))


def draw(run: Run, rates: Array, loss: Array, accuracy: Array, failed: Array) -> None:
    """Loss and accuracy by rate, and crosses where a training diverged; all by seed, model and rate."""
    figure, grid = viz.subplots(1, 2, 11, 4.8)
    for axes, values in zip(grid[0], (loss, accuracy), strict=True):
        for j, name in enumerate(MODELS):
            shown = np.where(failed[:, j], np.nan, values[:, j])
            viz.plot_seeds(axes, rates, shown, name, style="-o", log=values is loss)
            some = failed[:, j].any(axis=0)  # marked above the axes: a training that diverged has no value to show
            axes.plot(
                rates[some], np.full(some.sum(), 1.03 + 0.05 * j), "x", color=viz.colour(name),
                transform=axes.get_xaxis_transform(), clip_on=False, markeredgewidth=2,
            )  # fmt: skip
        axes.set(xlabel="learning rate", xscale="log", xlim=(rates[0] / 1.3, rates[-1] * 1.3))
    grid[0, 0].set_ylabel("training loss of the last epoch")
    grid[0, 1].set(ylabel="validation accuracy", ylim=(0, 1))
    viz.legend_below(grid[0, 1])
    figure.suptitle(
        f"784-100×5-10 on {run.args.data}, momentum 0.9, epochs: {run.args.epochs}, seeds: {len(loss)}\n"
        "× above: at least one seed diverged, so no mean"
    )
    run.save(figure, "learning_rates")


def main(argv: list[str] | None = None) -> Run:
    """Train both networks at every rate, and plot where each diverges."""
    run = Run("learning_rates", __doc__, argv, data="mnist5k", epochs=5, batch_size=100, seeds=10, check={"epochs": 2})
    training, validation = run.images()
    rates = np.logspace(-2, 1, 7) if run.args.check else np.logspace(-3, 1, 13)

    def one(seed: int, lr: float, batch_norm: bool) -> tuple[float, float]:
        model = build(batch_norm, seed)
        history = run.fit(
            model, training, validation, seed=seed, optimizer=optim.SGD(model.parameters(), lr=lr, momentum=0.9),
            callbacks=lambda history, _: not math.isfinite(history["loss"][-1]),
        )  # fmt: skip
        loss, accuracy = history["loss"][-1], history["val_accuracy"][-1]
        return (loss, accuracy) if math.isfinite(loss) else (math.nan, math.nan)

    def sweep(seed: int) -> list[list[tuple[float, float]]]:
        return [[one(seed, lr, batch_norm) for lr in rates.tolist()] for batch_norm in MODELS.values()]

    measured = np.array(run.each(sweep, run.seeds, "seeds"))  # by seed, model, rate; loss and accuracy
    loss, accuracy = measured[..., 0], measured[..., 1]
    failed = diverged(accuracy, guessing(validation))

    draw(run, rates, loss, accuracy, failed)
    rows = [[f"{lr:.2g}"] for lr in rates]
    for (i, row), j in product(enumerate(rows), range(len(MODELS))):
        lost, left = failed[:, j, i].sum(), accuracy[~failed[:, j, i], j, i]
        row.append((number(left.mean()) if len(left) else "") + (f" ({lost} diverged)" if lost else ""))
    caption = "validation accuracy of the last epoch, mean of the seeds that did not diverge"
    run.print(run.table(("rate", *MODELS), rows, caption=caption))
    trains = np.where(accuracy >= TRAINS, rates, 0).max(axis=2)  # the largest rate that trains, by seed and model
    both = trains[trains.all(axis=1)]
    times = np.log10(both[:, 1] / both[:, 0])
    for j, name in enumerate(MODELS):
        each = ", ".join(f"{lr:.2g}" if lr else "none" for lr in trains[:, j])
        run.print(f"{name:17} largest rate that trains to an accuracy of {TRAINS}, by seed: {each}")
    if len(times):
        run.print(f"With BatchNorm it is {10 ** interval(times).mean:.1f} times larger (geometric mean).")
        run.claim_mean("with BatchNorm, the largest rate that trains is larger, by powers of ten", times, above=0.3)
    best = np.fmax.reduce(np.where(failed, np.nan, accuracy), axis=2)
    gain = best[:, 1] - best[:, 0]
    less = "at the best rate of each, BatchNorm gains less than 0.12 in accuracy"
    run.claim_mean(less, gain, below=0.12, learned=best.T)
    return run.finish(
        rate=rates.tolist(), models=tuple(MODELS), loss=loss.tolist(), accuracy=accuracy.tolist(),
        diverged=failed.tolist(), largest_rate_that_trains=trains.tolist(),
    )  # fmt: skip


if __name__ == "__main__":
    start(lambda: main().code)
