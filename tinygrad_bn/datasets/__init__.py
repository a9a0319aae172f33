"""Data sets by name or from your own IDX files, and seeded mini-batches."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from tinygrad_bn.arguments import expect_flags, expect_integer, expect_text, shown
from tinygrad_bn.datasets.catalogue import KNOWN, OWN
from tinygrad_bn.datasets.fetch import find
from tinygrad_bn.datasets.files import DataError, read_csv, read_idx
from tinygrad_bn.keywords import Named
from tinygrad_bn.random import generator
from tinygrad_bn.tensor import Array

__all__ = ["Batches", "DataError", "Dataset", "load", "read_csv", "read_idx"]

Seed: TypeAlias = int | np.random.Generator | None

_log = logging.getLogger(__name__)


def expect_arrays(*arrays: Any) -> None:
    """Raise TypeError unless all are arrays with an axis of samples, ValueError unless these have one length."""
    for a in arrays:
        if not getattr(a, "shape", ()):
            raise TypeError(f"samples and targets are arrays of shape (N, ...); got {type(a).__name__} {a!r:.60}")
    if len({len(a) for a in arrays}) > 1:
        raise ValueError("x has {} samples, but {} targets are in y; each sample has one".format(*map(len, arrays)))


@dataclass(frozen=True)
class Dataset:
    """Samples `x` (N, ...), int64 class labels `y` (N,), the names of the classes, and the source of the files.

    `white` is the largest possible pixel value. Raises TypeError if `x` or `y` is no array, DataError if they differ in
    length.
    """

    name: str
    x: Array
    y: Array
    classes: tuple[str, ...]
    source: str
    white: int = 255

    def __post_init__(self) -> None:
        for a in (self.x, self.y):
            expect_arrays(a)
        expect_integer("white", self.white, 1)
        for name, text in (("name", self.name), ("source", self.source)):
            expect_text(name, text)
        if not isinstance(self.classes, tuple | list):
            raise TypeError(f"classes are a tuple of names; got {self.classes!r:.60}")
        for text in self.classes:
            expect_text("the name of a class", text)
        if len(self.x) != len(self.y):
            raise DataError(f"{self.source}: {len(self.x)} samples, but {len(self.y)} labels")

    def __len__(self) -> int:
        return len(self.y)

    def __repr__(self) -> str:
        return f"Dataset({self.name!r}: x {self.x.dtype} {self.x.shape}, {len(self.classes)} classes, {self.source})"

    def take(self, indices: Array) -> Dataset:
        """The samples at `indices`, an array of integers, or of one boolean for each sample; TypeError for others."""
        indices = np.asarray(indices)
        if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iub"):
            raise TypeError(f"indices are an array (n,) of integers or booleans; got {indices.dtype} {indices.shape}")
        indices = indices if indices.size else indices.astype(np.intp)  # NumPy makes [] a float
        return replace(self, x=self.x[indices], y=self.y[indices])

    def complete(self) -> Dataset:
        """The samples without missing values (NaN)."""
        return self.take(np.flatnonzero(~np.isnan(self.x).reshape(len(self), -1).any(axis=1)))

    def scaled(self) -> Dataset:
        """8-bit pixels 0 … `white` as float32 in [0, 1]. Raises TypeError for other data."""
        if self.x.dtype != np.uint8:
            raise TypeError(f"scaled() takes 8-bit pixels (uint8); {self.name} is {self.x.dtype}")
        return replace(self, x=self.x.astype(np.float32) / np.float32(self.white))

    def split(self, held_out: int, seed: int = 0) -> tuple[Dataset, Dataset]:
        """Split at random into two parts with equal class proportions; the second part has `held_out` samples.

        Raises ValueError if one part would be empty, or for a seed below 0.
        """
        expect_integer("seed", seed, 0)
        whole = isinstance(held_out, int | np.integer) and not isinstance(held_out, bool)
        if not (whole and 0 < held_out < len(self)):
            raise ValueError(f"cannot hold out {held_out} of {len(self)} samples; give an integer, 1 … {len(self) - 1}")
        order = np.random.default_rng(seed).permutation(len(self))
        rank = np.empty(len(self))  # of each sample within its class, 0 … 1: a cut takes the same fraction of each
        for c in np.unique(self.y):
            members = order[self.y[order] == c]
            rank[members] = (np.arange(len(members)) + 0.5) / len(members)
        by_rank = order[np.argsort(rank[order], kind="stable")]
        return self.take(np.sort(by_rank[held_out:])), self.take(np.sort(by_rank[:held_out]))


def load(name: str | Path | None = None, source: str | Path | None = None, part: str = "train") -> Dataset:
    """Load a data set by name, or your own IDX files.

    | name | samples | x | part |
    | --- | --- | --- | --- |
    | "mnist5k" (the default) | 5,000 of MNIST's training images, in random order | uint8 (28, 28) | "train" |
    | "mnist" | 60,000 and 10,000 handwritten digits | uint8 (28, 28) | "train", "test" |
    | "fashion_mnist" | 60,000 and 10,000 articles of clothing | uint8 (28, 28) | "train", "test" |
    | "digits" | 1,797 handwritten digits, pixels 0 … 16 | uint8 (8, 8) | "train" |
    | "iris" | 150 flowers: length and width of sepal and petal, in cm | float32 (4,) | "train" |
    | "titanic" | 891 passengers: class 1 … 3, age (177 are NaN: see `complete`), fare | float32 (3,) | "train" |

    "mnist" and "fashion_mnist" are searched for in this order: `$TINYGRAD_BN_DATA/NAME`; the user's cache; an
    installed copy (Debian: `apt install dataset-fashion-mnist`); the network, from which files are stored in the
    cache. The other data sets come with the package. The SHA-256 of the contents is always checked. `Dataset.source`
    names the place found; the logger "tinygrad_bn.datasets" reports it at level INFO.

    Args:
        name: a name from the table; or a folder of your own files; or, with `source`, any name for your own data.
        source: the only folder to search. Your own files are IDX files with MNIST's names, plain or gzip
            (`train-images-idx3-ubyte.gz`, `train-labels-idx1-ubyte.gz`, and `t10k-…` for the test part).
        part: "train" or "test". To hold out samples of a data set without a test part, use `split`.

    Raises:
        DataError: unknown name, files that cannot be found or downloaded, or a damaged or wrong file.
        ValueError: the data set has no such part.
        TypeError: `name` or `source` is no path.
    """
    for option, value in (("name", name), ("source", source)):
        if not (value is None or isinstance(value, str | PathLike)):
            raise TypeError(f"{option} has to be a name or a path; got {value!r}")
    if name is None:
        name = "mnist5k" if source is None else Path(source).resolve().name
    elif source is None and name not in KNOWN:
        if not _is_folder(name):
            raise DataError(f"no data set or folder {shown(str(name))}; the data sets are {', '.join(KNOWN)}")
        name, source = Path(name).resolve().name, name
    name, known = str(name), KNOWN.get(str(name), OWN)
    if not isinstance(part, str) or part not in known.parts:
        one = f"{name} has only one part, 'train'; hold out samples with load({name!r}).split(...)"
        raise ValueError(one if len(known.parts) == 1 else f"part is 'train' or 'test'; got {part!r}")
    x, y, where = find(name, known, part, source)
    classes = known.classes or tuple(str(c) for c in range(int(y.max(initial=0)) + 1))
    data = Dataset(name, x, y, classes, where, known.white)
    _log.info("%r", data)
    return data


def _is_folder(path: str | Path) -> bool:
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):  # such as a name that is too long
        return False


class Batches(Named):
    """Mini-batches `(x, y)`; each iteration is one epoch.

    Args:
        x, y: arrays of the same length.
        batch_size: samples per batch.
        seed: where the random order comes from. An integer: the order of an epoch depends only on it and the number of
            the epoch. A NumPy Generator: the order is drawn from it. None: from the default generator (`manual_seed`).
        shuffle: shuffle the samples anew in every epoch.
        drop_last: skip the last batch if it is smaller than `batch_size`.

    Raises TypeError for options of the wrong type, ValueError for different lengths or a number that is too small.

    >>> batches = Batches(np.arange(5), np.arange(5), batch_size=2, shuffle=False)
    >>> [x.tolist() for x, y in batches], len(batches)
    ([[0, 1], [2, 3], [4]], 3)
    """

    def __init__(
        self, x: Array, y: Array, batch_size: int, *, seed: Seed = None, shuffle: bool = True, drop_last: bool = False
    ) -> None:
        expect_arrays(x, y)
        batch_size = expect_integer("batch_size", batch_size, 1)
        if not isinstance(seed, np.random.Generator | None):
            expect_integer("seed", seed, 0)
        expect_flags(shuffle=shuffle, drop_last=drop_last)
        self.x, self.y, self.batch_size = x, y, batch_size
        self.seed, self.shuffle, self.drop_last = seed, shuffle, drop_last
        self.epoch = 0  # number of epochs started; with an integer as seed, set it to resume

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self.x) // self.batch_size if self.drop_last else -(-len(self.x) // self.batch_size)

    @property
    def smallest(self) -> int:
        """Samples in the smallest batch."""
        rest = 0 if self.drop_last else len(self.x) % self.batch_size
        return rest or min(self.batch_size, len(self.x))

    def __iter__(self) -> Iterator[tuple[Array, Array]]:
        return self.in_order(self.next_order())

    def next_order(self) -> Array:
        """Positions (N,) of the samples in the order of the next epoch, which begins with this."""
        order = np.arange(len(self.x))
        if self.shuffle:
            if isinstance(seed := self.seed, int | np.integer):
                rng = np.random.default_rng([seed, self.epoch])
            else:
                rng = generator(seed)
            order = rng.permutation(len(self.x))
        self.epoch += 1
        return order

    def in_order(self, order: Array, start: int = 0) -> Iterator[tuple[Array, Array]]:
        """The batches of an epoch, from number `start` on."""
        for i in range(start, len(self)):
            chosen = order[i * self.batch_size : (i + 1) * self.batch_size]
            yield self.x[chosen], self.y[chosen]
