"""The table of the standard operators of ONNX, and what their functions share.

A function has the operator's name. Its positional arguments are the inputs, its keywords the attributes; what older
versions have as an attribute and newer ones as an input is one argument. Inputs are tensors, or arrays that no gradient
passes. The specification of each operator stands at onnx.ai/onnx/operators.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from tinygrad_bn.arguments import shown
from tinygrad_bn.onnx.errors import OnnxError
from tinygrad_bn.onnx.reading import Node
from tinygrad_bn.tensor import Tensor

Value: TypeAlias = Any  # a Tensor, or an array that no gradient passes
Ints: TypeAlias = Sequence[int]
Operator: TypeAlias = Callable[..., Any]

OPERATORS: dict[str, Operator] = {}


def operator(function: Operator) -> Operator:
    """Put a function in the table."""
    OPERATORS[function.__name__] = function
    return function


# ---- values ---------------------------------------------------------------------------------------------


def ints(value: Value) -> tuple[int, ...]:
    """An attribute or a small input as integers."""
    return tuple(int(n) for n in np.asarray(array_of(value)).reshape(-1))


def number(value: Value) -> float:
    """An attribute or an input of one element as a number."""
    return float(np.asarray(array_of(value)).reshape(()))


def array_of(value: Value) -> Any:
    """The array of a value: a constant to every gradient."""
    return value.numpy() if isinstance(value, Tensor) else value


def of_arrays(compute: Callable[..., Any]) -> Operator:
    """A function of arrays whose derivative is 0, or that is not differentiable; on tensors too."""

    def run(*xs: Value) -> Value:
        y = np.asarray(compute(*map(array_of, xs)))
        first = next((x for x in xs if isinstance(x, Tensor)), None)
        return y if first is None else Tensor(y).to(first.device)

    return run


def axes_of(axes: Value, ndim: int) -> tuple[int, ...]:
    """Axes from 0 on. Raises OnnxError for one that is not there."""
    if wrong := [axis for axis in ints(axes) if not -ndim <= axis < ndim]:
        raise OnnxError(f"there is no axis {wrong[0]}, as there are {ndim}")
    return tuple(axis % ndim for axis in ints(axes))


def axis_of(axis: int, ndim: int, beyond: int = 0) -> int:
    """An axis from 0 on; `beyond` is 1 where the number of axes itself is allowed."""
    return axis if axis == ndim and beyond else axes_of((axis,), ndim)[0]


def of_several(function: Operator) -> Operator:
    """A function of two as one of any number."""

    def run(first: Value, *others: Value) -> Value:
        for other in others:
            first = function(first, other)
        return first

    return run


# ---- checks ---------------------------------------------------------------------------------------------

FROM_GRAPH = {"opset", "outputs", "training"}  # arguments that are no attributes


def expect_computable(node: Node) -> None:
    """Raise OnnxError unless a node's operator, inputs, outputs and attributes are those of a function here."""
    name, attributes = node.operator, node.attributes
    if name not in OPERATORS:
        raise OnnxError(f"the operator {shown(name)} is not computed")
    parameters = inspect.signature(OPERATORS[name]).parameters
    if unknown := [a for a in attributes if a not in parameters or a in FROM_GRAPH]:
        raise OnnxError(f"the attribute {shown(unknown[0])} of {name} is not known")
    slots = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    given = len(node.inputs)
    if twice := [p.name for p in slots[:given] if p.name in attributes]:
        raise OnnxError(f"{name} has {shown(twice[0])} as an attribute and as an input")
    needed = sum(p.default is p.empty and p.name not in attributes for p in slots)
    several = any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
    if given < max(needed, several) or (given > len(slots) and not several) or "" in node.inputs[:needed]:
        raise OnnxError(f"{name} takes {needed} inputs{' or more' if several else ''}; the node has {given}")
    if not node.outputs or not node.outputs[0] or (len(node.outputs) > 1 and "outputs" not in parameters):
        raise OnnxError(f"{name} has a first output, and here no others; the node has {len(node.outputs)}")
    for p in parameters.values():
        if p.kind is p.KEYWORD_ONLY and p.default is p.empty and p.name not in attributes and p.name not in FROM_GRAPH:
            raise OnnxError(f"the attribute {p.name!r} of {name} is missing")
    if name == "Constant" and len(attributes) != 1:
        raise OnnxError(f"Constant has one attribute, its value; the node has {len(attributes)}")
