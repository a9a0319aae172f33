"""Code shared by the demos: command-line options, data, output files."""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import track

from tinygrad_bn import cuda, datasets, nn, optim, train, viz

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OPTIMIZERS = {"adam": optim.Adam, "adamw": optim.AdamW, "sgd": optim.SGD, "rmsprop": optim.RMSprop}
MODELS = {"without BatchNorm": False, "with BatchNorm": True}

Item = TypeVar("Item")


class Run:
    """One run of a demo: its options, data, printed results and files.

    Args:
        name: name of the demo's module.
        doc: docstring of the module; its first line is the title.
        argv: command-line arguments; the default is `sys.argv[1:]`.
        check: defaults that replace `defaults` under `--check`, for a quick run in which the claims still hold.
        defaults: of the options `epochs`, `batch_size`, `lr`, `optimizer`, `data`, `seeds`; the demo has only those
            named here.
    """

    def __init__(
        self,
        name: str,
        doc: str | None,
        argv: Sequence[str] | None = None,
        check: Mapping[str, Any] | None = None,
        **defaults: Any,
    ) -> None:
        self.name, (self.title, *text) = name, (doc or "").splitlines()
        self.text = " ".join(text).strip()
        self.parser = _parser(name, doc, defaults)
        argv = sys.argv[1:] if argv is None else argv
        if "--check" in argv:
            self.parser.set_defaults(**(check or {}))
        self.args = self.parser.parse_args(argv)
        if getattr(self.args, "device", "cpu") == "cuda" and not cuda.is_available():
            self.parser.error(cuda.info()["reason"])
        self.console = Console(quiet=self.args.quiet)
        self.histories: dict[str, train.History] = {}
        self.results: dict[str, Any] = {}
        self.claims: dict[str, bool] = {}
        self.files: list[Path] = []
        self._started = time.perf_counter()
        self._folder: Path | None = None

    @property
    def code(self) -> int:
        """The exit status: 1 if, under `--check`, a claim does not hold or there are no claims; otherwise 0."""
        return int(self.args.check and not (self.claims and all(self.claims.values())))

    def load(self, part: str = "train") -> datasets.Dataset:
        """Load the data set named by `--data`; exit with an error message if that fails."""
        try:
            return datasets.load(self.args.data, part=part)
        except ValueError as error:  # also DataError
            self.parser.error(str(error))

    def images(self) -> tuple[datasets.Dataset, datasets.Dataset]:
        """Training and validation images, (N, 28, 28) in [0, 1]; for `mnist5k` 4,000 and 1,000."""
        if self.args.data == "mnist5k":
            training, validation = self.load().split(1000, seed=self.args.seed)
        else:
            training, validation = self.load("train"), self.load("test")
        for part in (training, validation):
            if part.x.shape[1:] != (28, 28) or len(part.classes) > 10:
                self.parser.error(f"the network takes 28 × 28 images of at most 10 classes; got {part!r}")
        self.console.print(f"{training!r}\n{len(training):,} training images, {len(validation):,} validation images")
        return training.scaled(), validation.scaled()

    def fit(
        self,
        model: nn.Module,
        training: train.Data,
        validation: train.Data | None = None,
        name: str = "training",
        **options: Any,
    ) -> train.History:
        """Run `train.fit` with the command-line options, store `histories[name]`, move the model back to the CPU.

        `options` replace those of the command line. Raises KeyboardInterrupt after Ctrl-C, with the history stored.
        """
        args = self.args
        settings = {
            "validation": validation, "epochs": args.epochs, "batch_size": args.batch_size, "seed": args.seed,
            "device": args.device, "progress": not args.quiet, "description": name,
        }  # fmt: skip
        if "optimizer" not in options:
            settings["optimizer"] = OPTIMIZERS[args.optimizer](model.parameters(), lr=args.lr)
        settings |= options
        samples, size = len(training if isinstance(training, datasets.Dataset) else training[0]), settings["batch_size"]
        if size == 1 or (samples % size == 1 and not settings.get("drop_last")):
            self.parser.error(f"{samples:,} samples in batches of {size} leave a batch of one for BatchNorm")
        _ = self.folder  # fail before the training if the folder is not writable
        history = self.histories[name] = train.fit(model, training, **settings)
        model.to("cpu")
        if history.interrupted:
            raise KeyboardInterrupt
        return history

    def track(self, items: Iterable[Item], description: str) -> Iterable[Item]:
        """Iterate over the items with a progress bar."""
        _ = self.folder  # as in fit
        return track(list(items), description, disable=self.args.quiet, console=self.console)

    @property
    def folder(self) -> Path:
        """`--out`, or a new folder runs/NAME/DATE-TIME, so that no run overwrites another."""
        if self._folder is None:
            date = datetime.now().strftime("%Y-%m-%d-%H%M%S-%f")[:-3]
            self._folder = self.args.out or Path("runs") / self.name / date
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                sys.exit(f"cannot write to {self._folder}: {error}")
        return self._folder

    def path(self, filename: str) -> Path:
        """The path of a new output file."""
        self.files.append(self.folder / filename)
        return self.files[-1]

    def save(self, figure: "Figure", name: str) -> None:
        """Write a figure as PNG, unless `--no-plot`."""
        if not self.args.no_plot:
            viz.save(figure, self.path(f"{name}.png"))

    def claim(self, statement: str, holds: bool | np.bool) -> None:
        """Record an expected result and whether it holds."""
        self.claims[statement] = bool(holds)

    def finish(self, **results: Any) -> "Run":
        """Print which claims hold; write results.json with settings, claims and `results`.

        A demo that only prints writes results.json only with `--out`.
        """
        self.results = results
        for statement, holds in self.claims.items():
            mark = "[green]✓[/]" if holds else "[red]✗[/]"
            self.console.print(f"{mark} {statement}", highlight=False)
        if self._folder is None and self.args.out is None:
            return self
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(self.args).items()}
        seconds = time.perf_counter() - self._started
        content = {
            "demo": self.name,
            "title": self.title,
            "text": self.text,
            "seconds": round(seconds, 1),
            "settings": settings,
        }
        figures = [path.name for path in self.files if path.suffix == ".png"]
        content |= {"claims": self.claims, "figures": figures, "results": results}
        self.path("results.json").write_text(json.dumps(_finite(content), indent=1, allow_nan=False))
        for path in self.files:
            self.console.print(f"wrote {path}", soft_wrap=True)
        self.console.print(f"total time: {seconds:.1f} s")
        return self


