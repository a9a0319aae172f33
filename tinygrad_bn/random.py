"""The default generator of initialisers, dropout and the order of batches; and Philox, a counter-based generator."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinygrad_bn.arguments import expect_integer, shown
from tinygrad_bn.modes import Mode

_generator = np.random.default_rng()


def manual_seed(seed: int) -> np.random.Generator:
    """Seed the default generator, for reproducible results, and return it.

    Raises TypeError for a seed that is not an integer, ValueError for one below 0.
    """
    global _generator
    expect_integer("seed", seed, 0)
    _generator = np.random.default_rng(seed)
    return _generator


def generator(rng: np.random.Generator | None = None) -> np.random.Generator:
    """The generator to draw from: `rng`, or else the default one. Raises TypeError if `rng` is no generator."""
    if not (rng is None or isinstance(rng, np.random.Generator)):
        raise TypeError(f"rng has to be a NumPy Generator, such as np.random.default_rng(0), or None; got {shown(rng)}")
    return _generator if rng is None else rng


def _draw(rng: np.random.Generator | None) -> int:
    return int(generator(rng).integers(2**63))


_drawing: ContextVar[Callable[[np.random.Generator | None], int]] = ContextVar("drawing", default=_draw)


def draw_key(rng: np.random.Generator | None = None) -> int:
    """A key for `philox`, from 0 to 2**63 − 1, drawn from `rng` or else from the default generator."""
    return _drawing.get()(rng)


@contextmanager
def drawing() -> Iterator[list[int]]:
    """The keys that are drawn in this block."""
    keys: list[int] = []
    draw = _drawing.get()

    def noted(rng: np.random.Generator | None) -> int:
        keys.append(draw(rng))
        return keys[-1]

    with Mode(_drawing, noted):
        yield keys


def drawn_again(keys: Iterable[int]) -> Mode:
    """In this block these keys are drawn, in their order, and no generator moves."""
    left = iter(keys)
    return Mode(_drawing, lambda _: next(left))


def philox(key: int, count: int) -> NDArray[Any]:
    """`count` random 32-bit words as uint64. Word i depends only on the 64-bit `key` and i, so it can be recomputed.

    Philox4x32-10 (Salmon et al. 2011): each of the counters 0, 1, … gives four words.

    >>> [hex(word) for word in philox(0, 4)]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    expect_integer("count", count, 0)
    expect_integer("key", key, 0)
    if key >= 2**64:
        raise ValueError(f"key has to be below 2**64; got {shown(key)}")
    key = int(key)
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    counters = np.arange(-(-count // 4), dtype=np.uint64)
    c0, c1, c2, c3 = counters & low, counters >> half, np.zeros_like(counters), np.zeros_like(counters)
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (p1 >> half) ^ c1 ^ np.uint64(k0), p1 & low, (p0 >> half) ^ c3 ^ np.uint64(k1), p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1).reshape(-1)[:count]
