"""Errors of NumPy and of Python in the words of this package: what is wrong, and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tinygrad_bn.arguments import expect_shape, shown


def in_words(
    error: Exception, kind: type[Exception], name: str, operands: Sequence[Any], params: Mapping[str, Any]
) -> tuple[type[Exception], Any]:
    """The type of an error in the op `name`, and its reason, in words that fit the call."""
    reason = getattr(error, "reason", error)  # without the ops inside this one
    text = str(reason)
    if name in ("broadcast_to", "reshape"):
        try:
            expect_shape(params["shape"])
        except (TypeError, ValueError) as plainer:
            return type(plainer), plainer
    if kind is AttributeError and not all(hasattr(o, "dtype") for o in operands):  # a number has no shape
        return TypeError, "takes tensors or arrays"
    if kind is OverflowError:
        if words := _misfit(operands, params):
            return kind, words
        if "too large to convert" in text:
            return ValueError, "an axis is too large" if "axis" in params else reason
    if kind is TypeError:
        if "NoneType" in text:
            return kind, "an operand is None"
        if "did not contain a loop" in text:
            return kind, "it is not defined for these dtypes"
        if "numpy boolean" in text:
            return kind, "it is not defined for booleans; convert with astype first"
    if name == "matmul" and "core dimension" in text:
        columns, rows = operands[0].shape[-1], operands[1].shape[-2:][0]
        return kind, f"the last axis of a and the rows of b differ: {columns} and {rows}"
    return kind, reason


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
