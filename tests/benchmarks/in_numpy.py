"""The rows of the speed table by NumPy, and what limits them: the rate of memory, and the products of a step."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np

from tests.benchmarks.networks import normal

Work = Callable[[], object]


def batch_norm(shape: list[int]) -> Work:
    """BatchNorm in training, forward and backward, by the textbook formulas."""
    x, g = normal(2, *shape)
    axes, column = (0, *range(2, len(shape))), (1, -1) + (1,) * (len(shape) - 2)
    w, b = np.ones(shape[1], np.float32).reshape(column), np.zeros(shape[1], np.float32).reshape(column)

    def run() -> object:
        n = x.size // shape[1]
        xmu = x - x.mean(axes, keepdims=True)
        ivar = 1 / np.sqrt((xmu * xmu).mean(axes, keepdims=True) + 1e-5)
        xhat = xmu * ivar
        y = xhat * w + b
        gb, gw = g.sum(axes, keepdims=True), (g * xhat).sum(axes, keepdims=True)
        return y, w * ivar * (g - gb / n - xhat * gw / n), gw, gb

    return run


def reduction(name: str, shape: list[int], axis: int | list[int] | None) -> Work:
    """One reduction."""
    x, function = normal(*shape), getattr(np, name)
    axes = tuple(axis) if isinstance(axis, list) else axis
    return lambda: function(x, axis=axes)


def products(sizes: list[int], batch: int) -> Work:
    """The matrix products of a step of the MLP alone: no step can be faster."""
    layers = [(normal(batch, i), normal(o, i), normal(batch, o)) for i, o in pairwise(sizes)]

    def run() -> None:
        for number, (x, weight, g) in enumerate(layers):
            x @ weight.T
            g.T @ x
            if number:
                g @ weight

    return run


def memory(nbytes: int, copy: bool) -> Work:
    """Read `nbytes` on two threads; with `copy`, read half of it and write half."""
    a = np.ones(nbytes // (8 if copy else 4), np.float32)
    b, half = np.empty_like(a), a.size // 2
    pool, parts = ThreadPoolExecutor(2), [slice(None, half), slice(half, None)]

    def part(where: slice) -> None:
        if copy:
            np.copyto(b[where], a[where])
        else:
            np.maximum.reduce(a[where])

    return lambda: list(pool.map(part, parts))
