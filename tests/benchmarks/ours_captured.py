"""The training steps of the speed table by this package, captured as in `train.fit`: see `ours`."""

from tests.benchmarks import ours


def mlp_step(sizes: list[int], batch: int) -> ours.Work:
    """Forward, cross-entropy, backward and Adam."""
    return ours.mlp_step(sizes, batch, captured=True)


def cnn_step(batch: int) -> ours.Work:
    """Forward, cross-entropy, backward and Adam."""
    return ours.cnn_step(batch, captured=True)
