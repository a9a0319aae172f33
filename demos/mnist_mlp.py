"""MNIST with a small network and a large learning rate, with and without BatchNorm, logged every epoch.

The experiment of the third article: 784-32-32-10, ReLU, Adam with a learning rate of 0.01, batches of 32, 10 epochs.
The networks train in turns, one epoch each. After each epoch both are evaluated on the training and on the validation
data, and logged in the article's format.
"""

from itertools import pairwise

from demos.common import MODELS, OPTIMIZERS, Run
from tinygrad_bn import manual_seed, nn, train, viz

PARTS = ("TRAIN", "VALID")


def build(batch_norm: bool, seed: int) -> nn.Sequential:
    """784-32-32-10; both variants get the same weights from one seed."""
    manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise((784, 32, 32)):
        layers += [nn.Linear(fan_in, fan_out), *([nn.BatchNorm1d(fan_out)] if batch_norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(32, 10))


def main(argv: list[str] | None = None) -> Run:
    """Train both networks in turns, log every epoch, plot loss and accuracy."""
    run = Run(
        "mnist_mlp", __doc__, argv,
        epochs=10, batch_size=32, lr=0.01, optimizer="adam", data="mnist5k", check={"epochs": 3},
    )  # fmt: skip
    data = dict(zip(PARTS, run.images(), strict=True))
    models = {name: build(batch_norm, run.args.seed) for name, batch_norm in MODELS.items()}
    optimizers = {name: OPTIMIZERS[run.args.optimizer](m.parameters(), lr=run.args.lr) for name, m in models.items()}
    scores: dict[tuple[str, str], list[train.Score]] = {(name, part): [] for name in MODELS for part in PARTS}

    for epoch in run.track(range(1, run.args.epochs + 1), "epochs"):
        for name, model in models.items():
            options = {"optimizer": optimizers[name], "seed": run.args.seed + epoch}
            run.fit(model, data["TRAIN"], None, name, epochs=1, progress=False, **options)
            for part in PARTS:
                scores[name, part].append(train.evaluate(model, data[part]))
        for part in PARTS:
            bn, plain = scores["with BatchNorm", part][-1], scores["without BatchNorm", part][-1]
            run.console.print(
                f"[Epoch {epoch}-{part}] Batchnorm Loss(Acc): bn_loss:{bn.loss:.5f}(bn_acc:{bn.accuracy:.2f}) "
                f"vs No Batchnorm Loss(Acc): nn_loss:{plain.loss:.5f}(nn_acc:{plain.accuracy:.2f})",
                highlight=False, markup=False, soft_wrap=True,
            )  # fmt: skip
    run.console.print("\nLearning finished")

    figure, grid = viz.subplots(1, 2, 11, 4.4)
    for axes, measure in zip(grid[0], ("loss", "accuracy"), strict=True):
        for (name, part), line in scores.items():
            style, of = ("-", "validation") if part == "VALID" else ("--", "training")
            values = [getattr(score, measure) for score in line]
            axes.plot(range(1, len(line) + 1), values, style, color=viz.colour(name), label=f"{name}, {of}")
        axes.set(xlabel="epoch", ylabel=measure)
    viz.legend_below(grid[0, 1])
    figure.suptitle(f"784-32-32-10 on {run.args.data}, {run.args.optimizer} {run.args.lr:g}, both in evaluation mode")
    run.save(figure, "history")

    reached = {name: scores[name, "VALID"][-1].accuracy for name in MODELS}
    for name, accuracy in reached.items():
        print(f"{name:17} validation accuracy {accuracy:.3f}")
    run.claim("with BatchNorm the network reaches 0.90 in validation", reached["with BatchNorm"] >= 0.9)
    run.claim(
        "and has the lower validation loss",
        scores["with BatchNorm", "VALID"][-1].loss < scores["without BatchNorm", "VALID"][-1].loss,
    )
    return run.finish(**{f"{name}, {part}": line for (name, part), line in scores.items()})


if __name__ == "__main__":
    main()
