"""Stand-ins for arguments and for computed numbers, while a step is recorded: they tell when they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tinygrad_bn.captured.nests import mapped
from tinygrad_bn.tensor import Tensor

if TYPE_CHECKING:
    from tinygrad_bn.captured.recorder import Recorder


class Argument(np.ndarray[Any, Any]):
    """An argument of a step while it is recorded: Python that reads its numbers would not do it again."""

    def __array_finalize__(self, whole: Any) -> None:
        self.recorder: Recorder | None = getattr(whole, "recorder", None)
        self.array: Any = None  # what this is a view of, if it is no view of another one

    def __array_ufunc__(self, ufunc: Any, method: Any, *inputs: Any, **kwargs: Any) -> Any:
        self._read(ufunc.__name__)
        return getattr(ufunc, method)(*mapped(plain, inputs), **mapped(plain, kwargs))

    def __array_function__(self, function: Any, types: Any, args: Any, options: Any) -> Any:
        self._read(function.__name__)
        return function(*mapped(plain, args), **mapped(plain, options))

    def _read(self, what: str) -> None:
        if self.recorder is not None:
            self.recorder.refuse(f"the step computes with the numbers of an argument ({what}): do it outside")


def _reading(name: str) -> Any:
    def read(self: Argument, *args: Any, **options: Any) -> Any:
        self._read(name)
        return getattr(plain(self), name)(*args, **options)

    return read


for _name in (
    "__getitem__", "__setitem__", "__iter__", "__contains__", "__bool__", "__int__", "__float__", "__complex__",
    "__index__", "__format__", "__repr__", "__str__", "astype", "copy", "item", "tolist", "tobytes", "nonzero",
    "argmax", "argmin", "argsort", "sort", "take", "repeat", "dot",
):  # fmt: skip
    setattr(Argument, _name, _reading(_name))


def _viewing(name: str) -> Any:
    def view(self: Argument) -> Any:
        self._read(name)
        return getattr(plain(self), name)

    return property(view)


for _name in ("flat", "data", "base", "ctypes"):
    setattr(Argument, _name, _viewing(_name))


class Number:
    """A number that the host computed in a step: Python that reads it would not do it again."""

    def __init__(self, value: float, recorder: Recorder) -> None:
        self.value = value
        self.recorder: Recorder | None = recorder

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.value, name)
        self._read(name)
        return value

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        self._read("__array__")
        return np.asarray(self.value, dtype)

    def _read(self, what: str) -> None:
        if self.recorder is not None:
            self.recorder.refuse(f"the step reads a number that it computed ({what}): return it, and read it outside")


def _computing(name: str) -> Any:
    def compute(self: Number, *others: Any) -> Any:
        self._read(name)
        return getattr(self.value, name)(*map(plain, others))

    return compute


for _name in (
    "__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__", "__bool__", "__float__", "__int__", "__round__",
    "__abs__", "__neg__", "__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__",
    "__rtruediv__", "__floordiv__", "__rfloordiv__", "__mod__", "__rmod__", "__divmod__", "__rdivmod__", "__pos__",
    "__hash__", "__trunc__", "__floor__", "__ceil__", "__pow__", "__rpow__", "__repr__", "__str__", "__format__",
):  # fmt: skip
    setattr(Number, _name, _computing(_name))


def plain(value: Any) -> Any:
    """The array behind an `Argument`, the number behind a `Number`; another value as it is."""
    if type(value) is Number:
        return value.value
    if type(value) is not Argument:
        return value
    return value.view(np.ndarray) if value.array is None else value.array


def is_array(value: Any) -> bool:
    """Whether this is an array, on any device."""
    return hasattr(value, "dtype") and not isinstance(value, type | np.generic | Tensor)
