"""The statistics that normalised each batch, collected from the BatchNorm layers of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from tinygrad_bn.backend import Array, to_numpy
from tinygrad_bn.modes import Block, attributes_as_before
from tinygrad_bn.nn.batch_norm import BATCH_NORMS, BatchNorm1d
from tinygrad_bn.nn.module import Module


class BatchStatistics(NamedTuple):
    """Mean and biased variance of a batch, float64 (C,), and the number of values of each channel."""

    mean: Array
    var: Array
    size: int


def batch_statistics(model: Module) -> Block[dict[BatchNorm1d, list[BatchStatistics]]]:
    """Evaluation mode for this block, but BatchNorm normalises by the batch; the running statistics do not change.

    `with … as` gives a list for each BatchNorm layer with running statistics; each batch appends its statistics. The
    list of a frozen layer stays empty. Dropout is off. Afterwards every module is in its former mode.

    >>> bn = BatchNorm1d(1)
    >>> with batch_statistics(bn) as collected:
    ...     y = bn([[1.0], [3.0]])
    >>> [(s.mean.item(), s.var.item(), s.size) for s in collected[bn]], bn.running_mean.item()
    ([(2.0, 1.0, 2)], 0.0)
    """

    def prepare() -> tuple[Callable[[], object], Callable[[], dict[BatchNorm1d, list[BatchStatistics]]]]:
        modules = list(model.modules())
        layers = [m for m in modules if isinstance(m, BATCH_NORMS) and m.track_running_stats]
        changed = [(m, "training") for m in modules] + [(layer, "_collect") for layer in layers]
        return attributes_as_before(changed), lambda: _collecting(model, layers)

    return Block(prepare)


def _collecting(model: Module, layers: Iterable[Any]) -> dict[BatchNorm1d, list[BatchStatistics]]:
    model.eval()
    collected: dict[BatchNorm1d, list[BatchStatistics]] = {layer: [] for layer in layers}
    for layer, batches in collected.items():
        layer.training, layer._collect = True, _appender(batches)
    return collected


def _appender(batches: list[BatchStatistics]) -> Callable[[Any, Any, int], None]:
    return lambda mean, var, size: batches.append(BatchStatistics(to_numpy(mean), to_numpy(var), size))
