"""The networks of the speed table, in the terms that this package and PyTorch share."""

from itertools import pairwise
from typing import Any

import numpy as np


def mlp(library: Any, sizes: list[int]) -> Any:
    """Linear layers, with BatchNorm and ReLU after each hidden one; `library` is `nn` of this package or PyTorch."""
    layers = []
    for fan_in, fan_out in pairwise(sizes[:-1]):
        layers += [library.Linear(fan_in, fan_out), library.BatchNorm1d(fan_out), library.ReLU()]
    return library.Sequential(*layers, library.Linear(sizes[-2], sizes[-1]))


def cnn(library: Any) -> Any:
    """The first article's convolutional network, for images (1, 28, 28)."""
    return library.Sequential(
        library.Conv2d(1, 32, 3), library.BatchNorm2d(32), library.ReLU(), library.MaxPool2d(2),
        library.Conv2d(32, 64, 3), library.BatchNorm2d(64), library.ReLU(), library.MaxPool2d(2),
        library.Flatten(), library.Linear(1600, 256), library.Linear(256, 10),
    )  # fmt: skip


def block(library: Any, channels: int) -> Any:
    """BatchNorm, ReLU and pooling by 2."""
    return library.Sequential(library.BatchNorm2d(channels), library.ReLU(), library.MaxPool2d(2))


def normalize(library: Any, shape: list[int], relu: bool = False) -> Any:
    """BatchNorm of inputs of this shape, with a ReLU if asked for."""
    layer = (library.BatchNorm1d if len(shape) == 2 else library.BatchNorm2d)(shape[1])
    return library.Sequential(layer, library.ReLU()) if relu else layer


def samples(sizes: list[int], batch: int) -> tuple[np.ndarray, np.ndarray]:
    """A batch for `mlp`: (batch, sizes[0]) in float32, and classes."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((batch, sizes[0]), dtype=np.float32), rng.integers(0, sizes[-1], batch)


def images(batch: int) -> tuple[np.ndarray, np.ndarray]:
    """A batch for `cnn`."""
    rng = np.random.default_rng(0)
    return rng.random((batch, 1, 28, 28), dtype=np.float32), rng.integers(0, 10, batch)


def normal(*shape: int) -> np.ndarray:
    """Numbers from N(0, 1) in float32."""
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
