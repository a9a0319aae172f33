"""One checkpoint file: its bytes, checked, and its contents."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tinygrad_bn.arguments import shown
from tinygrad_bn.backend import Array
from tinygrad_bn.checkpoint.codec import unpack
from tinygrad_bn.files import replacing

VERSION = 1
FORMAT, CONTENT, HASH = "tinygrad_bn.format", "tinygrad_bn.content", "tinygrad_bn.sha256"
OURS = {FORMAT, CONTENT, HASH}
PARTS = ("optimizer", "schedule", "generators", "extra", "arrays")  # what stands before "/" in a name
DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "u1",
}  # fmt: skip
SHOWN = 700  # characters of a problem
TORCH = (
    "this is a file of torch.save, which may run any program when it is read; convert it where torch is installed: "
    'safetensors.torch.save_file(torch.load(FILE, weights_only=True), "model.safetensors")'
)


class CheckpointError(ValueError):
    """A file that cannot be loaded: which one, what is wrong, and what to do. Nothing was changed."""

    def __init__(self, path: str | os.PathLike[str], problem: str) -> None:
        problem = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in problem)  # names are those of the file
        if len(problem) > SHOWN:
            problem = f"{problem[: SHOWN - 203]} … {problem[-200:]}"
        super().__init__(f"{os.fspath(path)}: {problem}")
        self.path, self.problem = Path(path), problem

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.problem)


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds. Printed, it is a summary.

    Attributes:
        model: the arrays, by state-dict key.
        optimizer, schedule: as their `state_dict` gave them; None if the file has none.
        generators: the state of each generator, by name; those of modules are named `module:` and their attribute.
        extra, arrays: as given to `save`.
        metadata: "format_version", "package_version", "conventions" of the normalisations, and the names of the
            classes "optimizer" and "schedule"; empty for a file of others.
        notes: what was converted or is missing.
    """

    path: Path
    model: dict[str, Array]
    optimizer: dict[str, Any] | None = None
    schedule: dict[str, Any] | None = None
    generators: dict[str, dict[str, Any]] = field(default_factory=dict)
    extra: Any = None
    arrays: dict[str, Array] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        meta = self.metadata
        count = f"{sum(a.size for a in self.model.values()):,} numbers in {len(self.model)} arrays"
        lines = [str(self.path), f"  model: {count}"]
        lines += [f"    {name}: {a.dtype} {a.shape}" for name, a in self.model.items()]
        lines += [f"  {part}: {meta[part]}" for part in ("optimizer", "schedule") if meta.get(part)]
        lines += [f"  generators: {', '.join(self.generators)}"] if self.generators else []
        lines += [f"  arrays: {', '.join(self.arrays)}"] if self.arrays else []
        lines += [f"  extra: {shown(self.extra)}"] if self.extra is not None else []
        for path, values in meta.get("conventions", {}).items():
            lines.append(f"  {path or 'the model'}: {', '.join(f'{k}={v}' for k, v in values.items())}")
        if meta:
            lines.append(f"  format {meta['format_version']}, by tinygrad_bn {meta['package_version']}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def to_bytes(arrays: Mapping[str, Array], content: Mapping[str, Any]) -> bytes:
    """The bytes of a file with these arrays and this content, which is JSON."""
    from safetensors import SafetensorError
    from safetensors.numpy import save

    arrays = {name: _little(a) for name, a in arrays.items()}
    metadata = {FORMAT: str(VERSION), CONTENT: json.dumps(content)}
    try:
        return save(arrays, {**metadata, HASH: _digest(arrays, metadata)})
    except SafetensorError as error:  # there are more than 100 MB of JSON
        raise ValueError(f"too much that is no array for one file: keep numbers in arrays ({error})") from error


def _digest(arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes, and of the metadata."""
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, a in sorted(arrays.items()):
        digest.update(json.dumps([name, a.dtype.str.lstrip("<>|="), list(a.shape)]).encode())
        digest.update(_little(a).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _little(a: Array) -> Array:
    """The array in the order of its axes and little-endian, as in the file."""
    return np.asarray(a, a.dtype.newbyteorder("<"), order="C")


def read(path: str | os.PathLike[str]) -> Contents:
    """The contents of a safetensors file, checked: header, sizes, dtypes, and in own files version and SHA-256.

    bfloat16 arrays become float32, exactly. The hash finds damage; it is no signature. Memory is reserved for what the
    file holds, not for what its header claims: about twice the size of the file for arrays, and up to 100 times the
    text of `extra` and other JSON, if that is nothing but nested empty lists.

    Raises CheckpointError for a damaged or foreign file, OSError if it cannot be read.
    """
    path = Path(path)
    data = _read_bytes(path)
    try:
        arrays, metadata, notes = _parse(path, data)
        if not OURS & metadata.keys():
            if slashed := [name for name in arrays if "/" in name]:
                raise CheckpointError(path, f"{shown(slashed[0])} is not a name of a parameter or buffer")
            return Contents(path, arrays, notes=notes)
        return _contents(path, arrays, metadata, notes)
    except CheckpointError:
        raise
    except MemoryError as error:
        raise CheckpointError(path, f"its {len(data):,} bytes need more memory than there is") from error
    except (ValueError, TypeError, LookupError, RecursionError, OverflowError, AttributeError) as error:
        raise CheckpointError(path, f"its contents have a wrong form: {error!r:.300}; take another file") from error


def _read_bytes(path: Path) -> bytes:
    if stat.S_ISFIFO(mode := os.stat(path).st_mode) or stat.S_ISCHR(mode) or stat.S_ISSOCK(mode):
        raise CheckpointError(path, "this is not a regular file")
    with path.open("rb") as file:
        start, there = file.read(9), os.fstat(file.fileno()).st_size
        size = int.from_bytes(start[:8], "little")
        if size > there - 8 or start[8:] != b"{":
            if start.startswith((b"PK\x03\x04", b"\x80\x02")):
                raise CheckpointError(path, TORCH)
            claims = f"its header claims {size:,} bytes" if there >= 8 else "it has no header"
            raise CheckpointError(path, f"it is incomplete or no safetensors file: {claims}, of {there:,} in the file")
        try:
            return start + file.read()
        except MemoryError as error:
            raise CheckpointError(path, f"its {there:,} bytes need more memory than there is") from error


def _parse(path: Path, data: bytes) -> tuple[dict[str, Array], dict[str, str], tuple[str, ...]]:
    """Arrays, metadata and notes of a safetensors file."""
    from safetensors import SafetensorError, deserialize

    try:
        tensors = dict(deserialize(data))  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise CheckpointError(path, f"it is damaged or no safetensors file: {error}") from error
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")].decode(), object_pairs_hook=_no_duplicates)
    metadata = header.pop("__metadata__", None) or {}
    # In the order of the header, which in torch's files is not that of the offsets
    arrays = {name: _array(path, name, **tensors.pop(name)) for name in header}
    wide = [name for name, entry in header.items() if entry["dtype"] == "BF16"]
    return arrays, metadata, (f"bfloat16 became float32, exactly: {', '.join(wide)}",) if wide else ()


def _array(path: Path, name: str, dtype: str, shape: list[int], data: bytearray) -> Array:
    if dtype not in DTYPES:
        raise CheckpointError(path, f"{shown(name)} has the dtype {dtype}; convert it to float32 before")
    stored = np.dtype(DTYPES[dtype])
    array = np.frombuffer(data, stored).reshape(shape).astype(stored.newbyteorder("="), copy=False)
    if dtype == "BOOL":
        if (array > 1).any():
            raise CheckpointError(path, f"{shown(name)} has booleans that are neither 0 nor 1")
        return array.view(bool)
    if dtype == "BF16":
        wide = array.astype(np.uint32)
        wide <<= 16  # in place, since `wide << 16` would be no array without axes
        return wide.view(np.float32)
    return array


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in the header")
    return found


def _contents(path: Path, arrays: dict[str, Array], metadata: dict[str, str], notes: tuple[str, ...]) -> Contents:
    """The contents of an own file."""
    if missing := OURS - metadata.keys():
        raise CheckpointError(path, f"it is damaged: its metadata have no {', '.join(sorted(missing))}")
    if metadata[FORMAT] != str(VERSION):
        raise CheckpointError(
            path,
            f"it has format {metadata[FORMAT]:.20}, and this version reads {VERSION}; use the version that wrote it",
        )
    if _digest(arrays, {k: v for k, v in metadata.items() if k != HASH}) != metadata[HASH]:
        raise CheckpointError(path, "it is damaged: its SHA-256 differs; take a checkpoint before it")
    content = json.loads(metadata[CONTENT])
    parts = {part: unpack(content[part], arrays) for part in PARTS}
    parts |= {part: parts[part] or {} for part in ("generators", "arrays")}
    model = {name: arrays[name] for name in content["keys"]}
    found = Contents(path, model, **parts, metadata={**content["metadata"], "format_version": VERSION}, notes=notes)
    _expect_form(found)
    if unknown := [n for n in arrays if n not in model and n.partition("/")[0] not in PARTS]:
        raise ValueError(f"{shown(unknown[0])} belongs to no part of a checkpoint")
    return found


def _expect_form(found: Contents) -> None:
    """Raise ValueError unless each part is of the type that it should have."""
    meta = found.metadata
    conventions = meta["conventions"]
    dictionaries = [found.generators, found.arrays, conventions, *found.generators.values(), *conventions.values()]
    dictionaries += [state for state in (found.optimizer, found.schedule) if state is not None]
    texts = [meta["package_version"], *(meta[part] for part in ("optimizer", "schedule") if part in meta)]
    texts += [key for part in (found.generators, found.arrays, conventions) for key in part]
    numbers = [value for own in conventions.values() for value in own.values()]
    for kind, values in (
        (dict, dictionaries), (str, texts), (np.ndarray, found.arrays.values()), (int | float | None, numbers),
    ):  # fmt: skip
        for value in values:
            if not isinstance(value, kind):
                raise ValueError(f"{shown(value)} stands in a wrong place")


def write(path: Path, data: bytes) -> None:
    """Write a file whole, or leave the one that is there; see `replacing`. Raises OSError that names `path`."""
    try:
        with replacing(path) as beside:
            descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
            finally:
                os.close(descriptor)
    except OSError as error:
        raise OSError(error.errno, f"the checkpoint was not saved: {error.strerror}", str(path)) from error