def _finite(content: Any) -> Any:
    """Replace NaN and Inf by None: JSON has no such numbers."""
    if isinstance(content, Mapping):
        return {k: _finite(v) for k, v in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(v) for v in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _parser(name: str, doc: str | None, defaults: Mapping[str, Any]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m demos {name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shared: dict[str, tuple[Any, str]] = {
        "epochs": (positive, "passes over the training data"),
        "batch_size": (positive, "samples per batch"),
        "lr": (rate, "learning rate"),
        "seeds": (positive, "number of runs to average"),
        "data": (str, "name of a data set, or a folder of IDX files"),
    }
    for option, (convert, text) in shared.items():
        if option in defaults:
            text = f"{text} (default: {defaults[option]})"
            parser.add_argument(f"--{option.replace('_', '-')}", type=convert, default=defaults[option], help=text)
    if "epochs" in defaults:
        parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="training device (default: cpu)")
    if "optimizer" in defaults:
        text = f"(default: {defaults['optimizer']})"
        parser.add_argument("--optimizer", choices=OPTIMIZERS, default=defaults["optimizer"], help=text)
    parser.add_argument("--seed", type=natural, default=0, help="the same seed gives the same numbers (default: 0)")
    parser.add_argument("--out", type=Path, help="output folder (default: runs/NAME/DATE-TIME)")
    parser.add_argument("--no-plot", action="store_true", help="write no figures")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no tables")
    parser.add_argument("--check", action="store_true", help="a quick run that fails if a claim does not hold")
    return parser


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
