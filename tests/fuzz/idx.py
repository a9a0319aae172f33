"""IDX files, alone and as a folder of images and labels."""

from __future__ import annotations

import gzip
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from hypothesis import strategies as st

from tests.fuzz.mutations import SIZES, damaged, packed
from tests.fuzz.target import Content, Files, Target, one_file
from tinygrad_bn.datasets import DataError, files, load, read_idx

CODES = {0x08: "u1", 0x09: "i1", 0x0B: "i2", 0x0C: "i4", 0x0D: "f4", 0x0E: "f8"}
NAN = {0x0D: struct.pack(">f", math.nan), 0x0E: struct.pack(">d", math.nan)}
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def written(code: int, shape: tuple[int, ...], body: bytes) -> bytes:
    """An IDX file with any body."""
    return bytes([0, 0, code, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + body


@st.composite
def valid(draw: st.DrawFn, code: int | None = None, shape: tuple[int, ...] | None = None) -> bytes:
    """A file as it should be, some filled with NaN."""
    code = draw(st.sampled_from(sorted(CODES))) if code is None else code
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4))) if shape is None else shape
    width = np.dtype(CODES[code]).itemsize
    unit = NAN[code] if code in NAN and draw(st.booleans()) else draw(st.binary(min_size=width, max_size=width))
    return written(code, shape, unit * math.prod(shape))


@st.composite
def lying(draw: st.DrawFn) -> bytes:
    """A header that does not fit the body: magic, dtype, number of axes or a size."""
    content = bytearray(draw(valid()))
    field = draw(st.sampled_from(("magic", "dtype", "ndim", "size", "many")))
    if field == "magic":
        content[draw(st.integers(0, 1))] = draw(st.integers(1, 255))
    elif field == "dtype":
        content[2] = draw(st.integers(0, 255))
    elif field == "ndim":
        content[3] = draw(st.integers(0, 255))
    elif field == "size" and content[3]:
        at = 4 + 4 * draw(st.integers(0, content[3] - 1))
        content[at : at + 4] = struct.pack(">I", draw(st.sampled_from(SIZES)))
    elif field == "many":
        axes = draw(st.integers(5, 255))
        shape = (draw(st.sampled_from((0, 1, 1, (1 << 32) - 1))), *[draw(st.sampled_from(SIZES))] * (axes - 1))
        return written(content[2], shape, bytes(draw(st.integers(0, 8))))
    return bytes(content)


def contents() -> st.SearchStrategy[bytes]:
    """Files as they should be, lying or damaged ones, and noise; plain or in gzip."""
    return st.one_of(
        valid().flatmap(packed), lying().flatmap(packed), lying().flatmap(packed),
        valid().flatmap(damaged).flatmap(packed), st.binary(max_size=60).flatmap(packed),
    )  # fmt: skip


def unpacked(content: bytes) -> bytes:
    """What a reader sees of a file that it accepted."""
    return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content


def verify_array(result: Any, found: Files) -> None:
    """The array is the one that the file describes, byte for byte."""
    content = unpacked(found["data.idx"])
    shape = struct.unpack_from(f">{content[3]}I", content, 4)
    assert content[:2] == b"\0\0"
    assert (result.dtype, result.shape) == (np.dtype(CODES[content[2]]), shape)
    assert result.astype(result.dtype.newbyteorder(">")).tobytes() == content[4 + 4 * len(shape) :]


@st.composite
def folders(draw: st.DrawFn) -> dict[str, bytes]:
    """Images and labels, of which most fit each other."""
    n = draw(st.integers(0, 5))
    names = [name + draw(st.sampled_from(("", ".gz"))) for name in (IMAGES, LABELS)]
    good = (
        valid(0x08, (n, draw(st.integers(0, 4)), draw(st.integers(0, 4)))),
        valid(draw(st.sampled_from(sorted(CODES))), (n,)),
    )
    fates = [draw(st.sampled_from(("good", "good", "good", "any", "absent"))) for _ in names]
    made = {"good": lambda i: good[i].flatmap(packed), "any": lambda i: contents()}
    return {
        name: Content(draw(made[fate](i)))
        for i, (name, fate) in enumerate(zip(names, fates, strict=True))
        if fate in made
    }


def verify_samples(result: Any, found: Files) -> None:
    """Images of one size, and as many labels in the range of the classes."""
    assert (result.x.dtype, result.x.ndim, result.y.dtype) == (np.uint8, 3, np.int64)
    assert result.y.shape == result.x.shape[:1]
    assert all(0 <= y < len(result.classes) for y in result.y.tolist())


def limited(read: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """`read`, with a limit of gzip that a case can exceed."""
    return lambda folder: mock.patch.object(files, "GZIP_LIMIT", 1 << 18)(read)(folder)


IDX = Target(
    "idx",
    one_file("data.idx", contents()),
    limited(lambda folder: read_idx(folder / "data.idx")),
    DataError, verify_array, 1 << 21,
)  # fmt: skip
FOLDER = Target("folder", folders(), limited(lambda folder: load(source=folder)), DataError, verify_samples, 1 << 22)
