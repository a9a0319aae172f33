"""ONNX models: read, and made a module of. Needs the package `onnx`."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from tests.fuzz.mutations import damaged
from tests.fuzz.target import Files, Target, one_file
from tinygrad_bn import manual_seed, nn
from tinygrad_bn.onnx import Graph, OnnxError, export, load
from tinygrad_bn.onnx.operators import OPERATORS

onnx = pytest.importorskip("onnx")  # pytest looks for doctests here
helper = onnx.helper

NAME = "a.onnx"
TIMES, BASE = 32, 1 << 21  # bytes of memory: for each byte of the file, and beside it
ABSURD = (-1, 0, 1, 2, 3, 1 << 31, 1 << 32, (1 << 62) + 1, (1 << 63) - 1, -(1 << 63))
NAMES = ("x", "y", "w", "0.weight", "1.running_var", "", "../x", "/etc/passwd", "a" * 2000, "\0", "\x1b[2J", "é", "🙂",
         "training", "forward", "_nodes", "__class__", "inputs", "_last", "__deepcopy__")  # fmt: skip
NUMBERS = st.sampled_from((0.0, -1.0, 1e-5, 0.9, 1e38, float("inf"), float("nan")))


@cache
def own() -> tuple[bytes, ...]:
    """Files of this package."""
    manual_seed(0)
    models = [
        (nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2)), (3, 2)),
        (nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.GELU(), nn.MaxPool2d(2), nn.Flatten()), (2, 1, 5, 5)),
    ]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for model, shape in models:
            export(model, np.ones(shape, np.float32), Path(folder, NAME))
            found.append(Path(folder, NAME).read_bytes())
    return tuple(found)


@st.composite
def tensors(draw: st.DrawFn, name: str) -> Any:
    """A tensor, whose elements are as many as its shape says, or are not."""
    tensor = onnx.TensorProto(name=name, data_type=draw(st.sampled_from((1, 1, 1, 7, 9, 10, 16, 11, 8, 14, 17, 0, 99))))
    sizes = st.integers(0, 3) if draw(st.booleans()) else st.sampled_from(ABSURD)
    tensor.dims.extend(draw(st.lists(sizes, max_size=draw(st.sampled_from((1, 2, 4, 70))))))
    kind, count = draw(st.sampled_from(("raw", "raw", "typed", "none", "external"))), draw(st.integers(0, 9))
    if kind == "raw":
        tensor.raw_data = draw(st.sampled_from((b"\0", b"\1", b"\xff"))) * draw(st.sampled_from((count, 4 * count, 8)))
    elif kind == "typed":
        tensor.float_data.extend([draw(NUMBERS)] * count)
        tensor.int32_data.extend([draw(st.sampled_from((0, 1, 255, 70000, -1)))] * count)
        tensor.int64_data.extend([draw(st.sampled_from(ABSURD))] * count)
    elif kind == "external":
        tensor.data_location = onnx.TensorProto.EXTERNAL
        place = draw(st.sampled_from(("../../etc/passwd", "/etc/passwd", NAME)))
        tensor.external_data.add(key="location", value=place)
    return tensor


@st.composite
def attributes(draw: st.DrawFn) -> Any:
    """An attribute of any kind."""
    known = ("axis", "axes", "epsilon", "momentum", "kernel_shape", "pads", "strides", "to", "value", "perm", "alpha")
    name = draw(st.sampled_from((*known, "opset", "training", *NAMES[5:9])))
    attribute = onnx.AttributeProto(name=name, type=draw(st.sampled_from((0, 1, 2, 3, 4, 5, 6, 7, 8, 11))))
    attribute.f, attribute.i = draw(NUMBERS), draw(st.sampled_from(ABSURD))
    attribute.s = draw(st.sampled_from((b"SAME_UPPER", b"\xff", b"")))
    attribute.ints.extend(draw(st.lists(st.sampled_from(ABSURD), max_size=4)))
    attribute.floats.extend(draw(st.lists(NUMBERS, max_size=3)))
    attribute.strings.extend([attribute.s] * 2)
    attribute.t.CopyFrom(draw(tensors("t")))
    if draw(st.integers(0, 9)) == 0:  # a graph in a graph, and so on
        inner = attribute
        for _ in range(draw(st.sampled_from((1, 8, 20)))):
            inner = inner.g.node.add(op_type="If").attribute.add(name="then_branch", type=5)
    return attribute


@st.composite
def lying(draw: st.DrawFn) -> bytes:
    """A model whose parts do not fit each other."""
    names = st.sampled_from(NAMES[: draw(st.sampled_from((5, len(NAMES))))])
    operators = st.sampled_from((*sorted(OPERATORS), "BatchNormalization", "If", "", "Evil\x1b[2J", "x" * 5000))
    graph = onnx.GraphProto(name="g")
    graph.input.extend(onnx.ValueInfoProto(name=n) for n in draw(st.lists(names, max_size=2)))
    graph.output.extend(onnx.ValueInfoProto(name=n) for n in draw(st.lists(names, max_size=2)))
    graph.initializer.extend(draw(tensors(n)) for n in draw(st.lists(names, max_size=4)))
    for _ in range(draw(st.integers(0, 4))):
        node = graph.node.add(
            op_type=draw(operators), name=draw(names), domain=draw(st.sampled_from(("", "", "", "x")))
        )
        node.input.extend(draw(st.lists(names, max_size=5)))
        node.output.extend(draw(st.lists(names, max_size=2)))
        node.attribute.extend(draw(st.lists(attributes(), max_size=2)))
    model = onnx.ModelProto(ir_version=draw(st.sampled_from((0, 8, 99))), graph=graph)
    for version in draw(st.sampled_from(([18], [18], [18], [], [0], [99], [(1 << 63) - 1], [7, 18]))):
        model.opset_import.append(helper.make_opsetid(draw(st.sampled_from(("", "", "ai.onnx", "x"))), version))
    content: bytes = model.SerializeToString()
    return content


@st.composite
def contents(draw: st.DrawFn) -> bytes:
    """Models as they should be, lying or damaged ones, and noise."""
    kind = draw(st.sampled_from(("own", "damaged", "damaged", "damaged", "lying", "lying", "damaged lie", "noise")))
    if kind == "noise":
        return draw(st.binary(max_size=200))
    content = draw(lying()) if "l" in kind[-5:] else draw(st.sampled_from(own()))
    return draw(damaged(content)) if kind.startswith("damaged") else content


def verify(graph: Graph, files: Files) -> None:
    """What was read is in the file: there are no more bytes of weights than bytes."""
    assert isinstance(graph, Graph)
    # bfloat16 is half as long in the file, and num_batches_tracked and integers of int32_data may be shorter
    held = sum(t.numpy().nbytes for _, t in graph.named_tensors() if t.dtype.kind == "f")
    assert held <= 4 * len(files[NAME])
    assert repr(graph).replace("\n", "").isprintable()


MODEL = Target(
    "onnx", one_file(NAME, contents()), lambda folder: load(folder / NAME), OnnxError, verify, TIMES * (1 << 15) + BASE
)
