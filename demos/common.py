"""Code shared by the demos: one run, its data, its trainings, its claims and its files."""

import json
import math
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from rich.console import Console, RenderableType
from rich.progress import track

from tinygrad_bn import cuda, datasets, nn, train, viz
from tinygrad_bn.files import replacing
from tinygrad_bn.train.interval import interval

from .environment import environment
from .options import OPTIMIZERS, parser, spelled
from .output import finite, table
from .settings import as_toml, read_settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODELS = {"without BatchNorm": False, "with BatchNorm": True}

CHECKPOINTS = "checkpoints"  # a folder of a run that is not finished

SEEDS = 10  # at least so many that something is claimed about them

LEARNED = 0.6  # an accuracy that shows that a network learned something

Item = TypeVar("Item")
Result = TypeVar("Result")


class Run:
    """One run of a demo: its options, data, results and files.

    Args:
        name: name of the demo's module.
        doc: docstring of the module; its first line is the title.
        argv: command-line arguments; the default is `sys.argv[1:]`.
        check: defaults that replace `defaults` under `--check`, for a quick run in which the claims still hold.
        own: options of this demo alone: `{"--flag": keywords of argparse's add_argument}`.
        defaults: of the options `epochs`, `batch_size`, `lr`, `optimizer`, `data`, `seeds`; the demo has only those
            named here.
    """

    def __init__(
        self,
        name: str,
        doc: str | None,
        argv: Sequence[str] | None = None,
        check: Mapping[str, Any] | None = None,
        own: Mapping[str, Mapping[str, Any]] | None = None,
        **defaults: Any,
    ) -> None:
        self.name, (self.title, *text) = name, (doc or "").splitlines()
        self.text = " ".join(text).strip()
        self.parser = parser(name, doc, defaults)
        for flag, keywords in (own or {}).items():
            self.parser.add_argument(flag, **keywords)
        argv = spelled(sys.argv[1:] if argv is None else argv)
        given = read_settings(self.parser, argv, name)
        if "--check" in argv or given.get("check"):
            self.parser.set_defaults(**(check or {}))
        self.parser.set_defaults(**given)
        self.args = self.parser.parse_args(argv)
        if self.args.resume is not None:
            self.args.out = self._interrupted_run(self.args.resume)
        self._command = shlex.join(["python", "-m", str(__package__), name, *map(str.strip, argv)])
        if getattr(self.args, "device", "cpu") == "cuda" and not cuda.is_available():
            self.parser.error(cuda.info()["reason"])
        if self.args.check and getattr(self.args, "seeds", SEEDS) < SEEDS:
            self.parser.error(f"--check needs at least {SEEDS} seeds: a claim is a statement about so many")
        self.console = Console(quiet=self.args.quiet)
        self.histories: dict[str, train.History] = {}
        self.results: dict[str, Any] = {}
        self.claims: dict[str, bool] = {}
        self.files: list[Path] = []
        self.interrupted = False
        self._failures: list[str] = []  # files that could not be written
        self._report: list[RenderableType] = []
        self._bar = False  # whether a progress bar of `each` is shown
        self._started = time.perf_counter()
        self._folder: Path | None = None
        self._trainings = 0  # begun so far

    def _interrupted_run(self, folder: Path) -> Path:
        """The folder, or exit: of a run that is finished."""
        try:
            finished = not json.loads((folder / "results.json").read_text(encoding="utf-8"))["interrupted"]
        except (OSError, ValueError, KeyError, TypeError):  # also half a file
            finished = False
        if finished:
            self.parser.error(f"the run in {folder} is finished")
        return folder

    @property
    def code(self) -> int:
        """The exit status: 130 after Ctrl-C; 1 if a file is not written or, under `--check`, a claim fails; else 0."""
        if self.interrupted:
            return 130
        return int(bool(self._failures) or (self.args.check and not (self.claims and all(self.claims.values()))))

    @property
    def seeds(self) -> range:
        """The seeds: `--seeds` of them from `--seed` on."""
        return range(self.args.seed, self.args.seed + self.args.seeds)

    def load(self, part: str = "train") -> datasets.Dataset:
        """Load the data set named by `--data`; exit with an error message if that fails."""
        try:
            return datasets.load(self.args.data, part=part)
        except ValueError as error:  # also DataError
            self.parser.error(str(error))

    def images(self, check: int | None = None) -> tuple[datasets.Dataset, datasets.Dataset]:
        """Training and validation images, (N, 28, 28) in [0, 1]; for `mnist5k` 4,000 and 1,000.

        Under `--check`, the first `check` training images.
        """
        training = self.load()
        if training.x.shape[1:] != (28, 28) or len(training.classes) > 10:
            self.parser.error(
                f"the network takes 28 × 28 images of at most 10 classes, as in mnist5k, mnist and fashion_mnist; got "
                f"{training!r}"
            )
        if self.args.data == "mnist5k":
            training, validation = training.split(1000, seed=self.args.seed)
        else:
            validation = self.load("test")
        if self.args.check and check:
            training = training.take(np.arange(min(check, len(training))))
        self.console.print(f"{training!r}\n{len(training):,} training images, {len(validation):,} validation images")
        return training.scaled(), validation.scaled()

    def each(self, work: Callable[[Item], Result], items: Iterable[Item], bar: str = "") -> list[Result]:
        """`work(item)` for every item, in order; `bar` labels a progress bar.

        After Ctrl-C, the results of the finished items, if there are any: a network is compared with another only if
        both were trained to the end. Otherwise the epochs so far become CSV files, and KeyboardInterrupt is raised.
        """
        results: list[Result] = []
        self._bar, items = bool(bar), list(items)
        try:
            for item in track(items, bar, disable=self.args.quiet, console=self.console) if bar else items:
                with np.errstate(over="ignore", invalid="ignore"):  # a network that diverges overflows
                    results.append(work(item))
        except KeyboardInterrupt:
            self.interrupted = True
            if not results:
                for name, history in self.histories.items():
                    if len(history):
                        history.save(path := self.path(re.sub(r"\W+", "_", name) + ".csv"))
                        self.console.print(f"wrote {path}", soft_wrap=True)
                raise
            self.print(f"interrupted: results of {len(results)} of {len(items)} trainings", self._advice)
        self._bar = False
        return results

    def expect_batches(self, samples: int, size: int, drop_last: bool = False) -> None:
        """Exit before a training that would fail: without a batch, with a batch of one, or without a folder for it."""
        if drop_last and samples < size:
            self.parser.error(f"{samples:,} samples do not fill a batch of {size}")
        if size == 1 or (samples % size == 1 and not drop_last):
            self.parser.error(f"{samples:,} samples in batches of {size} leave a batch of one for BatchNorm")
        _ = self.folder

    def fit(
        self,
        model: nn.Module,
        training: train.Data,
        validation: train.Data | None = None,
        name: str = "training",
        **options: Any,
    ) -> train.History:
        """Run `train.fit` with the command-line options, store `histories[name]`, move the model back to the CPU.

        `options` replace those of the command line. There is a checkpoint every ten seconds or less often, and at the
        end; after `--resume` a training goes on from there. Raises KeyboardInterrupt after Ctrl-C, with the history
        stored.
        """
        args = self.args
        settings = {
            "validation": validation, "epochs": args.epochs, "batch_size": args.batch_size, "seed": args.seed,
            "device": args.device, "progress": not (args.quiet or self._bar), "description": name,
            "nonfinite": "ignore",  # a demo shows what becomes of a network that overflows
        }  # fmt: skip
        if "optimizer" not in options:
            settings["optimizer"] = OPTIMIZERS[args.optimizer](model.parameters(), lr=args.lr)
        settings |= options
        samples = len(training if isinstance(training, datasets.Dataset) else training[0])
        self.expect_batches(samples, settings["batch_size"], settings.get("drop_last", False))
        checkpoint = train.ModelCheckpoint(
            self._next_checkpoint(), every=1, min_seconds=10, best=False, keep=1, advice=self._advice
        )  # fmt: skip
        history = self.histories[name] = train.fit(model, training, **settings, checkpoint=checkpoint, resume=True)
        model.to("cpu")
        if history.interrupted:
            raise KeyboardInterrupt
        return history

    def once(self, work: Callable[..., np.ndarray], *args: Any) -> np.ndarray:
        """The array that `work(*args)` gives; after `--resume`, the one that it gave before."""
        path = self._next_checkpoint().with_suffix(".npy")
        if not path.exists():
            array = work(*args)
            path.parent.mkdir(exist_ok=True)
            with replacing(path) as beside, beside.open("wb") as file:
                np.save(file, array)
        return np.asarray(np.load(path))

    def _next_checkpoint(self) -> Path:
        """Where the next training has its checkpoints. The order of trainings depends on the options alone."""
        self._trainings += 1
        return self.folder / CHECKPOINTS / f"{self._trainings:03}"

    @property
    def _advice(self) -> str:
        return f"to go on: python -m {__package__} {self.name} --resume {shlex.quote(str(self.folder))}"

    @property
    def folder(self) -> Path:
        """`--out`, or a new folder runs/NAME/DATE-TIME, so that no run overwrites another.

        It begins with config.toml and environment.json.
        """
        if self._folder is None:
            date = datetime.now().strftime("%Y-%m-%d-%H%M%S-%f")[:-3]
            folder = self.args.out or Path("runs") / self.name / date
            try:
                folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
            except OSError as error:
                sys.exit(f"cannot write to {folder}: {error.strerror}")
            self._folder = folder
            if self.args.resume is None and (folder / CHECKPOINTS).exists():
                sys.exit(f"{folder} has a run that was interrupted: --resume {folder} goes on; or give another --out")
            about = environment(self._command, getattr(self.args, "device", "cpu") == "cuda")
            self._write_text("config.toml", as_toml({"demo": self.name, **vars(self.args)}))
            self._write_text("environment.json", json.dumps(about, indent=1))
        return self._folder

    def path(self, filename: str) -> Path:
        """The path of a new output file."""
        self.files.append(self.folder / filename)
        return self.files[-1]

    def write(self, filename: str, make: Callable[[Path], Any]) -> None:
        """Write an output file by `make(path)`. If that fails, the run goes on, and `finish` prints the error."""
        try:
            with replacing(path := self.folder / filename) as beside:
                make(beside)
            self.files.append(path)
        except OSError as error:
            self._failures.append(f"cannot write {path}: {error.strerror or error}")

    def _write_text(self, filename: str, text: str) -> None:
        self.write(filename, lambda path: path.write_text(text, encoding="utf-8"))

    def save(self, figure: "Figure", name: str) -> None:
        """Write a figure as PNG, unless `--no-plot`."""
        if not self.args.no_plot:
            self.write(f"{name}.png", lambda path: viz.save(figure, path))

    def claim(self, statement: str, holds: bool | np.bool) -> None:
        """Record an expected result and whether it holds. For results of trainings see `claim_mean`."""
        self.claims[statement] = bool(holds)

    def claim_mean(
        self,
        statement: str,
        values: Sequence[float] | np.ndarray,
        above: float = -math.inf,
        below: float = math.inf,
        learned: Iterable[np.ndarray] = (),
    ) -> None:
        """Claim that the 95 % interval of the mean lies between two bounds; `values` has one per seed.

        A claim that networks are equal needs their accuracies as `learned`: two that learn nothing are equal too. It
        does not hold unless the mean of each is above `LEARNED`.

        Of fewer than `SEEDS` seeds, and of an interrupted run, nothing is claimed.
        """
        if len(values) >= SEEDS and not self.interrupted:
            mean = interval(values)
            within = above < mean.low and mean.high < below
            lowest = min((float(np.mean(accuracy)) for accuracy in learned), default=1.0)
            failed = "" if lowest > LEARNED else f", but one learned to an accuracy of {lowest:.3f} only"
            self.claim(f"{statement}: {mean}{failed} ({len(values)} seeds)", within and not failed)

    def print(self, *parts: RenderableType) -> None:
        """Print text or tables at the end of the run, after the files are written."""
        self._report += parts

    def table(
        self, head: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", caption: str = ""
    ) -> RenderableType:
        """A table for `print`; see `demos.output.table`."""
        return table(self.console, head, rows, title, caption)

    def finish(self, **results: Any) -> "Run":
        """Write results.json with settings, claims and `results`, then print the report and which claims hold.

        A demo that only prints writes results.json only with `--out`.
        """
        self.results = results
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(self.args).items()}
        figures = [path.name for path in self.files if path.suffix == ".png"]
        seconds = time.perf_counter() - self._started
        content = {"demo": self.name, "title": self.title, "text": self.text, "seconds": round(seconds, 1)}
        content |= {"settings": settings, "interrupted": self.interrupted, "claims": self.claims}
        content |= {"figures": figures, "results": results}
        text = json.dumps(finite(content), indent=1, allow_nan=False)
        if self._folder or self.args.out:
            self._write_text("results.json", text)
        if self._folder and not self.interrupted:
            remove_checkpoints(self._folder)
        for part in self._report:
            self.console.print(part, highlight=False, markup=False)
        verdict = Console(highlight=False)
        for statement, holds in self.claims.items():
            verdict.print("[green]✓[/]" if holds else "[red]✗[/]", statement)
        if getattr(self.args, "seeds", SEEDS) < SEEDS:
            self.console.print(f"Fewer than {SEEDS} seeds: nothing is claimed about trainings.")
        for path in self.files:
            self.console.print(f"wrote {path}", soft_wrap=True)
        self.console.print(f"total time: {seconds:.1f} s")
        for failure in self._failures:
            print(failure, file=sys.stderr)
        return self


def remove_checkpoints(folder: Path) -> None:
    """Remove what `Run.fit` and `Run.once` wrote into the folder of a run, and nothing else."""
    for path in (folder / CHECKPOINTS).glob("[0-9][0-9][0-9]*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    with suppress(OSError):  # something else is there, or nothing
        (folder / CHECKPOINTS).rmdir()


def recalibrate(model: nn.Module, data: train.Data) -> None:
    """`train.recalibrate`; a network that has overflowed keeps its running statistics."""
    with suppress(ValueError):
        train.recalibrate(model, data)
