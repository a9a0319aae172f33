"""Files that are no checkpoints, or lie about what they hold: our own error, which names the file, and no memory."""

import json
import tracemalloc

import numpy as np
import pytest

from tinygrad_bn import nn
from tinygrad_bn.checkpoint import CheckpointError, files, read, save_model


def entry(shape="[1]", offsets="[0, 4]", dtype="F32", more=""):
    return f'{{"dtype": "{dtype}", "shape": {shape}, "data_offsets": {offsets}{more}}}'


X, NESTED = ', "x": ', "[" * 100_000 + "]" * 100_000
HEADERS = {  # and bytes behind it
    "overlap": (f'{{"a": {entry()}, "b": {entry()}}}', 4),
    "hole": (f'{{"a": {entry()}, "b": {entry("[1]", "[8, 12]")}}}', 12),
    "behind the end": (f'{{"a": {entry("[2]", "[0, 8]")}}}', 4),
    "bytes left": (f'{{"a": {entry()}}}', 5),
    "backward": (f'{{"a": {entry("[1]", "[4, 0]")}}}', 4),
    "shape and offsets differ": (f'{{"a": {entry("[2]")}}}', 4),
    "a product that overflows": (f'{{"a": {entry("[4611686018427387904, 4]", "[0, 0]")}}}', 0),
    "an axis that overflows": (f'{{"a": {entry("[0, 18446744073709551615]", "[0, 0]")}}}', 0),
    "an array that overflows": (f'{{"a": {entry("[0, 4611686018427387904, 2]", "[0, 0]")}}}', 0),
    "too many axes": (f'{{"a": {entry(str([1] * 70))}}}', 4),
    "a negative axis": (f'{{"a": {entry("[-1]")}}}', 4),
    "a name twice": (f'{{"a": {entry("[0]", "[0, 0]")}, "a": {entry("[0]", "[0, 0]")}}}', 0),
    "an unknown dtype": (f'{{"a": {entry(dtype="F31")}}}', 4),
    "a dtype that NumPy lacks": (f'{{"a": {entry("[4]", dtype="F8_E4M3")}}}', 4),
    "booleans of 2": (f'{{"a": {entry("[4]", dtype="BOOL")}}}', 4),
    "NaN": (f'{{"a": {entry("[NaN]")}}}', 4),
    "Infinity": (f'{{"a": {entry("[Infinity]")}}}', 4),
    "a lone surrogate": (f'{{"\\ud800": {entry()}}}', 4),
    "control characters": (f'{{"\\u001b[2J": {entry("[1]", "[4, 0]")}}}', 4),
    "no entry": ('{"a": 1}', 0),
    "no dictionary": ("[]", 0),
    "nothing": ("", 0),
    "no JSON": ("x" * 50, 0),
    "nested": (NESTED, 0),
    "nested in a field of no meaning": (f'{{"a": {entry(more=f"{X}{NESTED}")}}}', 4),
    "wide": ('{"a": [%s[]]}' % ("[]," * 100_000), 0),  # as Python's objects it takes 24 times the memory
    "metadata of another type": ('{"__metadata__": {"a": 1}}', 0),
    "metadata is a list": ('{"__metadata__": []}', 0),
    "a path": (f'{{"../../x": {entry()}}}', 4),
    "half of our metadata": ('{"__metadata__": {"tinygrad_bn.format": "1"}}', 0),
}


def refused(path):
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as caught:
            read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert text.isprintable()
    assert len(text) < 1000
    assert peak < 500_000 + 3 * path.stat().st_size
    return text


@pytest.fixture(autouse=True, scope="module")
def imports(tmp_path_factory):
    read(save_model(tmp_path_factory.mktemp("any") / "a.safetensors", nn.Linear(1, 1)))


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_lie(name, tmp_path):
    header, size = HEADERS[name]
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + b"\2" * size)
    refused(path)


@pytest.mark.parametrize("size", [3, 1 << 20, 100_000_001, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_a_header_of_another_size(size, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(size.to_bytes(8, "little") + f'{{"a": {entry()}}}'.encode() + bytes(4))
    text = refused(path)
    assert size == 3 or f"its header claims {size:,} bytes, of 73 in the file" in text


@pytest.mark.parametrize("content", [b"", b"\0", b"\0" * 8, b"\x89HDF\r\n\x1a\n" * 9, b"GGUF" * 9, b"\x93NUMPY" * 9])
def test_other_kinds_of_files(content, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(content)
    refused(tmp_path / "a.safetensors")


GOOD = {
    "keys": ["a"], "optimizer": None, "schedule": None, "generators": None, "extra": None, "arrays": None,
    "metadata": {"package_version": "0", "conventions": {}},
}  # fmt: skip
FORMS = {
    "no content": None,
    "a list": [],
    "a key that is missing": {"keys": ["b"]},
    "a key that is unhashable": {"keys": [[]]},
    "the arrays are no keys": {"keys": []},
    "an optimizer that is a text": {"optimizer": "adam"},
    "generators in a list": {"generators": [1]},
    "a generator that is a number": {"generators": {"a": 1}},
    "a generator with a number as name": {"generators": {"$dict": [[1, {}]]}},
    "arrays that are numbers": {"arrays": {"a": 1}},
    "an unknown kind": {"extra": {"$x": 1}},
    "an array that is missing": {"extra": {"$array": "b"}},
    "an integer that is none": {"extra": {"$int": "x"}},
    "an unhashable key": {"extra": {"$dict": [[[], 1]]}},
    "metadata in a list": {"metadata": []},
    "no conventions": {"metadata": {"package_version": "0"}},
    "conventions in a list": {"metadata": {"package_version": "0", "conventions": []}},
    "an eps that is a text": {"metadata": {"package_version": "0", "conventions": {"a": {"eps": "x"}}}},
    "a version that is a number": {"metadata": {"package_version": 0, "conventions": {}}},
    "a class that is a number": {"metadata": {"package_version": "0", "conventions": {}, "optimizer": 1}},
}


@pytest.mark.parametrize("name", FORMS)
def test_contents_of_a_wrong_form_with_the_right_hash(name, tmp_path):
    path, arrays = tmp_path / "a.safetensors", {"a": np.ones(2)}
    path.write_bytes(files.to_bytes(arrays, GOOD))
    str(read(path))
    wrong = FORMS[name]
    path.write_bytes(files.to_bytes(arrays, {**GOOD, **wrong} if isinstance(wrong, dict) else wrong))
    assert "its contents have a wrong form: " in refused(path)


def test_contents_that_are_nested_too_deeply(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(
            files.json, "dumps", lambda value, dumps=json.dumps: "[" * 100_000 if value is GOOD else dumps(value)
        )
        path.write_bytes(files.to_bytes({"a": np.ones(2)}, GOOD))
    assert "its contents have a wrong form: RecursionError" in refused(path)
