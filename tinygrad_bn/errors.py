"""Errors of NumPy and of Python in the words of this package: what is wrong, and what to do."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.exceptions import AxisError

from tinygrad_bn.arguments import expect_shape, shown

# Of tensors and graphs.
ASSIGNED = (
    "item assignment would change a tensor that a backward pass may need; write functional.where(mask, value, t) for a "
    "new tensor, or assign a whole array to t.data"
)
CHANGED = (
    "{!r} needs a tensor of shape {} for its backward pass, and that was changed (by an update, +=, or an assignment "
    "to data) since the forward pass; call backward() first"
)
COTANGENT = (
    "a tensor of shape {} needs a cotangent g of that shape; only for one element it is 1 by itself: give g, or reduce "
    "the tensor first, as by .mean()"
)
FREED = (
    "the graph behind this result of {!r} was freed by an earlier backward(); call that one with retain_graph=True to "
    "walk it again"
)
NO_GRAPH = (
    "this tensor of shape {} has no gradient to give: nothing it was computed from has requires_grad=True, or it was "
    "computed under no_grad()"
)


def expect_requirable(x: Any, value: Any) -> None:
    """Raise TypeError if a tensor of integers is to require a gradient, RuntimeError if a result is not to."""
    if value and x.dtype.kind != "f":
        raise TypeError(f"only floating-point tensors can require a gradient; this one is {x.dtype}: use astype first")
    if x.node is not None and not value:
        raise RuntimeError(
            f"this result of {x.node.op.name!r} has a graph, so its requires_grad is True; for a constant use detach()"
        )


def expect_gradient(x: Any, gradient: Any) -> None:
    """Raise TypeError unless `gradient` is a tensor, ValueError unless it has the shape of the tensor x."""
    if not hasattr(gradient, "_requires_grad"):
        raise TypeError(f"the grad of a tensor is a Tensor or None; got {shown(gradient)}")
    if gradient.shape != x.shape:
        raise ValueError(f"the grad of a tensor of shape {x.shape} has to have that shape; got {gradient.shape}")


def in_words(
    error: Exception, kind: type[Exception], name: str, operands: Sequence[Any], params: Mapping[str, Any]
) -> tuple[type[Exception], Any]:
    """The type of an error in the op `name`, and its reason, in words that fit the call.

    NumPy's own words differ between its versions. Where none of ours fits, they are the reason.
    """
    if hasattr(error, "reason"):
        return kind, error.reason  # of an op inside this one, without its name
    text = str(error)
    if name in ("broadcast_to", "reshape"):
        try:
            expect_shape(params["shape"])
        except (TypeError, ValueError) as plainer:
            return type(plainer), plainer
    if name == "matmul" and any(o is None for o in operands):  # NumPy takes it for a number
        return TypeError, "an operand is None"
    if kind is AttributeError and not all(hasattr(o, "dtype") for o in operands):  # a number has no shape
        return TypeError, "takes tensors or arrays"
    if kind is OverflowError:
        if words := _misfit(operands, params):
            return kind, words
        if "too large to convert" in text:
            return ValueError, "an axis is too large" if "axis" in params else error
    if kind is TypeError:
        return kind, _of_types(text) or error
    if isinstance(error, AxisError) and error.ndim is not None:
        return kind, _missing_axis(error.axis, error.ndim)
    words = _of_index(text, params["index"]) if name == "getitem" else _of_shapes(name, text, operands, params)
    return kind, words or error


def _of_types(text: str) -> str:
    if "NoneType" in text:
        return "an operand is None"
    if "did not contain a loop" in text:
        return "it is not defined for these dtypes"
    if "numpy boolean" in text:
        return "it is not defined for booleans; convert with astype first"
    return ""


def _missing_axis(axis: Any, ndim: int) -> str:
    if not ndim:
        return f"there is no axis {axis}: the operand is a single number, without axes"
    if ndim == 1:
        return f"there is no axis {axis}; the only one is 0, or -1"
    return f"there is no axis {axis}; the {ndim} axes are 0 to {ndim - 1}, or {-ndim} to -1 from the last"


def _of_index(text: str, index: Any) -> str:
    """The reason of an IndexError, of an element that is not there or of an index that is none."""
    if found := re.search(r"index (-?\d+) is out of bounds for axis (\d+) with size (\d+)", text):
        position, axis, size = map(int, found.groups())
        if not size:
            return f"there is no element {position}: axis {axis} is empty"
        return f"there is no element {position} on axis {axis}; its elements are 0 to {size - 1}, or {-size} to -1"
    if found := re.search(r"array is (\d+)-dimensional, but (\d+) were indexed", text):
        return "there are {1} indices for {0} axes; give one for each axis at most".format(*found.groups())
    if "boolean index did not match" in text:
        return "an index of booleans has to have the shape of the axes that it selects from"
    if "could not be broadcast" in text:
        return "the arrays of an index have to have one shape, or to broadcast to one"
    if "valid indices" in text:
        return (
            "an index is an integer, a slice, ..., None, an array of integers or booleans, or a tuple of these; "
            f"got {shown(index)}"
        )
    return ""


def _of_shapes(name: str, text: str, operands: Sequence[Any], params: Mapping[str, Any]) -> str:
    """The reason of a ValueError, about shapes and axes; "" for another one."""
    shapes = [o.shape for o in operands if hasattr(o, "shape")]
    if name == "matmul" and "core dimension" in text:
        return f"the last axis of a and the rows of b differ: {shapes[0][-1]} and {shapes[1][-2:][0]}"
    if name in ("concatenate", "stack") and re.search("at least one|zero-dimensional|same|match", text):
        return _of_joining(name, shapes, params["axis"])
    if name == "reshape" and "cannot reshape" in text:
        return (
            f"the {math.prod(shapes[0])} elements of shape {shapes[0]} do not fill the shape {shown(params['shape'])}"
        )
    if name == "broadcast_to" and re.search("broadcast|remapping", text):
        if -1 in np.atleast_1d(params["shape"]):
            return f"-1 stands for no number here; write the number in shape={shown(params['shape'])}"
        return f"the shape {shapes[0]} cannot be repeated to {shown(params['shape'])}; {BROADCASTING}"
    if "could not be broadcast" in text or "shape mismatch" in text:
        return f"the shapes {' and '.join(map(str, filter(None, shapes)))} do not fit together; {BROADCASTING}"
    if name == "transpose" and "ax" in text:
        return f"axes has to name each of the {len(shapes[0])} axes once; got {shown(params['axes'])}"
    if "duplicate value in 'axis'" in text:
        return f"axis names an axis twice: {shown(params['axis'])}"
    if "zero-size array" in text or "empty sequence" in text:
        which = "the tensor" if params.get("axis") is None else f"axis {shown(params['axis'])}"
        return f"there is no element to choose: {which} of shape {shapes[0]} is empty"
    return ""


BROADCASTING = "counted from the last axis, sizes have to be equal or 1"


def _of_joining(name: str, shapes: list[tuple[int, ...]], axis: int) -> str:
    if not shapes:
        return f"the list is empty; {name} joins one tensor or more"
    listed = " and ".join(map(str, shapes[:4]))
    if name == "stack":
        return f"tensors to stack have to be of one shape; got {listed}"
    if () in shapes:
        return "single numbers have no axis to join along; use stack"
    return f"shapes have to be equal except along axis {axis}; got {listed}"


def misfit(dtype: np.dtype[Any], numbers: Iterable[Any]) -> str:
    """Which of Python's integers the integer `dtype` cannot hold, and what to do; "" if it holds all."""
    limits = np.iinfo(dtype)
    for number in numbers:
        if type(number) is int and not limits.min <= number <= limits.max:
            return f"{dtype} cannot hold {shown(number)}; convert to a wider dtype first, such as float64"
    return ""


def _misfit(operands: Sequence[Any], params: Mapping[str, Any]) -> str:
    """`misfit` in the dtype of the operands, all of integers or booleans; or ""."""
    wide = [o.dtype for o in operands if hasattr(o, "dtype") and o.dtype.kind != "b"]
    dtype = np.result_type(*wide) if wide else np.dtype(np.int64)  # booleans count as int64 beside a number
    if dtype.kind not in "iu":  # also of uint64 and a signed dtype
        return ""
    return misfit(dtype, (*operands, *(value for option, value in params.items() if option != "axis")))
