"""`export`: an ONNX file of what a module computes in evaluation mode."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from tinygrad_bn.arguments import expect_flags, full_name
from tinygrad_bn.files import replacing
from tinygrad_bn.nn.module import Module
from tinygrad_bn.onnx.errors import OnnxError, library
from tinygrad_bn.onnx.tracing import Trace, Traced
from tinygrad_bn.onnx.translations import TRANSLATIONS
from tinygrad_bn.tensor import Array, Tensor

OPSET, IR_VERSION = 18, 10  # of files that are written
BY_SHAPE = ("reshape", "broadcast_to", "sum_to")  # ops whose translation looks at both shapes
BATCH = "batch"  # the name of the first axis, if it may have any length


def export(model: Module, example: Any, path: str | os.PathLike[str], *, dynamic_batch: bool = True) -> None:
    """Write what `model` computes in evaluation mode as an ONNX file, with version 18 of the standard operators.

    The module runs once, and each op on what comes from its input is written: by its translation, or, if it has none
    and is fused, as its composition. A second run with twice as many samples tells which sizes follow the batch.

    Args:
        model: a module of one input and one output.
        example: an input, a tensor or an array (N, ...); only its shape and dtype matter.
        path: the file. One that is there is replaced at the end, and stays after an error.
        dynamic_batch: let the first axis have any length; else it is that of `example`.

    Parameters and buffers keep their names, but for those of a BatchNorm that is no part of a larger module: `load`
    makes it one. BatchNorm keeps eps and its running statistics; of its momentum an ONNX
    file for evaluation says nothing.

    Raises:
        OnnxError: the model computes what ONNX has no operator for, or what depends on the values of its input.
        OSError: the file cannot be written.
        ImportError: the package `onnx` is not installed.
    """
    onnx = library()
    if not isinstance(model, Module):
        raise TypeError(f"export takes a module; got {full_name(model)}")
    expect_flags(dynamic_batch=dynamic_batch)
    x = np.asarray((example if isinstance(example, Tensor) else Tensor(example)).numpy())
    if dynamic_batch and (not x.ndim or not len(x)):
        raise OnnxError(f"an example of shape {x.shape} has no batch; give one, or dynamic_batch=False")
    trace = Trace(model, x)
    proto = _model(trace, Trace(model, np.concatenate([x, x])) if dynamic_batch else trace)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise OnnxError(f"ONNX has no operators for this model as it stands: {error}") from error
    with replacing(Path(path)) as beside:
        beside.write_bytes(proto.SerializeToString())


def _model(trace: Trace, twice: Trace) -> Any:
    """The file's contents from a trace, and one of twice as many samples, or the same."""
    onnx = library()
    helper = onnx.helper
    if [call.op for call in trace.calls] != [call.op for call in twice.calls] or not _same(trace, twice):
        raise OnnxError("the model computes something else for another size of the batch; use dynamic_batch=False")
    weights, nodes = dict(trace.constants), []
    for call, double in zip(trace.calls, twice.calls, strict=True):
        nodes += TRANSLATIONS[call.op](call, double, weights)
        if list(call.inputs) != list(double.inputs) or (call.op not in BY_SHAPE and call.params != double.params):
            raise OnnxError(f"a number or an option of the op {call.op} follows the batch; use dynamic_batch=False")
    used = {name for node in nodes for name in node.input}
    arrays = [
        onnx.numpy_helper.from_array(np.asarray(a, order="C"), name) for name, a in weights.items() if name in used
    ]
    # What is no parameter or buffer is a constant to other programs too, which may train initializers.
    norms = [name.removesuffix("running_mean") for name in trace.owned if name.endswith("running_mean")]
    names = trace.owned.union(*({f"{norm}weight", f"{norm}bias"} for norm in norms))
    own = [array for array in arrays if array.name in names]
    others = [array for array in arrays if array.name not in names]
    fixed = [helper.make_node("Constant", [], [array.name], value=array) for array in others]
    batch = trace.input.shape[0] if trace.input.ndim else 0
    ends = [_value(trace.input, twice.input, batch)], [_value(trace.output, twice.output, batch)]
    graph = helper.make_graph([*fixed, *nodes], "model", *ends, own)
    versions = [helper.make_opsetid("", OPSET)]
    return helper.make_model(graph, producer_name="tinygrad_bn", ir_version=IR_VERSION, opset_imports=versions)


def _same(trace: Trace, twice: Trace) -> bool:
    """Whether the constants of both are the same."""

    def equal(a: Array, b: Array | None) -> bool:
        return b is not None and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")

    return all(equal(array, twice.constants.get(name)) for name, array in trace.constants.items())


def _value(t: Traced, double: Traced, batch: int) -> Any:
    """The description of an input or output. A size that is that of the batch has its name, others that follow none."""
    helper = library().helper
    sizes: list[int | str | None] = []
    for n, m in zip(t.shape, double.shape, strict=True):
        sizes.append(n if n == m else BATCH if (n, m) == (batch, 2 * batch) else None)
    return helper.make_tensor_value_info(t.name, helper.np_dtype_to_tensor_dtype(t.dtype), sizes)
