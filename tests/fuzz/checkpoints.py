"""Checkpoints and other safetensors files: read, printed, and loaded into a model."""

from __future__ import annotations

import json
import math
import tempfile
import tracemalloc
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tests.fuzz.mutations import damaged
from tests.fuzz.target import Files, Target, one_file
from tinygrad_bn import checkpoint, nn, optim
from tinygrad_bn.checkpoint.files import CONTENT, DTYPES, FORMAT, HASH, to_bytes

NAME = "a.safetensors"
TIMES, BASE = 32, 1 << 20  # bytes of memory: for each byte of the file, and beside it
ABSURD = (-1, 0, 1, 2, 3, 1 << 31, 1 << 32, (1 << 62) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, 10**400)
WIDTHS = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
NAMES = (
    "weight", "0.weight", "0.bias", "1.running_var", "1.num_batches_tracked", "../x", "/etc/passwd", "C:\\x", "",
    "__metadata__", "extra/a", "optimizer/state", "odd/part", "x" * 2000, "\0", "\x1b[2J", "é", "\ud800", "🙂",
)  # fmt: skip
SCRAPS = (
    b"NaN", b"Infinity", b"-Infinity", b"null", b"true", b"{}", b"[]", b'""', b"1e999", b"-0", b"0.5", b'"\\ud800"',
    b'{"a":"b"}', b'{"a":1}', b'{"a":null}', b'{"format":"pt"}', b"\xff", b'"\\u0000"', b"1" * 5000, b"[" * 100_000,
    b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 10_000, b"[" + b"[]," * 50_000 + b"[]]", b"[" + b"{}," * 50_000 + b"0]",
    b'{"' + b"x" * 100_000 + b'":"y"}', b'{"tinygrad_bn.format":"1"}',
)  # fmt: skip


def network() -> tuple[nn.Module, optim.Optimizer, optim.Schedule]:
    """What the files are loaded into."""
    model = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1), nn.Dropout(0.5, np.random.default_rng(0)))
    optimizer = optim.Adam(model.parameters(), lr=0.1)
    return model, optimizer, optim.StepLR(optimizer, 2)


@cache
def own() -> tuple[bytes, ...]:
    """Files of this package: with a training's state, of weights alone, and without any."""
    model, optimizer, schedule = network()
    (model(np.ones((3, 2), np.float32)) ** 2).sum().backward()
    optimizer.step()
    schedule.step()
    with tempfile.TemporaryDirectory() as folder:
        path, extra = Path(folder, NAME), {"a": (1, None), 2: 10**5000, "b": np.arange(3)}
        rng = {"batches": np.random.Generator(np.random.MT19937(0))}
        checkpoint.save(path, model, optimizer=optimizer, schedule=schedule, generators=rng, extra=extra)
        found = [path.read_bytes()]
        for small in (model, nn.ReLU()):
            small.save(path)
            found.append(path.read_bytes())
    return tuple(found)


def framed(header: bytes, body: bytes, size: int | None = None) -> bytes:
    """A safetensors file with any header and body."""
    return (len(header) if size is None else size).to_bytes(8, "little") + header + body


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and body of a file."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def array(entry: dict[str, Any], body: bytes) -> np.ndarray:
    """The array of an entry of a header, with BF16 as numbers of 16 bits."""
    return np.frombuffer(body[slice(*entry["data_offsets"])], DTYPES[entry["dtype"]]).reshape(entry["shape"])


@st.composite
def foreign(draw: st.DrawFn) -> bytes:
    """A file as other programs write it, with any dtypes; in some, entries and offsets have another order."""
    entries, at = [], 0
    for name in draw(st.lists(st.sampled_from(NAMES[:5]), unique=True)):
        dtype, shape = draw(st.sampled_from(sorted(DTYPES))), draw(st.lists(st.integers(0, 3), max_size=3))
        end = at + WIDTHS.get(dtype, 1) * math.prod(shape)
        entries.append((name, {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}))
        at = end
    head = {"__metadata__": {"format": "pt"}} if draw(st.booleans()) else {}
    text = json.dumps({**head, **dict(draw(st.permutations(entries)))}).encode()
    byte = draw(st.sampled_from((b"\0", b"\1", b"\xff")))  # 0xFF fills floats with NaN
    return framed(text + b" " * draw(st.sampled_from((0, -len(text) % 8))), byte * at)


@st.composite
def lying(draw: st.DrawFn) -> bytes:
    """A header whose entries do not fit the body or each other, or are no entries at all."""
    entries, at = [], 0
    for _ in range(draw(st.integers(1, 4))):
        dtype = draw(st.sampled_from((*sorted(DTYPES), "F8_E4M3", "F4", "C64", "f32", "", "x" * 999)))
        shape = draw(st.lists(st.sampled_from(ABSURD) | st.integers(0, 3), max_size=draw(st.sampled_from((2, 4, 70)))))
        end = at + draw(st.sampled_from((0, WIDTHS.get(dtype, 1) * abs(math.prod(shape)), 4, 8)))
        offsets = draw(
            st.sampled_from(([at, end], [at, end], [0, end], [at + 1, end + 1], [end, at], [at], [at, None]))
        )
        if draw(st.integers(0, 9)) == 0:
            offsets = draw(st.lists(st.sampled_from(ABSURD), min_size=2, max_size=2))
        at = end if end < 1 << 20 else at
        entry: Any = json.dumps({"dtype": dtype, "shape": shape, "data_offsets": offsets}).encode()
        if draw(st.integers(0, 5)) == 0:  # a field of no meaning, or one that stands twice
            entry = entry[:-1] + b', "%s": ' % draw(st.sampled_from((b"x", b"dtype", b"shape"))) + scrap(draw) + b"}"
        if draw(st.integers(0, 9)) == 0:
            entry = scrap(draw)
        entries.append(json.dumps(draw(st.sampled_from(NAMES))).encode() + b": " + entry)
    header = b"{" + b", ".join(entries) + draw(st.sampled_from((b"}", b"}", b"}", b"", b"}}", b",}", b"}   ", b"} x")))
    size = draw(st.sampled_from((None,) * 8 + ABSURD[1:11]))
    body = draw(st.sampled_from((b"\0", b"\1", b"\xff"))) * (at + draw(st.sampled_from((0, 0, 0, 1))))
    return framed(header, body, size)


