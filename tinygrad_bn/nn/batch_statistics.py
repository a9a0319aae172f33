"""The statistics that normalised each batch, collected from the BatchNorm layers of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from tinygrad_bn.backend import Array, to_numpy
from tinygrad_bn.nn.batch_norm import BATCH_NORMS, BatchNorm1d
from tinygrad_bn.nn.module import Module, evaluating


class BatchStatistics(NamedTuple):
    """Mean and biased variance of a batch, float64 (C,), and the number of values of each channel."""

    mean: Array
    var: Array
    size: int


@contextmanager
def batch_statistics(model: Module) -> Iterator[dict[BatchNorm1d, list[BatchStatistics]]]:
    """Evaluation mode for this block, but BatchNorm normalises by the batch; the running statistics do not change.

    Yields a list for each BatchNorm layer with running statistics; each batch appends its statistics. The list of a
    frozen layer stays empty. Dropout is off. Afterwards every module is in its former mode.

    >>> bn = BatchNorm1d(1)
    >>> with batch_statistics(bn) as collected:
    ...     y = bn([[1.0], [3.0]])
    >>> [(s.mean.item(), s.var.item(), s.size) for s in collected[bn]], bn.running_mean.item()
    ([(2.0, 1.0, 2)], 0.0)
    """
    layers = [m for m in model.modules() if isinstance(m, BATCH_NORMS) and m.track_running_stats]
    former = [layer._collect for layer in layers]  # of a block around this one
    collected: dict[Any, list[BatchStatistics]] = {layer: [] for layer in layers}
    with evaluating(model):
        try:  # from here on: Ctrl-C may come at any moment
            for layer, batches in collected.items():
                layer.training, layer._collect = True, _appender(batches)
            yield collected
        finally:
            for layer, collect in zip(layers, former, strict=True):
                layer._collect = collect


def _appender(batches: list[BatchStatistics]) -> Callable[[Any, Any, int], None]:
    return lambda mean, var, size: batches.append(BatchStatistics(to_numpy(mean), to_numpy(var), size))
