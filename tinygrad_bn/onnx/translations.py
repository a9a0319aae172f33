"""How each op is written as nodes of ONNX, version 18 of the standard operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tinygrad_bn.onnx.errors import OnnxError, library
from tinygrad_bn.tensor import Array


class Call(NamedTuple):
    """A call of an op that is to be written down: names of its operands, or numbers or None, and of its result."""

    op: str
    inputs: Sequence[Any]
    output: str
    shapes: Sequence[tuple[int, ...]]  # of the operands
    dtypes: Sequence[Any]  # of the operands; None for a number
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    params: dict[str, Any]


Weights = dict[str, Array]  # constants that a translation adds
# Gets the call, the same call with twice as many samples, and the constants; gives nodes.
Translation = Callable[[Call, Call, Weights], list[Any]]

TRANSLATIONS: dict[str, Translation] = {}


def translation(*names: str) -> Callable[[Translation], Translation]:
    """Enter a function for these ops."""

    def enter(function: Translation) -> Translation:
        TRANSLATIONS.update(dict.fromkeys(names, function))
        return function

    return enter


def node(operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> Any:
    """A node with one output."""
    return library().helper.make_node(operator, list(inputs), [output], **attributes)


def constant(weights: Weights, name: str, value: Any, dtype: Any) -> str:
    """A constant under a name of its own."""
    weights[name] = np.asarray(value, dtype)
    return name


def named(call: Call, weights: Weights, dtype: Any = None) -> list[str]:
    """The operands by name: numbers become constants of this dtype, by default that of the result."""
    return [
        o if isinstance(o, str) else constant(weights, f"{call.output}_{i}", o, dtype or call.dtype)
        for i, o in enumerate(call.inputs)
        if o is not None
    ]


SAME_NAMES = {
    "abs": "Abs", "add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "neg": "Neg", "exp": "Exp", "log": "Log",
    "sqrt": "Sqrt", "pow": "Pow", "relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh", "softplus": "Softplus",
    "sign": "Sign", "erf": "Erf", "maximum": "Max", "minimum": "Min", "where": "Where", "matmul": "MatMul",
}  # fmt: skip
COMPARISONS = {
    "equal": "Equal", "less": "Less", "less_equal": "LessOrEqual", "greater": "Greater",
    "greater_equal": "GreaterOrEqual",
}  # fmt: skip


def cast(inputs: Sequence[str], call: Call, dtype: Any) -> tuple[list[Any], list[str]]:
    """Nodes that convert the operands of another dtype than this one, and the names of all."""
    kind = library().helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    nodes, names = [], []
    for i, (name, own) in enumerate(zip(inputs, call.dtypes, strict=True)):
        differs = own is not None and own != dtype
        names.append(f"{call.output}_cast_{i}" if differs else name)
        if differs:
            nodes.append(node("Cast", [name], names[-1], to=kind))
    return nodes, names


@translation(*SAME_NAMES)
def _by_name(call: Call, twice: Call, weights: Weights) -> list[Any]:
    """ONNX does not promote: operands get the dtype of the result."""
    inputs = named(call, weights)
    nodes, names = cast(inputs, call, call.dtype)
    if call.op == "where":
        nodes, names = [n for n in nodes if n.input[0] != inputs[0]], [inputs[0], *names[1:]]
    return [*nodes, node(SAME_NAMES[call.op], names, call.output)]


@translation(*COMPARISONS, "not_equal")
def _comparison(call: Call, twice: Call, weights: Weights) -> list[Any]:
    dtypes = [dtype for dtype in call.dtypes if dtype is not None]
    fractions = any(isinstance(o, float) and not o.is_integer() for o in call.inputs)
    dtype = np.dtype(np.float64) if fractions and dtypes[0].kind != "f" else np.result_type(*dtypes)
    nodes, names = cast(named(call, weights, dtype), call, dtype)
    if call.op == "not_equal":
        equal = f"{call.output}_equal"
        return [*nodes, node("Equal", names, equal), node("Not", [equal], call.output)]
    return [*nodes, node(COMPARISONS[call.op], names, call.output)]


@translation("rsqrt", "expm1", "log1p", "erfc")
def _in_two(call: Call, twice: Call, weights: Weights) -> list[Any]:
    """1 / √x, exp(x) − 1, log(1 + x) and 1 − erf(x)."""
    inner, (x,), one = f"{call.output}_inner", call.inputs, constant(weights, f"{call.output}_one", 1, call.dtype)
    match call.op:
        case "rsqrt":
            return [node("Sqrt", [x], inner), node("Reciprocal", [inner], call.output)]
        case "expm1":
            return [node("Exp", [x], inner), node("Sub", [inner, one], call.output)]
        case "log1p":
            return [node("Add", [x, one], inner), node("Log", [inner], call.output)]
    return [node("Erf", [x], inner), node("Sub", [one, inner], call.output)]


@translation("clip")
def _clip(call: Call, twice: Call, weights: Weights) -> list[Any]:
    limits = (call.params.get("min"), call.params.get("max"))
    names = ["" if v is None else constant(weights, f"{call.output}_{i}", v, call.dtype) for i, v in enumerate(limits)]
    return [node("Clip", [call.inputs[0], *names], call.output)]


@translation("astype", "to")
def _cast(call: Call, twice: Call, weights: Weights) -> list[Any]:
    if call.op == "to":
        return [node("Identity", call.inputs, call.output)]
    kind = library().helper.np_dtype_to_tensor_dtype(np.dtype(call.dtype))
    return [node("Cast", call.inputs, call.output, to=kind)]


# ---- shapes ---------------------------------------------------------------------------------------------


def _sizes(shape: Sequence[int], double: Sequence[int], what: str) -> list[int]:
    """A shape for Reshape, with -1 for the size that follows the batch."""
    differs = [i for i, (n, m) in enumerate(zip(shape, double, strict=True)) if n != m]
    if len(differs) > 1:
        raise OnnxError(f"several sizes of {what} follow the batch; use dynamic_batch=False")
    return [-1 if i in differs else n for i, n in enumerate(shape)]


@translation("reshape")
def _reshape(call: Call, twice: Call, weights: Weights) -> list[Any]:
    shape = constant(weights, f"{call.output}_shape", _sizes(call.shape, twice.shape, "a reshape"), np.int64)
    return [node("Reshape", [call.inputs[0], shape], call.output, allowzero=0)]


@translation("transpose")
def _transpose(call: Call, twice: Call, weights: Weights) -> list[Any]:
    axes = call.params.get("axes")
    given = {} if axes is None else {"perm": [a % len(call.shape) for a in axes]}
    return [node("Transpose", call.inputs, call.output, **given)]


@translation("broadcast_to")
def _broadcast_to(call: Call, twice: Call, weights: Weights) -> list[Any]:
    if call.shape != twice.shape:
        raise OnnxError("a size that is broadcast to follows the batch; use dynamic_batch=False")
    shape = constant(weights, f"{call.output}_shape", call.shape, np.int64)
    return [node("Expand", [call.inputs[0], shape], call.output)]


@translation("concatenate")
def _concatenate(call: Call, twice: Call, weights: Weights) -> list[Any]:
    return [node("Concat", named(call, weights), call.output, axis=call.params.get("axis", 0))]


@translation("stack")
def _stack(call: Call, twice: Call, weights: Weights) -> list[Any]:
    axis = constant(weights, f"{call.output}_axis", [call.params.get("axis", 0)], np.int64)
    parts = [f"{call.output}_part_{i}" for i in range(len(call.inputs))]
    wide = [node("Unsqueeze", [x, axis], part) for x, part in zip(call.inputs, parts, strict=True)]
    return [*wide, node("Concat", parts, call.output, axis=call.params.get("axis", 0))]


@translation("pad")
def _pad(call: Call, twice: Call, weights: Weights) -> list[Any]:
    before, after = zip(*call.params["width"], strict=True) if call.params["width"] else ((), ())
    pads = constant(weights, f"{call.output}_pads", [*before, *after], np.int64)
    value = constant(weights, f"{call.output}_value", call.params.get("value", 0.0), call.dtype)
    return [node("Pad", [call.inputs[0], pads, value], call.output)]


@translation("getitem")
def _getitem(call: Call, twice: Call, weights: Weights) -> list[Any]:
    """Slices and integers; then integers lose their axes, and None makes new ones."""
    index = call.params["index"]
    parts = index if isinstance(index, tuple) else (index,)
    plain = (slice, int, np.integer, type(None), type(...))
    if any(not isinstance(part, plain) or isinstance(part, bool) for part in parts):
        raise OnnxError(
            "an index that is an array may depend on the input's values; only slices and integers are written"
        )
    (shape,) = call.shapes
    if ... in parts:
        at, taken = parts.index(...), sum(part is not None and part is not ... for part in parts)
        parts = (*parts[:at], *(slice(None),) * (len(shape) - taken), *parts[at + 1 :])
    starts: list[int] = []
    ends: list[int] = []
    axes: list[int] = []
    steps: list[int] = []
    gone: list[int] = []  # axes that an integer takes
    new: list[int] = []
    axis = kept = 0
    for part in parts:
        if part is None:
            new.append(kept)
            kept += 1
            continue
        single = not isinstance(part, slice)
        begin, step = (part, 1) if single else (part.start, part.step or 1)
        end = (part + 1 if part != -1 else None) if single else part.stop
        far = np.iinfo(np.int64).max
        starts.append((0 if step > 0 else far) if begin is None else begin)
        ends.append((far if step > 0 else -far) if end is None else end)
        axes.append(axis)
        steps.append(step)
        if single:
            gone.append(axis)
        else:
            kept += 1
        axis += 1
    lists = {"starts": starts, "ends": ends, "axes": axes, "steps": steps}
    names = [constant(weights, f"{call.output}_{name}", values, np.int64) for name, values in lists.items()]
    then = [(name, changed) for name, changed in (("Squeeze", gone), ("Unsqueeze", new)) if changed]
    targets = [*(f"{call.output}_{i}" for i in range(len(then))), call.output]
    nodes = [node("Slice", [call.inputs[0], *names], targets[0])]
    for (operator, lost), source, target in zip(then, targets, targets[1:], strict=False):
        nodes.append(node(operator, [source, constant(weights, f"{target}_{operator}", lost, np.int64)], target))
    return nodes


# ---- reductions -----------------------------------------------------------------------------------------

REDUCTIONS = {"sum": "ReduceSum", "mean": "ReduceMean", "max": "ReduceMax", "min": "ReduceMin",
              "logsumexp": "ReduceLogSumExp", "sum_of_squares": "ReduceSumSquare"}  # fmt: skip


@translation(*REDUCTIONS)
def _reduction(call: Call, twice: Call, weights: Weights) -> list[Any]:
    axis, keepdims = call.params.get("axis"), int(call.params.get("keepdims", False))
    nodes, inputs = cast([call.inputs[0]], call, call.dtype)  # the mean of integers, the sum of booleans
    if axis is not None:
        axes = axis if isinstance(axis, tuple) else (axis,)
        if not axes:
            return [*nodes, node("Identity", inputs, call.output)]
        inputs.append(constant(weights, f"{call.output}_axes", axes, np.int64))
    return [*nodes, node(REDUCTIONS[call.op], inputs, call.output, keepdims=keepdims)]


@translation("sum_to")
def _sum_to(call: Call, twice: Call, weights: Weights) -> list[Any]:
    (shape,) = call.shapes
    lead = len(shape) - len(call.shape)
    axes = [*range(lead), *(lead + i for i, n in enumerate(call.shape) if n == 1 != shape[lead + i])]
    summed = f"{call.output}_sum"
    at = constant(weights, f"{call.output}_axes", axes, np.int64)
    sizes = constant(weights, f"{call.output}_shape", _sizes(call.shape, twice.shape, "a sum"), np.int64)
    first = node("ReduceSum", [call.inputs[0], at], summed, keepdims=1, noop_with_empty_axes=1)
    return [first, node("Reshape", [summed, sizes], call.output)]


@translation("argmax", "argmin")
def _arg_extreme(call: Call, twice: Call, weights: Weights) -> list[Any]:
    axis = call.params.get("axis")
    if axis is None:
        raise OnnxError(f"{call.op} over all axes is not written; name the axis")
    operator = "ArgMax" if call.op == "argmax" else "ArgMin"
    return [node(operator, call.inputs, call.output, axis=axis, keepdims=int(call.params.get("keepdims", False)))]


# ---- layers ---------------------------------------------------------------------------------------------


@translation("linear")
def _linear(call: Call, twice: Call, weights: Weights) -> list[Any]:
    x, weight, bias = call.inputs
    if len(call.shape) == 2:
        return [node("Gemm", [x, weight, *([] if bias is None else [bias])], call.output, transB=1)]
    turned, product = f"{call.output}_weight", call.output if bias is None else f"{call.output}_product"
    nodes = [node("Transpose", [weight], turned, perm=[1, 0]), node("MatMul", [x, turned], product)]
    return nodes if bias is None else [*nodes, node("Add", [product, bias], call.output)]


@translation("conv", "conv_with_bias")
def _conv(call: Call, twice: Call, weights: Weights) -> list[Any]:
    before, after = zip(*call.params["padding"], strict=True)
    options = {
        "kernel_shape": call.shapes[1][2:], "pads": [*before, *after], "strides": call.params["stride"],
        "dilations": call.params["dilation"], "group": call.params["groups"],
    }  # fmt: skip
    return [node("Conv", call.inputs, call.output, **options)]


@translation("conv_input")
def _conv_input(call: Call, twice: Call, weights: Weights) -> list[Any]:
    """The adjoint of a convolution: ConvTranspose."""
    before, after = zip(*call.params["padding"], strict=True)
    kernel, size = call.shapes[1][2:], call.params["size"]
    stride, dilation = call.params["stride"], call.params["dilation"]
    spans = zip(call.shapes[0][2:], stride, kernel, dilation, before, after, strict=True)
    least = [(n - 1) * s + (k - 1) * d + 1 - b - a for n, s, k, d, b, a in spans]
    options = {
        "kernel_shape": kernel, "pads": [*before, *after], "strides": stride, "dilations": dilation,
        "group": call.params["groups"], "output_padding": [n - m for n, m in zip(size, least, strict=True)],
    }  # fmt: skip
    return [node("ConvTranspose", call.inputs, call.output, **options)]


@translation("max_pool")
def _max_pool(call: Call, twice: Call, weights: Weights) -> list[Any]:
    p = call.params
    (shape,) = call.shapes
    spans = zip(shape[2:], p["out"], p["stride"], p["padding"], p["kernel"], p["dilation"], strict=True)
    after = [max((m - 1) * s + (k - 1) * d + 1 - n - b, 0) for n, m, s, b, k, d in spans]
    options = {"kernel_shape": p["kernel"], "strides": p["stride"], "dilations": p["dilation"]}
    return [node("MaxPool", call.inputs, call.output, pads=[*p["padding"], *after], **options)]


@translation("batch_norm_inference")
def _batch_norm(call: Call, twice: Call, weights: Weights) -> list[Any]:
    x, mean, var, weight, bias = call.inputs
    owner = mean.removesuffix("running_mean")
    scale, shift = (
        given or constant(weights, f"{owner}{name}", np.full(call.shapes[1], value), call.dtypes[1])
        for name, given, value in (("weight", weight, 1), ("bias", bias, 0))  # a layer may have none
    )
    return [node("BatchNormalization", [x, scale, shift, mean, var], call.output, epsilon=call.params["eps"])]


@translation("gelu", "silu")
def _gated(call: Call, twice: Call, weights: Weights) -> list[Any]:
    (x,), inner = call.inputs, f"{call.output}_gate"
    if call.op == "silu":
        return [node("Sigmoid", [x], inner), node("Mul", [x, inner], call.output)]
    names = {n: f"{call.output}_{n}" for n in ("scaled", "erf", "shifted", "half")}
    root, one, half = (
        constant(weights, f"{call.output}_{i}", v, call.dtype) for i, v in enumerate((np.sqrt(0.5), 1, 0.5))
    )
    return [
        node("Mul", [x, root], names["scaled"]), node("Erf", [names["scaled"]], names["erf"]),
        node("Add", [names["erf"], one], names["shifted"]), node("Mul", [x, half], names["half"]),
        node("Mul", [names["half"], names["shifted"]], call.output),
    ]  # fmt: skip
