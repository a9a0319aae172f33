"""The main job: a network of six hidden layers on MNIST digits, with and without BatchNorm.

The network of the fifth article: 784-256-128-512-64-128-256-10, ReLU, Adam, batches of 500, 20 epochs. For each seed,
both models start from the same weights and get the same batches; one has a BatchNorm before each activation.
"""

from collections.abc import Sequence
from dataclasses import astuple
from itertools import pairwise

import numpy as np
from rich.columns import Columns

from tinygrad_bn import manual_seed, nn, train, viz
from tinygrad_bn.train.interval import interval, number

from .common import MODELS, Run
from .output import start

SIZES = (784, 256, 128, 512, 64, 128, 256, 10)


def build(batch_norm: bool, seed: int) -> nn.Sequential:
    """The network. BatchNorm draws no random numbers, so both variants get the same weights from one seed."""
    manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(SIZES[:-1]):
        layers += [nn.Linear(fan_in, fan_out), *([nn.BatchNorm1d(fan_out)] if batch_norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(SIZES[-2], SIZES[-1]))


def mean(histories: Sequence[train.History]) -> train.History:
    """The mean of each metric over the seeds, epoch by epoch."""
    epochs = [
        np.mean([astuple(e)[1:] for e in same], axis=0) for same in zip(*(h.epochs for h in histories), strict=True)
    ]
    return train.History([train.Epoch(i, *values.tolist()) for i, values in enumerate(epochs, start=1)])


def main(argv: list[str] | None = None) -> Run:
    """Train both networks for each seed, print the table, write the figure and the histories."""
    run = Run(
        "deep_mlp", __doc__, argv,
        epochs=20, batch_size=500, lr=1e-3, optimizer="adam", data="mnist5k", seeds=10, check={"epochs": 6},
    )  # fmt: skip
    training, validation = run.images()

    def both(seed: int) -> dict[str, train.History]:
        return {
            name: run.fit(build(batch_norm, seed), training, validation, f"{name}, seed {seed}", seed=seed)
            for name, batch_norm in MODELS.items()
        }

    trained = run.each(both, run.seeds)
    histories = {name: [of[name] for of in trained] for name in MODELS}
    means = {name: mean(of) for name, of in histories.items()}
    for seed, of in zip(run.seeds, trained, strict=False):
        for name, history in of.items():
            run.write(f"{name.replace(' ', '_')}_seed_{seed}.csv", history.save)
    title = f"784-256-128-512-64-128-256-10 on {run.args.data}, {run.args.optimizer}, mean of {len(trained)} seeds"
    run.save(viz.plot_histories(histories, title), "history")

    head = ("epoch", "train loss", "train acc", "valid loss", "valid acc")
    tables = [
        run.table(head, [[str(e.epoch), *map(number, astuple(e)[1:5])] for e in history.epochs], title=name)
        for name, history in means.items()
    ]
    run.print(Columns(tables), "train: mean over the epoch, in training mode; valid: after it, in evaluation mode")
    reached = {name: np.array([h["val_accuracy"][-1] for h in of]) for name, of in histories.items()}
    for name, accuracies in reached.items():
        seconds = sum(h.seconds for h in histories[name])
        run.print(f"{name:17} accuracy {interval(accuracies)}   {seconds:.1f} s in all")
    run.print(
        "After the first epoch, validation accuracy can be lower with BatchNorm: running statistics start at mean 0 "
        "and variance 1, and n batches move them only 1 − 0.9ⁿ of the way. Training uses batch statistics: no lag."
    )
    ahead = reached["with BatchNorm"] - reached["without BatchNorm"]
    run.claim_mean("with BatchNorm the validation accuracy is above 0.85", reached["with BatchNorm"], above=0.85)
    run.claim_mean("it is higher than without", ahead, above=0)
    return run.finish(**{name: [h.rows() for h in of] for name, of in histories.items()})


if __name__ == "__main__":
    start(lambda: main().code)
