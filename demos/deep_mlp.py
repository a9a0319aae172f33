"""The main job: a network of six hidden layers on MNIST digits, with and without BatchNorm.

The network of the fifth article: 784-256-128-512-64-128-256-10, ReLU, Adam, batches of 500, 20 epochs. Both models
start from the same weights and get the same batches; one has a BatchNorm before each activation.
"""

from collections.abc import Mapping
from contextlib import suppress
from itertools import pairwise, zip_longest

from rich import box
from rich.table import Table

from demos.common import MODELS, Run
from tinygrad_bn import manual_seed, nn, train, viz

SIZES = (784, 256, 128, 512, 64, 128, 256, 10)


def build(batch_norm: bool, seed: int) -> nn.Sequential:
    """The network. BatchNorm draws no random numbers, so both variants get the same weights from one seed."""
    manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(SIZES[:-1]):
        layers += [nn.Linear(fan_in, fan_out), *([nn.BatchNorm1d(fan_out)] if batch_norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(SIZES[-2], SIZES[-1]))


def table(histories: Mapping[str, train.History]) -> Table:
    """Loss and accuracy of both models, epoch by epoch."""
    caption = "train: mean over the epoch, in training mode; valid: after the epoch, in evaluation mode"
    out = Table(caption=caption, box=box.SIMPLE_HEAD)
    out.add_column("epoch", justify="right", vertical="bottom")
    for name in histories:
        for head in (f"{name.split()[0]}\ntrain\nloss", "\n\nacc", "\nvalid\nloss", "\n\nacc"):
            out.add_column(head, justify="right", no_wrap=True)
    for number, epochs in enumerate(zip_longest(*(h.epochs for h in histories.values())), start=1):
        cells = [
            f"{e.loss:.4f} {e.accuracy:.3f} {e.val_loss:.4f} {e.val_accuracy:.3f}" if e else "- - - -" for e in epochs
        ]
        out.add_row(str(number), *" ".join(cells).split())
    return out


def main(argv: list[str] | None = None) -> Run:
    """Train both networks, print the table, write the figure and the histories."""
    run = Run(
        "deep_mlp", __doc__, argv,
        epochs=20, batch_size=500, lr=1e-3, optimizer="adam", data="mnist5k", check={"epochs": 6},
    )  # fmt: skip
    training, validation = run.images()
    with suppress(KeyboardInterrupt):
        for name, batch_norm in MODELS.items():
            run.fit(build(batch_norm, run.args.seed), training, validation, name)

    if any(history.interrupted for history in run.histories.values()):
        run.console.print("interrupted: results so far")
    run.console.print(table(run.histories))
    reached = {name: history["val_accuracy"][-1] for name, history in run.histories.items() if len(history)}
    for name, accuracy in reached.items():
        print(f"{name:17} accuracy {accuracy:.3f}   {run.histories[name].seconds:5.1f} s")
        run.histories[name].save(run.path(f"{name.replace(' ', '_')}.csv"))
    run.console.print(
        "After the first epoch, validation accuracy can be lower with BatchNorm: running statistics start at mean 0 "
        "and variance 1, and n batches move them only 1 − 0.9ⁿ of the way. Training uses batch statistics: no lag."
    )
    if reached:
        title = f"784-256-128-512-64-128-256-10 on {run.args.data}, {run.args.optimizer}"
        run.save(viz.plot_histories(run.histories, title), "history")
    if len(reached) == 2:
        run.claim("with BatchNorm the network reaches 0.90 in validation", reached["with BatchNorm"] >= 0.9)
        run.claim("and is more accurate than without", reached["with BatchNorm"] > reached["without BatchNorm"])
    return run.finish(**{name: {"interrupted": h.interrupted, "epochs": h.rows()} for name, h in run.histories.items()})


if __name__ == "__main__":
    main()
