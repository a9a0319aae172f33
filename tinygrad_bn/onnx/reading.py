"""An ONNX file as checked, plain data: nothing in it is believed that was not looked at.

Memory is taken for what the file holds, never for what a shape in it claims. Data in other files are refused: their
paths could name any file of the machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinygrad_bn.arguments import shown
from tinygrad_bn.onnx.errors import OnnxError, library
from tinygrad_bn.tensor import Array

OPSETS = range(7, 29)  # versions of the standard operators that are read
# Types of tensors by ONNX' number: NumPy's dtype, and the field that holds the elements if `raw_data` does not.
DTYPES = {
    1: ("float32", "float_data"), 2: ("uint8", "int32_data"), 3: ("int8", "int32_data"), 4: ("uint16", "int32_data"),
    5: ("int16", "int32_data"), 6: ("int32", "int32_data"), 7: ("int64", "int64_data"), 9: ("bool", "int32_data"),
    10: ("float16", "int32_data"), 11: ("float64", "double_data"), 12: ("uint32", "uint64_data"),
    13: ("uint64", "uint64_data"),
}  # fmt: skip
EXTERNAL = 1  # the data_location of a tensor in another file


class Node(NamedTuple):
    """A call of an operator: names of its inputs ("" for none) and outputs, and its attributes."""

    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    name: str

    def __str__(self) -> str:
        operator = self.operator if self.operator.isalnum() and len(self.operator) < 50 else shown(self.operator)
        return f"{operator} {shown(self.name)}" if self.name else operator


class Model(NamedTuple):
    """What a file says: nodes in the order of their computation; each reads only what is there by then."""

    opset: int
    nodes: tuple[Node, ...]
    arrays: dict[str, Array]  # initializers
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def read(path: Path) -> Model:
    """The model in a file. Raises OnnxError, which names the file; OSError if it cannot be read."""
    onnx = library()
    from google.protobuf.message import DecodeError

    data = path.read_bytes()
    try:
        return checked(onnx.ModelProto.FromString(data))
    except DecodeError as error:
        raise OnnxError(f"{path} is no ONNX model, or it is damaged: {error}") from error
    except OnnxError as error:
        raise OnnxError(f"{path}: {error}") from error
    except (ValueError, TypeError, LookupError, OverflowError) as error:  # of protobuf and NumPy
        raise OnnxError(f"{path} is damaged: {error!r:.300}") from error


def checked(proto: Any) -> Model:
    """A ModelProto as plain data. Raises OnnxError, or an error of protobuf or NumPy, if anything does not fit."""
    opset = _opset(proto)
    graph = proto.graph
    for what, there in (("functions of its own", proto.functions), ("sparse weights", graph.sparse_initializer)):
        if there:
            raise OnnxError(f"it has {what}, which are not read")
    arrays: dict[str, Array] = {}
    for tensor in graph.initializer:
        if not _text(tensor.name) or tensor.name in arrays:
            raise OnnxError(f"the name {shown(tensor.name)} of an initializer is missing, or stands twice")
        arrays[tensor.name] = array_of_proto(tensor)
    inputs = tuple(_text(value.name) for value in graph.input if value.name not in arrays)
    nodes = tuple(_node(node) for node in graph.node)
    outputs = tuple(_text(value.name) for value in graph.output)
    _expect_order(nodes, {*arrays, *inputs}, outputs)
    if len(set(inputs)) < len(inputs) or "" in inputs or not outputs:
        raise OnnxError("its inputs need a name each, and it needs an output")
    return Model(opset, nodes, arrays, inputs, outputs)


def _text(value: Any) -> str:
    """A name in a file. Raises OnnxError for bytes that are no UTF-8, which protobuf gives as they are."""
    if not isinstance(value, str):
        raise OnnxError(f"the name {shown(value)} is no text")
    return value


def _opset(proto: Any) -> int:
    versions = {entry.domain: entry.version for entry in proto.opset_import}
    standard = [version for domain, version in versions.items() if domain in ("", "ai.onnx")]
    if not standard or standard[0] not in OPSETS:
        got = f"version {standard[0]}" if standard else "none"
        raise OnnxError(f"it uses {got} of the standard operators; {OPSETS[0]} to {OPSETS[-1]} are read")
    return int(standard[0])


def _node(proto: Any) -> Node:
    if proto.domain not in ("", "ai.onnx"):
        raise OnnxError(f"the operator {shown(proto.op_type)} of the domain {shown(proto.domain)} is not known")
    names = [_text(attribute.name) for attribute in proto.attribute]
    if len(set(names)) < len(names):
        raise OnnxError(f"an attribute of {shown(proto.op_type)} stands twice")
    attributes = {attribute.name: _attribute(attribute) for attribute in proto.attribute}
    inputs, outputs = (tuple(map(_text, names)) for names in (proto.input, proto.output))
    return Node(_text(proto.op_type), inputs, outputs, attributes, _text(proto.name))


def _attribute(proto: Any) -> Any:
    kinds = {1: "f", 2: "i", 3: "s", 4: "t", 6: "floats", 7: "ints", 8: "strings"}
    if proto.type not in kinds or proto.ref_attr_name:
        raise OnnxError(f"the attribute {shown(proto.name)} is a graph, or of another kind that is not read")
    value = getattr(proto, kinds[proto.type])
    match kinds[proto.type]:
        case "s":
            return value.decode()
        case "t":
            return array_of_proto(value)
        case "strings":
            return tuple(text.decode() for text in value)
        case "floats" | "ints":
            return tuple(value)
    return value


def array_of_proto(tensor: Any) -> Array:
    """The array of a TensorProto, whose elements have to be as many as its shape says."""
    where = f"the tensor {shown(tensor.name)}"
    if tensor.data_location == EXTERNAL or tensor.external_data:
        raise OnnxError(f"{where} lies in another file; save the model with its data in one file")
    if tensor.data_type == 16:  # bfloat16: the upper half of a float32
        return (_elements(tensor, where, "uint16", "int32_data").astype(np.uint32) << 16).view(np.float32)
    if tensor.data_type not in DTYPES:
        raise OnnxError(f"{where} is of the type {tensor.data_type}, which is not read: {', '.join(_names())} are")
    dtype, field = DTYPES[tensor.data_type]
    if dtype == "float16":
        return _elements(tensor, where, "uint16", field).view(np.float16)
    return _elements(tensor, where, dtype, field)


def _names() -> Iterator[str]:
    return (dtype for dtype, _ in DTYPES.values())


def _elements(tensor: Any, where: str, dtype: str, field: str) -> Array:
    shape, stored = tuple(tensor.dims), np.dtype(dtype)
    count = math.prod(shape)
    if any(n < 0 for n in shape) or len(shape) > 64:
        raise OnnxError(f"{where} has the shape {shown(shape)}")
    if tensor.raw_data:
        if len(tensor.raw_data) != count * stored.itemsize:
            raise OnnxError(f"{where} of shape {shown(shape)} has {len(tensor.raw_data):,} bytes of {dtype}")
        flat = np.frombuffer(tensor.raw_data, stored.newbyteorder("<"))
        if dtype == "bool" and (flat.view(np.uint8) > 1).any():
            raise OnnxError(f"{where} has booleans that are neither 0 nor 1")
        return flat.astype(stored).reshape(shape)
    values = getattr(tensor, field)
    if len(values) != count:
        raise OnnxError(f"{where} of shape {shown(shape)} has {len(values):,} elements")
    return np.array(values, stored).reshape(shape)  # OverflowError for numbers that the dtype cannot hold


def _expect_order(nodes: tuple[Node, ...], known: set[str], outputs: tuple[str, ...]) -> None:
    """Raise OnnxError unless each node reads what is known by then, and makes something new."""
    for node in nodes:
        for name in node.inputs:
            if name and name not in known:
                raise OnnxError(f"{node} reads {shown(name)}, which nothing before it makes")
        for name in filter(None, node.outputs):
            if name in known:
                raise OnnxError(f"{node} makes {shown(name)}, which is there already")
            known.add(name)
    for name in outputs:
        if name not in known:
            raise OnnxError(f"nothing makes its output {shown(name)}")
