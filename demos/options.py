"""The command-line options of the demos."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinygrad_bn import optim

OPTIMIZERS = {"adam": optim.Adam, "adamw": optim.AdamW, "sgd": optim.SGD, "rmsprop": optim.RMSprop}


def positive(text: str) -> int:
    """An integer of at least 1, for argparse."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"has to be at least 1; got {text.strip()}")
    return value


def natural(text: str) -> int:
    """An integer of at least 0, for argparse."""
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"has to be at least 0; got {text.strip()}")
    return value


def rate(text: str) -> float:
    """A number greater than 0, for argparse."""
    if not 0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"has to be greater than 0; got {text.strip()}")
    return value


SHARED: dict[str, tuple[Callable[[str], Any], str]] = {
    "epochs": (positive, "passes over the training data"),
    "batch_size": (positive, "samples per batch"),
    "lr": (rate, "learning rate"),
    "seeds": (positive, "number of runs, each with a seed of its own; claims need at least 10"),
    "data": (str, "name of a data set, or a folder of IDX files"),
}


def spelled(arguments: Sequence[str]) -> list[str]:
    """The arguments for argparse, which takes -1e-3 and -inf for options; after a space it does not."""
    return [f" {text}" if text.startswith("-") and _is_number(text) else text for text in arguments]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def parser(name: str, doc: str | None, defaults: Mapping[str, Any]) -> argparse.ArgumentParser:
    """The options that all demos have, and those of `SHARED` named in `defaults`."""
    out = argparse.ArgumentParser(
        prog=f"python -m {__package__} {name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for option, (convert, text) in SHARED.items():
        if option in defaults:
            text = f"{text} (default: {defaults[option]})"
            out.add_argument(f"--{option.replace('_', '-')}", type=convert, default=defaults[option], help=text)
    if "epochs" in defaults:
        out.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="training device (default: cpu)")
    if "optimizer" in defaults:
        text = f"(default: {defaults['optimizer']})"
        out.add_argument("--optimizer", choices=OPTIMIZERS, default=defaults["optimizer"], help=text)
    out.add_argument("--seed", type=natural, default=0, help="the first seed; it fixes all numbers (default: 0)")
    out.add_argument("--config", type=Path, help="file of options, such as config.toml of another run")
    out.add_argument("--resume", type=Path, metavar="FOLDER", help="go on with an interrupted run: its output folder")
    out.add_argument("--out", type=Path, help="output folder (default: runs/NAME/DATE-TIME)")
    out.add_argument("--no-plot", action="store_true", help="write no figures")
    out.add_argument("--quiet", action="store_true", help="print only which claims hold")
    out.add_argument("--check", action="store_true", help="a quick run that fails if a claim does not hold")
    return out
