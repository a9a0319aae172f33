"""Iris: three species of flowers from four lengths, a task so easy that BatchNorm makes no real difference.

The first network of the first article: Dense 512, BatchNorm, ReLU, twice, then Dense 3; Adam, batches of 32, 150
epochs, 120 flowers to train on and 30 to test on. Each seed gives another split and other initial weights.
"""

import numpy as np

from demos.common import MODELS, Run
from tinygrad_bn import manual_seed, nn, viz


def build(batch_norm: bool, features: int, classes: int) -> nn.Sequential:
    """Dense-BatchNorm-ReLU twice, then Dense."""

    def block(fan_in: int) -> list[nn.Module]:
        return [nn.Linear(fan_in, 512), *([nn.BatchNorm1d(512)] if batch_norm else []), nn.ReLU()]

    return nn.Sequential(*block(features), *block(512), nn.Linear(512, classes))


def main(argv: list[str] | None = None) -> Run:
    """Train both networks once per seed, and compare their test accuracies."""
    run = Run(
        "iris_mlp", __doc__, argv,
        data="iris", epochs=150, batch_size=32, lr=1e-3, optimizer="adam", seeds=5, check={"epochs": 40, "seeds": 3},
    )  # fmt: skip
    flowers = run.load().complete()
    if flowers.x.ndim != 2:
        run.parser.error(f"this network takes samples (N, features); got {flowers!r}")
    run.console.print(flowers)

    accuracy: dict[str, list[float]] = {name: [] for name in MODELS}
    curves: dict[str, list[list[float]]] = {name: [] for name in MODELS}
    seeds = range(run.args.seed, run.args.seed + run.args.seeds)
    for seed in run.track(seeds, "seeds"):
        training, test = flowers.split(len(flowers) // 5, seed=seed)
        for name, batch_norm in MODELS.items():
            manual_seed(seed)
            model = build(batch_norm, flowers.x.shape[1], len(flowers.classes))
            history = run.fit(model, training, test, name, seed=seed, progress=False)
            accuracy[name].append(history["val_accuracy"][-1])
            curves[name].append(history["val_loss"])

    for name, values in accuracy.items():
        each = " ".join(f"{value:.3f}" for value in values)
        print(f"{name:17} test accuracy {np.mean(values):.3f} on average   ({each})")
    one = 1 / len(test)
    difference = abs(np.mean(accuracy["with BatchNorm"]) - np.mean(accuracy["without BatchNorm"]))
    no_difference = difference < 1.5 * one
    run.console.print(
        f"One of {len(test)} flowers changes the accuracy by {one:.3f}. The means differ by {difference:.3f}, that is "
        f"{difference / one:.1f} flowers" + (": BatchNorm makes no real difference here." if no_difference else ".")
    )

    figure, grid = viz.subplots(1, 2, 11, 4.2)
    for position, (name, losses) in enumerate(curves.items()):
        epochs = np.arange(1, run.args.epochs + 1)
        for i, curve in enumerate(losses):
            grid[0, 0].plot(epochs, curve, color=viz.colour(name), alpha=0.6, label=None if i else name)
        offsets = position + np.linspace(-0.12, 0.12, len(losses))
        grid[0, 1].plot(offsets, accuracy[name], "o", color=viz.colour(name), markersize=8)
    grid[0, 0].set(xlabel="epoch", ylabel="test loss", ylim=(0, None), title="one line per seed")
    grid[0, 0].legend(frameon=False)
    grid[0, 1].set(ylabel="test accuracy", xlim=(-0.5, 1.5), title="one dot per seed")
    grid[0, 1].set_xticks(range(len(MODELS)), list(MODELS))
    figure.suptitle(f"Dense 512 – Dense 512 – Dense {len(flowers.classes)} on {run.args.data}")
    run.save(figure, "accuracy")

    run.claim("with BatchNorm the mean test accuracy is at least 0.93", np.mean(accuracy["with BatchNorm"]) >= 0.93)
    run.claim("and differs by less than one and a half flowers from the one without", no_difference)
    return run.finish(**accuracy)


if __name__ == "__main__":
    main()
