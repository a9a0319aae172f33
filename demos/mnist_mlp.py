"""MNIST with a small network and a large learning rate, with and without BatchNorm, logged every epoch.

The experiment of the third article: 784-32-32-10, ReLU, Adam with a learning rate of 0.01, batches of 32, 10 epochs.
The networks train in turns, one epoch each. After each epoch both are evaluated on the training and on the validation
data, and logged in the article's format. The log shows the first seed; the figure and the claims are of all seeds.
"""

from itertools import pairwise

import numpy as np

from tinygrad_bn import manual_seed, nn, train, viz
from tinygrad_bn.train.interval import interval

from .common import MODELS, Run
from .options import OPTIMIZERS
from .output import start

PARTS = ("TRAIN", "VALID")


def build(batch_norm: bool, seed: int) -> nn.Sequential:
    """784-32-32-10; both variants get the same weights from one seed."""
    manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise((784, 32, 32)):
        layers += [nn.Linear(fan_in, fan_out), *([nn.BatchNorm1d(fan_out)] if batch_norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(32, 10))


def log(run: Run, epoch: int, part: str, plain: train.Score, bn: train.Score) -> None:
    """One line in the article's format."""
    run.console.print(
        f"[Epoch {epoch}-{part}] Batchnorm Loss(Acc): bn_loss:{bn.loss:.5f}(bn_acc:{bn.accuracy:.2f}) "
        f"vs No Batchnorm Loss(Acc): nn_loss:{plain.loss:.5f}(nn_acc:{plain.accuracy:.2f})",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> Run:
    """Train both networks in turns for each seed, log every epoch, plot loss and accuracy."""
    run = Run(
        "mnist_mlp", __doc__, argv,
        epochs=10, batch_size=32, lr=0.01, optimizer="adam", data="mnist5k", seeds=10, check={"epochs": 3},
    )  # fmt: skip
    data = dict(zip(PARTS, run.images(), strict=True))

    def in_turns(seed: int) -> dict[tuple[str, str], list[train.Score]]:
        models = {name: build(batch_norm, seed) for name, batch_norm in MODELS.items()}
        optimizers = {n: OPTIMIZERS[run.args.optimizer](m.parameters(), lr=run.args.lr) for n, m in models.items()}
        scores: dict[tuple[str, str], list[train.Score]] = {(name, part): [] for name in MODELS for part in PARTS}
        for epoch in range(1, run.args.epochs + 1):
            for name, model in models.items():
                options = {"optimizer": optimizers[name], "seed": 1000 * seed + epoch}
                run.fit(model, data["TRAIN"], None, name, epochs=1, **options)
                for part in PARTS:
                    scores[name, part].append(train.evaluate(model, data[part]))
            for part in PARTS:
                if seed == run.args.seed:
                    log(run, epoch, part, *(scores[name, part][-1] for name in MODELS))
        return scores

    scores = run.each(in_turns, run.seeds, "seeds")
    run.print("\nLearning finished")

    figure, grid = viz.subplots(1, 2, 11, 4.4)
    for i, (axes, measure) in enumerate(zip(grid[0], ("loss", "accuracy"), strict=True)):
        for name in MODELS:
            for part, style, of in (("VALID", "-", "validation"), ("TRAIN", "--", "training")):
                lines = np.array([one[name, part] for one in scores])[:, :, i]
                viz.plot_seeds(axes, range(1, lines.shape[1] + 1), lines, name, f"{name}, {of}", style)
        axes.set(xlabel="epoch", ylabel=measure)
        axes.xaxis.get_major_locator().set_params(integer=True)
    viz.legend_below(grid[0, 1])
    figure.suptitle(
        f"784-32-32-10 on {run.args.data}, {run.args.optimizer} {run.args.lr:g}; mean and {len(scores)} seeds"
    )
    run.save(figure, "history")

    last = {name: np.array([one[name, "VALID"][-1] for one in scores]) for name in MODELS}  # loss, accuracy by seed
    for name, values in last.items():
        loss, accuracy = values.T
        run.print(f"{name:17} validation loss {interval(loss)}, accuracy {interval(accuracy)}")
    gain = last["without BatchNorm"][:, 0] - last["with BatchNorm"][:, 0]
    run.claim_mean("with BatchNorm the validation accuracy is above 0.85", last["with BatchNorm"][:, 1], above=0.85)
    run.claim_mean("the validation loss is lower with BatchNorm than without", gain, above=0)
    return run.finish(**{f"{name}, {part}": [one[name, part] for one in scores] for name in MODELS for part in PARTS})


if __name__ == "__main__":
    start(lambda: main().code)
