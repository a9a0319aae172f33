"""Readers of IDX and CSV files. Errors name the file."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinygrad_bn.tensor import Array

# The third byte of an IDX file is the code of its dtype, which is big-endian.
IDX_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


HEADER = 4 + 4 * 255  # bytes, the longest header of IDX
CHUNK = 1 << 18  # bytes; a read allocates what it is asked for, whatever is there
GZIP_LIMIT = 1 << 30  # bytes: 1 MiB of gzip can be 1 GiB of zeros
CSV_LIMIT = 1 << 28  # bytes
CSV_CELLS = 1 << 24  # a row of one cell takes 200 bytes more than its text


class DataError(ValueError):
    """A data file is missing, damaged or a different one, or the name of the data set is unknown."""


class MissingError(DataError):
    """A data file does not exist."""


@dataclass(frozen=True)
class File:
    """An IDX or CSV file, stored as `name` or `name.gz`.

    sha256: the hash of the decompressed contents; None accepts any.
    archive: the SHA-256 of the mirrors' `name.gz`.
    """

    name: str
    sha256: str | None = None
    archive: str = ""


def locate(folder: Path, name: str) -> Path:
    """The path of `name.gz` or `name` in `folder`. Raises MissingError if neither exists."""
    for path in (folder / f"{name}.gz", folder / name):
        if path.exists():
            return path
    raise MissingError(f"neither {name}.gz nor {name} exists in {folder}")


def read_bytes(path: Path, sha256: str | None, limit: int | Callable[[bytes], int]) -> bytearray:
    """The contents of a file, decompressed if it is gzip.

    No more is read than `limit` bytes, as a small archive may decompress to any size: a number, or a function of the
    first HEADER bytes (-1: no more than these). Raises DataError if there is more, if an archive has more than
    GZIP_LIMIT bytes, or the file cannot be read, is damaged, or has another hash.
    """
    try:
        path.stat()
        if not path.is_file():
            raise DataError(f"{path} is not a regular file")
        with path.open("rb") as raw:
            zipped = raw.peek(2)[:2] == b"\x1f\x8b"
            file = gzip.GzipFile(fileobj=raw) if zipped else raw
            content = bytearray(file.read(HEADER))
            expected = limit(bytes(content)) if callable(limit) else limit
            most = min(expected, GZIP_LIMIT) if zipped else expected
            while len(content) <= most and (chunk := file.read(min(CHUNK, most + 1 - len(content)))):
                content += chunk
    except DataError:
        raise
    except (OSError, MemoryError) as error:  # also gzip.BadGzipFile
        raise DataError(f"cannot read {path}: {error or 'it is larger than the memory'}") from error
    except (EOFError, zlib.error) as error:
        raise DataError(f"{path} is a damaged or truncated gzip file: {error}") from error
    except ValueError as error:  # as of a name with "\\0" in it
        raise DataError(f"cannot read {str(path)!r}: {error}") from error
    if 0 <= expected < len(content):
        raise DataError(f"{path} is damaged: it has more than the {expected} bytes that are expected")
    if 0 <= most < len(content):
        raise DataError(f"{path} has more than {most} bytes in gzip; if you trust it, decompress it first")
    if sha256 is not None and (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise DataError(f"{path} is not the expected file: its contents have SHA-256 {found}, not {sha256}")
    return content


def _idx_size(content: bytes) -> int:
    """Bytes of the IDX file that starts like this; -1 if it is none."""
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in IDX_DTYPES:
        return -1
    ndim = content[3]
    shape = np.frombuffer(content[4 : 4 + 4 * ndim].ljust(4 * ndim, b"\0"), ">u4")
    return 4 + 4 * ndim + math.prod(map(int, shape)) * np.dtype(IDX_DTYPES[content[2]]).itemsize


def read_idx(path: str | Path, sha256: str | None = None) -> Array:
    """The array in an IDX file (MNIST's format), plain or gzip.

    Raises:
        DataError: the file is missing, damaged or not IDX, or its contents do not have the given SHA-256.
    """
    path = Path(path)
    content = read_bytes(path, sha256, _idx_size)
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in IDX_DTYPES:
        raise DataError(f"{path} is not an IDX file: it starts with {content[:4].hex(' ') or 'nothing'}")
    dtype, ndim = np.dtype(IDX_DTYPES[content[2]]), content[3]
    start = 4 + 4 * ndim
    if len(content) < start:
        raise DataError(f"{path} is truncated: it has {len(content)} bytes, its header alone has {start}")
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", ndim, 4))
    expected = start + math.prod(shape) * dtype.itemsize
    text = f"an array of shape {shape}" if ndim <= 8 else f"an array of {ndim} axes"
    if len(content) != expected:
        needed = expected if expected < 1 << 63 else "more than any memory has"
        raise DataError(f"{path} is damaged: it has {len(content)} bytes, {text} needs {needed}")
    try:
        array = np.frombuffer(content, dtype, offset=start).reshape(shape)
    except ValueError as error:  # more axes or elements than NumPy supports
        raise DataError(f"{path} is damaged: {text}: {error}") from error
    return array.astype(dtype.newbyteorder("="))


def read_csv(path: str | Path, sha256: str | None = None) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a CSV file (UTF-8, plain or gzip).

    The file has at most 256 MiB, and 2²⁴ commas and line breaks.

    Raises:
        DataError: the file is missing, damaged, too large or empty, or a row and the header differ in their number of
            fields.
    """
    path = Path(path)
    content = read_bytes(path, sha256, CSV_LIMIT)
    if sum(map(content.count, (b",", b"\n", b"\r"))) > CSV_CELLS:  # before a row is made of them
        raise DataError(f"{path} is too large a table: it has more than {CSV_CELLS} commas and line breaks")
    rows: list[list[str]] = []
    reader = csv.reader(io.TextIOWrapper(io.BytesIO(content), "utf-8-sig", newline=""), strict=True)
    try:
        for row in reader:
            rows.append(row)
            if len(row) != len(rows[0]):
                raise DataError(f"{path}, line {reader.line_num}: {len(row)} fields, but the header has {len(rows[0])}")
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a CSV file in UTF-8, after line {reader.line_num}: {error}") from error
    if not rows or not rows[0]:
        raise DataError(f"{path} is not a CSV file with a header: {'its first line' if rows else 'it'} is empty")
    return rows[0], rows[1:]


def read_samples(folder: Path, files: Sequence[File], classes: Sequence[str]) -> tuple[Array, Array]:
    """Samples and int64 labels, from two IDX files (images, labels) or one CSV table.

    The last column of a table is the class, one of `classes`; the others are float32, NaN where empty. Raises
    DataError if a file is missing, damaged, or has another shape or dtype.
    """
    if len(files) == 1:
        _, rows = read_csv(locate(folder, files[0].name), files[0].sha256)
        x = np.array([[value or "nan" for value in row[:-1]] for row in rows], np.float32)
        return x, np.array([classes.index(row[-1]) for row in rows])
    arrays = []
    for file, ndim in zip(files, (3, 1), strict=True):
        path = locate(folder, file.name)
        arrays.append(read_idx(path, file.sha256))
        if arrays[-1].ndim != ndim:
            raise DataError(f"{path} has shape {arrays[-1].shape}; expected {ndim} axes")
    images, labels = arrays
    if images.dtype != np.uint8:
        raise DataError(f"the images in {locate(folder, files[0].name)} are {images.dtype}, not uint8")
    last = len(classes) - 1 if classes else 255
    if labels.dtype.kind not in "iu" or (labels.size and not 0 <= labels.min() <= labels.max() <= last):
        found = f"{labels.dtype} from {labels.min()} to {labels.max()}" if labels.size else f"{labels.dtype}"
        raise DataError(f"the labels in {locate(folder, files[1].name)} are {found}, not integers from 0 to {last}")
    return images, labels.astype(np.int64)
