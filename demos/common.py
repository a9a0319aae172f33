"""What the demos share: their options, and the folder they write to."""

import argparse
import sys
from datetime import datetime
from pathlib import Path


def options(name: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every demo has."""
    parser = argparse.ArgumentParser(
        prog=f"python -m demos {name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="same seed, same numbers (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no table")
    return parser


def positive(text: str) -> int:
    """An integer of at least 1, for argparse."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"has to be at least 1; got {text}")
    return value


def output_folder(name: str, out: Path | None) -> Path:
    """`out`, or a new folder runs/NAME/DATE-TIME: one run never overwrites another unless told to."""
    folder = out or Path("runs") / name / datetime.now().strftime("%Y-%m-%d-%H%M%S-%f")[:-3]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"cannot write to {folder}: {error}")
    return folder
