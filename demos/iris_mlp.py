"""Iris: three species of flowers from four lengths, a task so easy that BatchNorm makes no real difference.

The first network of the first article: Dense 512, BatchNorm, ReLU, twice, then Dense 3; Adam, batches of 32, 150
epochs, 120 flowers to train on and 30 to test on. Each seed gives another split and other initial weights.
"""

import numpy as np

from tinygrad_bn import manual_seed, nn, train, viz
from tinygrad_bn.train.interval import interval, number

from .common import MODELS, Run
from .output import start


def build(batch_norm: bool, features: int, classes: int) -> nn.Sequential:
    """Dense-BatchNorm-ReLU twice, then Dense."""

    def block(fan_in: int) -> list[nn.Module]:
        return [nn.Linear(fan_in, 512), *([nn.BatchNorm1d(512)] if batch_norm else []), nn.ReLU()]

    return nn.Sequential(*block(features), *block(512), nn.Linear(512, classes))


def main(argv: list[str] | None = None) -> Run:
    """Train both networks once per seed, and compare their test accuracies."""
    run = Run(
        "iris_mlp", __doc__, argv,
        data="iris", epochs=150, batch_size=32, lr=1e-3, optimizer="adam", seeds=12, check={"epochs": 20, "seeds": 16},
    )  # fmt: skip
    flowers = run.load().complete()
    if flowers.x.ndim != 2:
        run.parser.error(f"this network takes samples (N, features), as in iris and titanic; got {flowers!r}")
    run.console.print(flowers)
    tested = len(flowers) // 5

    def both(seed: int) -> dict[str, train.History]:
        training, test = flowers.split(tested, seed=seed)
        histories = {}
        for name, batch_norm in MODELS.items():
            manual_seed(seed)
            model = build(batch_norm, flowers.x.shape[1], len(flowers.classes))
            histories[name] = run.fit(model, training, test, name, seed=seed)
        return histories

    trained = run.each(both, run.seeds, "seeds")
    accuracy = {name: np.array([of[name]["val_accuracy"][-1] for of in trained]) for name in MODELS}

    figure, grid = viz.subplots(1, 2, 11, 4.2)
    for position, (name, values) in enumerate(accuracy.items()):
        losses = [of[name]["val_loss"] for of in trained]
        viz.plot_seeds(grid[0, 0], np.arange(1, run.args.epochs + 1), losses, name)
        offsets = position + np.linspace(-0.2, 0.2, len(values))
        grid[0, 1].plot(offsets, values, "o", color=viz.colour(name), markersize=7)
    grid[0, 0].set(xlabel="epoch", ylabel="test loss", ylim=(0, None), title="one thin line per seed, and the mean")
    grid[0, 0].legend(frameon=False)
    lowest = min(values.min() for values in accuracy.values())
    grid[0, 1].set(ylabel="test accuracy", xlim=(-0.5, 1.5), ylim=(lowest - 0.03, 1.01), title="one dot per seed")
    grid[0, 1].set_xticks(range(len(MODELS)), list(MODELS))
    figure.suptitle(f"Dense 512 – Dense 512 – Dense {len(flowers.classes)} on {run.args.data}")
    run.save(figure, "accuracy")

    for name, values in accuracy.items():
        run.print(f"{name:17} test accuracy {interval(values)}   ({' '.join(f'{value:.3f}' for value in values)})")
    gain, one = interval(accuracy["with BatchNorm"] - accuracy["without BatchNorm"]), 1 / tested
    run.print(
        f"One of {tested} flowers changes the accuracy by {number(one)}. BatchNorm changes it by {gain} on average, "
        f"that is by {gain.mean / one:.1f} flowers."
    )
    flowers_gained = (accuracy["with BatchNorm"] - accuracy["without BatchNorm"]) * tested
    run.claim_mean("with BatchNorm the test accuracy is above 0.9", accuracy["with BatchNorm"], above=0.9)
    less = f"it differs by less than 2 of {tested} flowers from the one without"
    run.claim_mean(less, flowers_gained, -2, 2, learned=accuracy.values())
    return run.finish(**{name: values.tolist() for name, values in accuracy.items()})


if __name__ == "__main__":
    start(lambda: main().code)
