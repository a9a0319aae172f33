"""The training loop: `fit`, `evaluate`, `History`, and its callbacks. `find_learning_rate` tries rates, `confusion`
counts which class was taken for which. For BatchNorm: `statistics_gap` compares batch and running statistics,
`recalibrate` recomputes the running statistics."""

from tinygrad_bn.train.callback import Callback, Measure, Training
from tinygrad_bn.train.callbacks import CSVLog, EarlyStopping, TensorBoardLog
from tinygrad_bn.train.history import Epoch, History
from tinygrad_bn.train.loop import fit
from tinygrad_bn.train.rates import RateSearch, find_learning_rate
from tinygrad_bn.train.saving import ModelCheckpoint
from tinygrad_bn.train.scores import Data, Score, confusion, evaluate
from tinygrad_bn.train.statistics import Gap, recalibrate, statistics_gap
from tinygrad_bn.train.steps import NonFiniteError

__all__ = [
    "CSVLog", "Callback", "Data", "EarlyStopping", "Epoch", "Gap", "History", "Measure", "ModelCheckpoint",
    "NonFiniteError", "RateSearch", "Score", "TensorBoardLog", "Training", "confusion", "evaluate",
    "find_learning_rate", "fit", "recalibrate", "statistics_gap",
]  # fmt: skip