def scrap(draw: st.DrawFn) -> bytes:
    """A value that is out of place."""
    return draw(st.sampled_from(SCRAPS))


VALUES = st.recursive(
    st.sampled_from((None, True, 0, -1, 1.5, math.nan, math.inf, 10**400, 1 << 64, "", "0x1", "extra/b", "adam"))
    | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(("$array", "$int", "$tuple", "$dict", "$x", "a", "")), inner, max_size=2),
    max_leaves=5,
)  # fmt: skip


@st.composite
def resealed(draw: st.DrawFn) -> bytes:
    """A file of this package with a wrong value in it, and the right SHA-256 for that."""
    header, body = parts(draw(st.sampled_from(own())))
    metadata = header.pop("__metadata__")
    arrays = {name: array(entry, body) for name, entry in header.items()}
    content = json.loads(metadata[CONTENT])
    for _ in range(draw(st.integers(0, 2))):
        if arrays and draw(st.booleans()):
            name = draw(st.sampled_from(sorted(arrays)))
            dtype, shape = (
                draw(st.sampled_from(("f2", "f4", "f8", "i8", "u1", "?"))),
                draw(st.sampled_from((None, (1, 2)))),
            )
            filled = np.full(shape or arrays[name].shape, draw(st.sampled_from((0, 1, -1, math.nan, math.inf))))
            with np.errstate(invalid="ignore"):
                arrays[name] = filled.astype(dtype)
        else:
            replace(draw, content)
    if draw(st.integers(0, 9)) == 0:
        content = draw(VALUES)
    return to_bytes(arrays, content)


def replace(draw: st.DrawFn, tree: Any) -> None:
    """Replace or remove one value somewhere in `tree`."""
    while True:
        places = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        if not places:
            return
        place = draw(st.sampled_from(places))
        if isinstance(tree[place], dict | list) and tree[place] and draw(st.integers(0, 3)):
            tree = tree[place]
        elif draw(st.integers(0, 3)):
            tree[place] = draw(VALUES)
            return
        else:
            del tree[place]
            return


@st.composite
def remarked(draw: st.DrawFn) -> bytes:
    """A file of this package with other metadata."""
    header, body = parts(draw(st.sampled_from(own())))
    key = draw(st.sampled_from((FORMAT, CONTENT, HASH)))
    metadata = dict(header["__metadata__"])
    if draw(st.booleans()):
        del metadata[key]
    else:
        metadata[key] = draw(
            st.sampled_from(("", "2", "0", "-1", "1" * 5000, "[" * 100_000, "null", "0" * 64, "\x1b[2J"))
        )
    return framed(json.dumps({**header, "__metadata__": metadata}).encode(), body)


OWN = st.deferred(lambda: st.sampled_from(own()))
CONTENTS = st.one_of(
    OWN, foreign(), lying(), lying(), lying(), resealed(), resealed(), remarked(),
    OWN.flatmap(damaged), foreign().flatmap(damaged), lying().flatmap(damaged),
    st.binary(max_size=60), st.binary(max_size=40).map(lambda noise: b"PK\3\4" + noise),
)  # fmt: skip


def read(folder: Path) -> checkpoint.Contents:
    """Read and print a file, and load it if it fits. What is refused changes nothing, and costs little memory."""
    path = folder / NAME
    try:
        contents = checkpoint.read(path)
    finally:
        peak, size = tracemalloc.get_traced_memory()[1], path.stat().st_size
        assert peak <= BASE + TIMES * size, f"{peak} bytes for a file of {size}"
    assert len(str(contents)) < 1000 + 100 * size
    model, optimizer, schedule = network()
    rng = {"batches": np.random.Generator(np.random.MT19937(1))}
    before = state(model, optimizer, schedule, rng)
    try:
        whole = "batches" in contents.generators
        others = {"optimizer": optimizer, "schedule": schedule, "generators": rng} if whole else {}
        checkpoint.apply(contents, model, **others)
    except checkpoint.CheckpointError:
        assert state(model, optimizer, schedule, rng) == before
    return contents


def state(model: nn.Module, optimizer: optim.Optimizer, schedule: optim.Schedule, rng: Any) -> str:
    """All that loading may change."""
    drawn = rng["batches"].bit_generator.state
    return repr(
        (model.state_dict(), optimizer.state_dict(), schedule.state_dict(), drawn, model[2].rng.bit_generator.state)
    )


def verify(result: checkpoint.Contents, found: Files) -> None:
    """The arrays are those of the file, bit for bit."""
    header, body = parts(found[NAME])
    header.pop("__metadata__", None)
    assert set(result.model) <= set(header)
    assert set(result.model) == set(header) or result.metadata
    for name, got in result.model.items():
        want = array(header[name], body)
        assert got.flags.writeable
        assert got.dtype.isnative
        if header[name]["dtype"] == "BF16":
            assert not (got.view(np.uint32) & 0xFFFF).any()
            got = (got.view(np.uint32) >> 16).astype(np.uint16)
        assert (got.shape, got.tobytes()) == (want.shape, want.tobytes())


CHECKPOINT = Target("checkpoint", one_file(NAME, CONTENTS), read, checkpoint.CheckpointError, verify, 1 << 26)
