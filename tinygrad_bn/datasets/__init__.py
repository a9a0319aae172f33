"""Data to train on: what comes with the package, your own IDX files, and seeded mini-batches of either."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tinygrad_bn.datasets.files import DataError, read_csv, read_idx
from tinygrad_bn.tensor import Array

__all__ = ["Batches", "DataError", "Dataset", "load", "read_csv", "read_idx"]

_DATA = Path(__file__).parent / "data"
_DIGITS = tuple("0123456789")
# SHA-256 of the contents (decompressed: gzip files of the same data differ).
_HASHES = {
    "mnist5k-images-idx3-ubyte.gz": "1d63efb4ac5ab122c73fed605a3f2897fe3ede87e9b4e9fe369abbdd36dad1e7",
    "mnist5k-labels-idx1-ubyte.gz": "d212e5beab3667d7fe028273e33cf4cd1e584108be3fdcc5dde1f59e74a2a558",
    "iris.csv": "f7fac79ad999fd2d001fd012dd70c0f42c738a7e7cfb7069e71371b55c29341e",
}


@dataclass(frozen=True)
class Dataset:
    """Samples `x` (N, ...), their classes `y` (N,) as int64, the classes' names, and where they came from."""

    name: str
    x: Array
    y: Array
    classes: tuple[str, ...]
    source: str

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise DataError(f"{self.source}: {len(self.x)} samples, but {len(self.y)} labels")

    def __len__(self) -> int:
        return len(self.y)

    def __repr__(self) -> str:
        return f"Dataset({self.name!r}: x {self.x.dtype} {self.x.shape}, {len(self.classes)} classes, {self.source})"

    def take(self, indices: Array) -> Dataset:
        """Some of the samples."""
        return replace(self, x=self.x[indices], y=self.y[indices])

    def scaled(self) -> Dataset:
        """8-bit pixels 0 … 255 as float32 in [0, 1]. Raises TypeError for other data."""
        if self.x.dtype != np.uint8:
            raise TypeError(f"scaled() is for 8-bit pixels; {self.name} is {self.x.dtype}")
        return replace(self, x=self.x.astype(np.float32) / np.float32(255))

    def split(self, held_out: int, seed: int = 0) -> tuple[Dataset, Dataset]:
        """Two parts, the second of `held_out` samples, with the classes in the same proportions.

        Raises ValueError if one part would be empty.
        """
        if not (isinstance(held_out, int | np.integer) and 0 < held_out < len(self)):
            raise ValueError(f"cannot hold out {held_out} of {len(self)} samples; give a number of samples")
        order = np.random.default_rng(seed).permutation(len(self))
        rank = np.empty(len(self))  # of each sample within its class, as a fraction: the cut takes as much of each
        for c in np.unique(self.y):
            members = order[self.y[order] == c]
            rank[members] = (np.arange(len(members)) + 0.5) / len(members)
        by_rank = order[np.argsort(rank[order], kind="stable")]
        return self.take(np.sort(by_rank[held_out:])), self.take(np.sort(by_rank[:held_out]))


def load(name: str = "mnist5k", source: str | Path | None = None, part: str = "train") -> Dataset:
    """Load a data set.

    Args:
        name: "mnist5k" (5,000 images of MNIST, x uint8 (5000, 28, 28), in random order) or "iris" (150 flowers,
            x float32 (150, 4)), which come with the package; or, with `source`, any name.
        source: a folder with IDX files under MNIST's names, plain or gzip (`train-images-idx3-ubyte.gz`,
            `train-labels-idx1-ubyte.gz`, and `t10k-…` of the test part).
        part: "train" or "test" of the files in `source`.

    Raises:
        DataError: a file is missing, damaged, or not the one it should be.
        ValueError: there is no such data set.
    """
    if source is not None:
        return _load_idx_folder(name, Path(source), part)
    if part != "train":
        raise ValueError(f"{name} comes in one part; hold some of it out with load({name!r}).split(...)")
    if name == "mnist5k":
        images, labels = "mnist5k-images-idx3-ubyte.gz", "mnist5k-labels-idx1-ubyte.gz"
        x, y = read_idx(_DATA / images, _HASHES[images]), read_idx(_DATA / labels, _HASHES[labels])
        return Dataset(name, x, y.astype(np.int64), _DIGITS, "embedded in the package")
    if name == "iris":
        _, rows = read_csv(_DATA / "iris.csv", _HASHES["iris.csv"])
        classes = tuple(dict.fromkeys(row[-1] for row in rows))
        x = np.array([row[:-1] for row in rows], np.float32)
        return Dataset(name, x, np.array([classes.index(row[-1]) for row in rows]), classes, "embedded in the package")
    raise ValueError(f"there is no data set {name!r}; there are 'mnist5k' and 'iris', or give a source folder")


def _load_idx_folder(name: str, folder: Path, part: str) -> Dataset:
    if part not in ("train", "test"):
        raise ValueError(f"part is 'train' or 'test'; got {part!r}")
    prefix = "train" if part == "train" else "t10k"
    arrays = []
    for stem in (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"):
        found = [path for path in (folder / f"{stem}.gz", folder / stem) if path.exists()]
        if not found:
            raise DataError(f"there is neither {stem}.gz nor {stem} in {folder}")
        arrays.append(read_idx(found[0]))
        if arrays[-1].ndim != (axes := 3 if "images" in stem else 1):
            raise DataError(f"{found[0]} holds an array of shape {arrays[-1].shape}, not one of {axes} axes")
    x, y = arrays
    classes = tuple(str(c) for c in range(int(y.max(initial=0)) + 1))
    return Dataset(name, x, y.astype(np.int64), classes, str(folder))


class Batches:
    """Mini-batches `(x, y)`: iterate once for an epoch. Every epoch has an order of its own, fixed by the seed.

    Args:
        x, y: arrays of the same length.
        batch_size: samples in a batch.
        seed: with it, `shuffle` orders the samples by (seed, epoch): two models get the same batches.
        shuffle: in random order; otherwise as they are.
        drop_last: leave out a last batch that is smaller.

    >>> batches = Batches(np.arange(5), np.arange(5), batch_size=2, shuffle=False)
    >>> [x.tolist() for x, y in batches], len(batches)
    ([[0, 1], [2, 3], [4]], 3)
    """

    def __init__(
        self, x: Array, y: Array, batch_size: int, *, seed: int = 0, shuffle: bool = True, drop_last: bool = False
    ) -> None:
        if len(x) != len(y):
            raise ValueError(f"{len(x)} samples, but {len(y)} targets")
        if batch_size < 1:
            raise ValueError(f"batch_size has to be at least 1; got {batch_size}")
        self.x, self.y, self.batch_size = x, y, batch_size
        self.seed, self.shuffle, self.drop_last = seed, shuffle, drop_last
        self.epoch = 0  # how many have been started; set it to resume

    def __len__(self) -> int:
        """How many batches an epoch has."""
        return len(self.x) // self.batch_size if self.drop_last else -(-len(self.x) // self.batch_size)

    @property
    def smallest(self) -> int:
        """How many samples the smallest batch has."""
        rest = 0 if self.drop_last else len(self.x) % self.batch_size
        return rest or min(self.batch_size, len(self.x))

    def __iter__(self) -> Iterator[tuple[Array, Array]]:
        order = np.arange(len(self.x))
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.x))
        self.epoch += 1
        for i in range(len(self)):
            chosen = order[i * self.batch_size : (i + 1) * self.batch_size]
            yield self.x[chosen], self.y[chosen]
