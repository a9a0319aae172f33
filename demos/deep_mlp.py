"""The main job: a network of six hidden layers on MNIST digits, with and without BatchNorm.

The network of the fifth article: 784-256-128-512-64-128-256-10, ReLU, Adam, batches of 500, 20 epochs. Both models
start from the same weights and see the same batches; in one, BatchNorm stands before each activation.
"""

import argparse
import json
import time
from itertools import pairwise, zip_longest
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from demos.common import OPTIMIZERS, options, output_folder, training_options
from tinygrad_bn import datasets, manual_seed, nn, train, viz

SIZES = (784, 256, 128, 512, 64, 128, 256, 10)


def build(batch_norm: bool, seed: int) -> nn.Sequential:
    """The network. BatchNorm draws no random numbers, so both variants get the same weights from one seed."""
    manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(SIZES[:-1]):
        layers += [nn.Linear(fan_in, fan_out), *([nn.BatchNorm1d(fan_out)] if batch_norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(SIZES[-2], SIZES[-1]))


def data(args: argparse.Namespace) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training and validation data: 4,000 and 1,000 of the embedded digits, or the two parts in a folder."""
    if args.data == "mnist5k":
        return datasets.load("mnist5k").scaled().split(1000, seed=args.seed)
    training, validation = (datasets.load(Path(args.data).name, args.data, part) for part in ("train", "test"))
    for part in (training, validation):
        if part.x.shape[1:] != (28, 28) or len(part.classes) > 10:
            raise datasets.DataError(f"{part!r} does not fit a network for 28 × 28 images of 10 classes")
    return training.scaled(), validation.scaled()


def table(histories: dict[str, train.History]) -> Table:
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


def write(folder: Path, histories: dict[str, train.History], args: argparse.Namespace) -> list[Path]:
    """The numbers as JSON and CSV, and the figure."""
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    models = {
        name: {"seconds": h.seconds, "interrupted": h.interrupted, "epochs": h.rows()} for name, h in histories.items()
    }
    paths = [folder / "history.json"]
    paths[0].write_text(json.dumps({"settings": settings, "models": models}, indent=1))
    for name, history in histories.items():
        paths.append(folder / f"{name.replace(' ', '_')}.csv")
        history.save(paths[-1])
    if not args.no_plot and any(len(h) for h in histories.values()):
        figure = viz.plot_histories(histories, f"784-256-128-512-64-128-256-10 on {args.data}, {args.optimizer}")
        paths.append(viz.save(figure, folder / "history.png"))
    return paths


def main(argv: list[str] | None = None) -> dict[str, train.History]:
    """Train both networks, print the table, write the figure and the numbers."""
    parser = options("deep_mlp", __doc__)
    training_options(parser, epochs=20, batch_size=500, lr=1e-3)
    args = parser.parse_args(argv)
    start = time.perf_counter()
    try:
        training, validation = data(args)
    except datasets.DataError as error:
        parser.error(str(error))
    if len(training) % args.batch_size == 1 or args.batch_size == 1:
        parser.error(f"{len(training):,} images in batches of {args.batch_size} leave a batch of one for BatchNorm")
    folder = output_folder("deep_mlp", args.out)
    console = Console(quiet=args.quiet)
    console.print(f"{training!r}\n{len(training):,} images to train on, {len(validation):,} to validate on")

    histories: dict[str, train.History] = {}
    for name, batch_norm in (("without BatchNorm", False), ("with BatchNorm", True)):
        model = build(batch_norm, args.seed)
        histories[name] = train.fit(
            model,
            training,
            validation=validation,
            epochs=args.epochs,
            batch_size=args.batch_size,
            optimizer=OPTIMIZERS[args.optimizer](model.parameters(), lr=args.lr),
            seed=args.seed,
            progress=not args.quiet,
            description=f"{name:17}",
        )
        if histories[name].interrupted:
            console.print("interrupted: what follows is what was learned so far")
            break
    console.print(table(histories))
    for name, history in histories.items():
        if len(history):
            print(f"{name:17} accuracy {history['val_accuracy'][-1]:.3f}   {history.seconds:5.1f} s")
    console.print(
        "After the first epoch BatchNorm can be behind in validation: its running statistics, which start at mean 0 "
        "and variance 1, have moved only 1 − 0.9ⁿ of the way in n batches. Its training accuracy shows no such lag."
    )
    for path in write(folder, histories, args):
        console.print(f"wrote {path}", soft_wrap=True)
    console.print(f"in all {time.perf_counter() - start:.1f} s")
    return histories


if __name__ == "__main__":
    main()
