"""What the tests of training share."""

import numpy as np

from tinygrad_bn import manual_seed, nn
from tinygrad_bn.train import History

QUIET = {"progress": False}


def network(batch_norm: bool = True, seed: int = 0) -> nn.Sequential:
    manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 16), *([nn.BatchNorm1d(16)] if batch_norm else []), nn.ReLU(), nn.Linear(16, 3))


def state(model: nn.Module) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in model.state_dict().items()}


def samples(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 4)).astype(np.float32), rng.integers(0, 3, n)


def by_hand(model: nn.Sequential, x: np.ndarray, y: np.ndarray, by_batch: bool = False) -> tuple[float, float]:
    """Mean loss and accuracy of `network`, normalised by running statistics or those of x."""
    w1, b1, gamma, beta, mean, var, _, w2, b2 = model.state_dict().values()
    h = x @ w1.T + b1
    mean, var = (h.mean(0), h.var(0)) if by_batch else (mean, var)
    z = np.maximum((h - mean) / np.sqrt(var + 1e-5) * gamma + beta, 0) @ w2.T + b2
    return np.mean(np.log(np.exp(z).sum(1)) - z[np.arange(len(y)), y]), np.mean(z.argmax(1) == y)


def timeless(history: History) -> list[tuple[float, ...]]:
    return [(e.epoch, e.loss, e.accuracy, e.val_loss, e.val_accuracy) for e in history.epochs]
