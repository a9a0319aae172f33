"""Functions of several steps in half precision: computed in float32 and rounded once, as every op is."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec

import numpy as np

from tinygrad_bn.arguments import is_floating
from tinygrad_bn.keywords import wrong_keywords
from tinygrad_bn.ops import astype

P = ParamSpec("P")
HALF = np.dtype(np.float16)


def rounded_once(function: Callable[P, Any]) -> Callable[P, Any]:
    """Compute float16 operands in float32. The result is float16 again, unless another operand is wider."""

    known = signature(function).parameters

    @wraps(function)
    def compute(*args: P.args, **kwargs: P.kwargs) -> Any:
        if kwargs and not known.keys() >= kwargs.keys():
            raise wrong_keywords(function.__name__, known, kwargs)
        values: Any = (*args, *kwargs.values())
        dtypes = {value.dtype for value in values if is_floating(value)}
        if HALF not in dtypes:
            return function(*args, **kwargs)
        y = function(*map(_single, args), **{name: _single(value) for name, value in kwargs.items()})
        return astype(y, dtype=HALF) if len(dtypes) == 1 else y

    return compute


def _single(value: Any) -> Any:
    return astype(value, dtype=np.float32) if is_floating(value) and value.dtype == HALF else value
