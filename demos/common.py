"""What the demos share: their options, and the folder they write to."""

import argparse
import sys
from datetime import datetime
from pathlib import Path

from tinygrad_bn import optim

OPTIMIZERS = {"adam": optim.Adam, "adamw": optim.AdamW, "sgd": optim.SGD, "rmsprop": optim.RMSprop}


def options(name: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every demo has."""
    parser = argparse.ArgumentParser(
        prog=f"python -m demos {name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=natural, default=0, help="same seed, same numbers (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no table")
    return parser


def training_options(parser: argparse.ArgumentParser, epochs: int, batch_size: int, lr: float) -> None:
    """Add the options of a demo that trains networks and writes what came of it."""
    parser.add_argument("--epochs", type=positive, default=epochs, help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=positive, default=batch_size, help="(default: %(default)s)")
    parser.add_argument("--lr", type=rate, default=lr, help="learning rate (default: %(default)s)")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adam", help="(default: %(default)s)")
    parser.add_argument("--data", default="mnist5k", help="mnist5k, or a folder of IDX files (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="where to write (default: runs/NAME/DATE-TIME)")
    parser.add_argument("--no-plot", action="store_true", help="write no figure")


def positive(text: str) -> int:
    """An integer of at least 1, for argparse."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"has to be at least 1; got {text}")
    return value


def natural(text: str) -> int:
    """An integer of at least 0, for argparse."""
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"has to be at least 0; got {text}")
    return value


def rate(text: str) -> float:
    """A number greater than 0, for argparse."""
    if not 0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"has to be greater than 0; got {text}")
    return value


def output_folder(name: str, out: Path | None) -> Path:
    """`out`, or a new folder runs/NAME/DATE-TIME: one run never overwrites another unless told to."""
    folder = out or Path("runs") / name / datetime.now().strftime("%Y-%m-%d-%H%M%S-%f")[:-3]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"cannot write to {folder}: {error}")
    return folder
