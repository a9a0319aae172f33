"""What training reports: the metrics of each epoch."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from tinygrad_bn.arguments import shown
from tinygrad_bn.files import replacing


@dataclass(frozen=True)
class Epoch:
    """Metrics of one epoch; `seconds` is its wall time, validation included.

    `loss` and `accuracy` are means over the epoch's samples, taken during training in training mode, as in Keras.
    `val_loss` and `val_accuracy` are taken after the epoch in evaluation mode; NaN without validation data.
    """

    epoch: int
    loss: float
    accuracy: float
    val_loss: float
    val_accuracy: float
    seconds: float


def sign_of(monitor: Any) -> int:
    """1 for a column that is best at its least, a loss; −1 for an accuracy. Raises ValueError for any other."""
    metrics = [f.name for f in fields(Epoch) if f.name.endswith(("loss", "accuracy"))]
    if monitor not in metrics:
        raise ValueError(f"monitor is one of {', '.join(metrics)}; got {shown(monitor)}")
    return -1 if monitor.endswith("accuracy") else 1


@dataclass
class History:
    """The result of `fit`.

    `epochs` are the completed ones. `interrupted`: whether Ctrl-C ended the training. `skipped`: batches that changed
    nothing, because their loss or gradients were not finite. `diverged`: the step at which `nonfinite="restore"` ended
    the training, in words, or "". `stopped`: why a callback ended it, or "".
    """

    epochs: list[Epoch] = field(default_factory=list)
    interrupted: bool = False
    skipped: int = 0
    diverged: str = ""
    stopped: str = ""

    def __getitem__(self, column: str) -> list[float]:
        """One column, such as `history["val_accuracy"]`. Raises KeyError for an unknown name."""
        if column not in (names := [f.name for f in fields(Epoch)]):
            raise KeyError(f"no column {column!r}; the columns are {', '.join(names)}")
        return [getattr(e, column) for e in self.epochs]

    def __len__(self) -> int:
        return len(self.epochs)

    @property
    def ended(self) -> bool:
        """Whether the training ended before its last epoch, for good."""
        return bool(self.stopped or self.diverged)

    @property
    def seconds(self) -> float:
        """Wall time of all epochs."""
        return sum(e.seconds for e in self.epochs)

    def rows(self) -> list[dict[str, Any]]:
        """The epochs as dictionaries. NaN and Inf become None: JSON has no such numbers."""
        return [{k: v if math.isfinite(v) else None for k, v in asdict(e).items()} for e in self.epochs]

    def save(self, path: str | Path) -> None:
        """Write the epochs to a `.json` or `.csv` file. Raises ValueError for another suffix."""
        path = Path(path)
        if path.suffix == ".json":
            ending = {
                "interrupted": self.interrupted,
                "skipped": self.skipped,
                "diverged": self.diverged,
                "stopped": self.stopped,
            }
            text = json.dumps({**ending, "epochs": self.rows()}, indent=1)
            with replacing(path) as beside:
                beside.write_text(text)
        elif path.suffix == ".csv":
            with replacing(path) as beside, beside.open("w", newline="") as file:
                writer = csv.DictWriter(file, [f.name for f in fields(Epoch)])
                writer.writeheader()
                writer.writerows(self.rows())
        else:
            raise ValueError(f"history can be saved as .json or .csv, not as {path.name!r}")
