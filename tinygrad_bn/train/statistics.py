"""BatchNorm's statistics after training: compared with those of the batches, and computed again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tinygrad_bn import functional as F
from tinygrad_bn import nn
from tinygrad_bn.arguments import expect_integer, full_name
from tinygrad_bn.backend import Array
from tinygrad_bn.datasets import Dataset, expect_arrays
from tinygrad_bn.modes import no_grad
from tinygrad_bn.train.scores import Data, Loss, Score, arrays_of, expect_model, score


class Gap(NamedTuple):
    """Scores of the same samples with batch statistics and with running statistics."""

    batch: Score
    running: Score


def statistics_gap(model: nn.Module, data: Data, *, loss: Loss = F.cross_entropy, batch_size: int = 32) -> Gap:
    """Scores of `data`, normalised by batch statistics and by BatchNorm's running statistics.

    Nothing else differs: dropout is off in both, and the model's state and modes do not change. A large gap means
    that the running statistics do not match the data: the batches were too small or too few, or the training data
    were different. `recalibrate` corrects this.

    Args:
        model, data, loss: as for `fit`.
        batch_size: samples per batch, as in training. The data are split into equal batches of at least this size.

    Raises:
        ValueError: no samples, a `batch_size` below 1, or batches with one value per channel.
    """
    expect_model(model, loss)
    x, y = arrays_of(data)
    batches = [(x[chosen], y[chosen]) for chosen in _split(len(x), batch_size)]
    with nn.batch_statistics(model):
        batch = score(model, batches, loss)
    with nn.evaluating(model):
        return Gap(batch, score(model, batches, loss))


def recalibrate(model: nn.Module, data: Data | Array, *, batch_size: int = 1000) -> None:
    """Set BatchNorm's running statistics to those of `data`; every value has equal weight, momentum is not used.

    Each layer gets the mean and variance of all its inputs while batch statistics normalise. The variance is the one
    within the batches plus the one of their means (PreciseBN, Wu & Johnson 2021; PyTorch's `update_bn` omits the
    second term, so small batches give too small a variance). Dropout is off, as in evaluation. Parameters and frozen
    layers do not change. On an error nothing changes.

    Args:
        model: any module; without BatchNorm nothing happens.
        data: usually the training data: samples, or samples and targets. Targets are not used.
        batch_size: samples per batch. The data are split in a fixed random order into equal batches of at least
            this size.

    Raises:
        ValueError: no samples, a `batch_size` below 1, batches with one value per channel, or statistics that are
            not finite.
        TypeError: the data are of another type.
    """
    expect_model(model)
    if not isinstance(data, np.ndarray | Dataset | tuple):
        raise TypeError(
            f"data has to be a Dataset or a pair of arrays (x, y), or an array x alone; got {full_name(data)}"
        )
    x = data if isinstance(data, np.ndarray) else arrays_of(data)[0]
    expect_arrays(x)
    with nn.batch_statistics(model) as collected, no_grad():
        for chosen in _split(len(x), batch_size):
            model(x[chosen])
    new = {}
    for layer, batches in collected.items():
        if batches:  # empty if the model does not use this layer
            values = (*_pooled(batches, layer.running_var_correction), len(batches))
            for buffer, value in zip(layer.buffers(), values, strict=True):
                new[buffer] = np.asarray(value, buffer.dtype)
                if not np.isfinite(new[buffer]).all():
                    raise ValueError(f"the statistics of the data are not finite in {layer!r}; nothing was changed")
    for buffer, value in new.items():
        buffer.data = value


def _pooled(batches: Sequence[nn.BatchStatistics], correction: int) -> tuple[Array, Array]:
    """Mean and variance (C,) over the values of all batches."""
    means, variances, counts = map(np.array, zip(*batches, strict=True))
    with np.errstate(over="ignore", invalid="ignore"):
        mean = np.average(means, axis=0, weights=counts)
        var = np.average(variances + (means - mean) ** 2, axis=0, weights=counts)
    return mean, var * counts.sum() / (counts.sum() - correction)


def _split(n: int, batch_size: int) -> list[Array]:
    """Indices 0 … n − 1 in a fixed random order, split into equal parts (±1) of at least `batch_size`, or one part."""
    batch_size = expect_integer("batch_size", batch_size, 1)
    if not n:
        raise ValueError("no samples to compute statistics from")
    return np.array_split(np.random.default_rng(0).permutation(n), max(1, n // batch_size))
