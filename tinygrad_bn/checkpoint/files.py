"""One checkpoint file: its bytes, checked, and its contents."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tinygrad_bn.arguments import shown
from tinygrad_bn.backend import Array
from tinygrad_bn.checkpoint.codec import unpack

VERSION = 1
FORMAT, CONTENT, HASH = "tinygrad_bn.format", "tinygrad_bn.content", "tinygrad_bn.sha256"
OURS = {FORMAT, CONTENT, HASH}
PARTS = ("optimizer", "schedule", "generators", "extra", "arrays")  # what stands before "/" in a name
DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "u1",
}  # fmt: skip
TORCH = (
    "this is a file of torch.save, which may run any program when it is read; convert it where torch is installed: "
    'safetensors.torch.save_file(torch.load(FILE, weights_only=True), "model.safetensors")'
)


class CheckpointError(ValueError):
    """A file that cannot be loaded: which one, what is wrong, and what to do. Nothing was changed."""

    def __init__(self, path: str | os.PathLike[str], problem: str) -> None:
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
    from safetensors.numpy import save

    arrays = {name: np.asarray(a, order="C") for name, a in arrays.items()}
    metadata = {FORMAT: str(VERSION), CONTENT: json.dumps(content)}
    return save(arrays, {**metadata, HASH: _digest(arrays, metadata)})


def _digest(arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes, and of the metadata."""
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, a in sorted(arrays.items()):
        digest.update(json.dumps([name, a.dtype.str.lstrip("<>|="), list(a.shape)]).encode())
        digest.update(a.astype(a.dtype.newbyteorder("<"), order="C", copy=False).tobytes())
    return digest.hexdigest()


def read(path: str | os.PathLike[str]) -> Contents:
    """The contents of a safetensors file, checked: header, sizes, dtypes, and in own files version and SHA-256.

    bfloat16 arrays become float32, exactly. Raises CheckpointError for a damaged or foreign file, OSError if it cannot
    be read.
    """
    path = Path(path)
    data = _read_bytes(path)
    try:
        arrays, metadata, notes = _parse(path, data)
        if not OURS & metadata.keys():
            if slashed := [name for name in arrays if "/" in name]:
                raise CheckpointError(path, f"{slashed[0]!r} is not a name of a parameter or buffer")
            return Contents(path, arrays, notes=notes)
        return _contents(path, arrays, metadata, notes)
    except CheckpointError:
        raise
    except (ValueError, TypeError, LookupError, RecursionError, OverflowError, AttributeError) as error:
        raise CheckpointError(path, f"its contents have a wrong form: {error!r:.300}; take another file") from error


def _read_bytes(path: Path) -> bytes:
    if stat.S_ISFIFO(mode := os.stat(path).st_mode) or stat.S_ISCHR(mode) or stat.S_ISSOCK(mode):
        raise CheckpointError(path, "this is not a regular file")
    data = path.read_bytes()
    if data[:4] == b"PK\x03\x04" or data[:2] == b"\x80\x02":
        raise CheckpointError(path, TORCH)
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        claims = f"its header claims {size:,} bytes" if len(data) >= 8 else "it has no header"
        raise CheckpointError(path, f"it is incomplete or no safetensors file: {claims}, of {len(data):,} in the file")
    return data


def _parse(path: Path, data: bytes) -> tuple[dict[str, Array], dict[str, str], tuple[str, ...]]:
    """Arrays, metadata and notes of a safetensors file."""
    from safetensors import SafetensorError, deserialize

    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")], object_pairs_hook=_no_duplicates)
    if not isinstance(header, dict):
        raise CheckpointError(path, "its header is no dictionary")
    try:
        tensors = deserialize(data)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise CheckpointError(path, f"it is damaged or no safetensors file: {error}") from error
    arrays, wide = {}, []
    for name, tensor in tensors:
        dtype = tensor["dtype"]
        if dtype not in DTYPES:
            raise CheckpointError(path, f"{name} has the dtype {dtype}; convert it to float32 before")
        kind = np.dtype(DTYPES[dtype])
        array = np.frombuffer(tensor["data"], kind).reshape(tensor["shape"]).astype(kind.newbyteorder("="))
        if dtype == "BOOL":
            if (array > 1).any():
                raise CheckpointError(path, f"{name} has booleans that are neither 0 nor 1")
            array = array.astype(bool)
        elif dtype == "BF16":
            array = (array.astype(np.uint32) << np.uint32(16)).view(np.float32).reshape(array.shape)
            wide.append(name)
        arrays[name] = array
    notes = (f"bfloat16 became float32, exactly: {', '.join(wide)}",) if wide else ()
    # In the order of the header, which in torch's files is not that of the offsets
    return {n: arrays[n] for n in header if n != "__metadata__"}, dict(header.get("__metadata__") or {}), notes


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
    if unknown := [n for n in arrays if "/" in n and n.partition("/")[0] not in PARTS]:
        raise CheckpointError(path, f"{unknown[0]!r} belongs to no part of a checkpoint")
    return Contents(
        path,
        {n: arrays[n] for n in content["keys"]},
        parts["optimizer"],
        parts["schedule"],
        parts["generators"] or {},
        parts["extra"],
        parts["arrays"] or {},
        {"format_version": VERSION, **content["metadata"]},
        notes,
    )


def write(path: Path, data: bytes) -> None:
    """Write a file whole: a temporary file beside it, fsync, rename, fsync of the folder.

    On an error the file that was there before stays. Only if the last fsync fails, the new one is there, complete, but
    may be lost when the power fails. Raises OSError that names `path`.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        try:
            descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(beside, path)
        except BaseException:
            with suppress(OSError):
                beside.unlink()
            raise
        _sync_folder(path.parent)
    except OSError as error:
        raise OSError(error.errno, f"the checkpoint was not saved: {error.strerror}", str(path)) from error


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # there folders cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
