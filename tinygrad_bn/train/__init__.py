"""The training loop: `fit`, `evaluate`, `History`. For BatchNorm: `statistics_gap` compares batch and running
statistics, `recalibrate` recomputes the running statistics."""

from tinygrad_bn.train.callback import Callback, Training
from tinygrad_bn.train.history import Epoch, History
from tinygrad_bn.train.loop import fit
from tinygrad_bn.train.saving import ModelCheckpoint
from tinygrad_bn.train.scores import Data, Score, evaluate
from tinygrad_bn.train.statistics import Gap, recalibrate, statistics_gap
from tinygrad_bn.train.steps import NonFiniteError

__all__ = [
    "Callback", "Data", "Epoch", "Gap", "History", "ModelCheckpoint", "NonFiniteError", "Score", "Training", "evaluate",
    "fit", "recalibrate", "statistics_gap",
]  # fmt: skip
