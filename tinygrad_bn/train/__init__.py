"""The training loop: `fit`, `evaluate`, `History`. For BatchNorm: `statistics_gap` compares batch and running
statistics, `recalibrate` recomputes the running statistics."""

from tinygrad_bn.train.history import Epoch, History
from tinygrad_bn.train.loop import NonFiniteError, fit
from tinygrad_bn.train.scores import Data, Score, evaluate
from tinygrad_bn.train.statistics import Gap, recalibrate, statistics_gap

__all__ = [
    "Data", "Epoch", "Gap", "History", "NonFiniteError", "Score", "evaluate", "fit", "recalibrate",
    "statistics_gap",
]  # fmt: skip
