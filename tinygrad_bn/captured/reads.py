"""What Python code of a step reads. A program is used only while all of it is as it was."""

from __future__ import annotations

import dis
import gc
import io
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from functools import _lru_cache_wrapper, partial
from operator import is_
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MethodDescriptorType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any

import numpy as np

from tinygrad_bn.captured.effects import OWN, is_pure
from tinygrad_bn.captured.nests import SCALARS, same
from tinygrad_bn.nn.module import Module
from tinygrad_bn.tensor import Tensor

NESTS = (list, dict, set)
MANY = 1000  # elements of a nest or an array that are compared before each step; of more, the step is refused
GLOBALS = {"LOAD_GLOBAL", "LOAD_NAME"}
ANY_NAME = {"getattr", "hasattr", "__dict__", "__getattribute__"}  # used by code that may compute a name
# Values that do not change, or are compared by identity.
FIXED = (
    *SCALARS, bytes, complex, frozenset, type(...), type(NotImplemented), Enum, np.ufunc, type(np.sum), np.ndarray,
    Tensor, property, staticmethod, classmethod, BuiltinFunctionType, GetSetDescriptorType, MethodDescriptorType,
    CellType, CodeType,
)  # fmt: skip
OPAQUE = (_lru_cache_wrapper, io.IOBase, deque)  # hold what cannot be compared
HEAP_TYPE = 1 << 9  # flag of classes that are written in Python


class Reads:
    """What Python code reads: the variables that it names, their attributes, and those of its modules.

    Args:
        function: the step.
        ran: the code that ran in it, with its global variables.
        modules: modules that were called.
        fresh: tensors that had no gradient when a backward pass gave them one.

    `refusal` says what could change without being found; "" if nothing could.
    """

    def __init__(
        self, function: Any, ran: dict[CodeType, dict[str, Any]], modules: list[Module], fresh: list[Tensor]
    ) -> None:
        self.ran, self.modules, self.fresh, self.refusal = ran, list(modules), fresh, ""
        self.arrays: list[Any] = []  # and tensors
        self._globals = {name for code in ran for name in _names(code, GLOBALS)}
        self._attributes = {name for code in ran for name in _names(code, None)}
        self._variables: list[tuple[Mapping[str, Any], str, str]] = []
        self._nests: list[tuple[Any, Any, str]] = []  # with copies
        self._walked: set[int] = set()
        self._functions = _functions(ran, function)
        try:
            self._walk_all(function)
        except RecursionError:
            self.refusal = "what its Python code reads is nested too deeply"
        self._seen = self._look()

    def _walk_all(self, function: Any) -> None:
        for code, variables in self.ran.items():
            for name in _names(code, GLOBALS):
                self._variable(variables, name, name)
        self._walk(function, "the step")
        for f in self._functions:
            for value in (f.__defaults__, f.__kwdefaults__):
                self._walk(value, f"a default of {f.__qualname__}")
            for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
                self._walk(_contents(cell), name)
        for module in self.modules:  # more are found on the way
            self._walk(module, type(module).__name__)

    def change(self) -> str:
        """What is not as it was; "" if all is."""
        objects, forms = self._look()
        objects_before, forms_before = self._seen
        if forms != forms_before or len(objects) != len(objects_before):
            return "the form of a tensor"
        if not all(map(is_, objects, objects_before)):
            pairs = zip(objects, objects_before, self._paths(), strict=True)
            for path in (path for now, before, path in pairs if not same(now, before)):
                return path
        return next((path for nest, before, path in self._nests if not _is_same_nest(nest, before)), "")

    def gradient(self) -> str:
        """Which tensor has a gradient from before, to which a step would add; "" if none has."""
        return next((f"the gradient of a tensor {t.shape}" for t in self.fresh if t.grad is not None), "")

    def _look(self) -> tuple[list[Any], list[Any]]:
        """The objects that are read; and of tensors among them, what else a program relies on."""
        objects: list[Any] = []
        for module in self.modules:
            objects += vars(module).values()
        for f in self._functions:
            objects += (f.__code__, f.__defaults__, f.__kwdefaults__, *map(_contents, f.__closure__ or ()))
        objects += [variables.get(name) for variables, name, _ in self._variables]
        tensors = [t for t in (*objects, *self.arrays) if isinstance(t, Tensor)]
        forms = [(t._requires_grad, t._data.dtype, t._data.shape) for t in tensors]
        return objects, forms

    def _paths(self) -> Iterator[str]:
        """The name of each object that `_look` gives."""
        for module in self.modules:
            yield from (f"{type(module).__name__}.{name}" for name in vars(module))
        for f in self._functions:
            yield from (f"{f.__qualname__}.{part}" for part in ("__code__", "__defaults__", "__kwdefaults__"))
            yield from f.__code__.co_freevars
        yield from (path for _, _, path in self._variables)

    def _variable(self, variables: Mapping[str, Any], name: str, path: str) -> None:
        self._variables.append((variables, name, path))
        if name in variables:
            self._walk(variables[name], path)

    def _walk(self, value: Any, path: str) -> None:
        """Note what is read through `value`."""
        if id(value) in self._walked:
            return
        self._walked.add(id(value))
        if isinstance(value, Tensor | np.ndarray) or hasattr(value, "__cuda_array_interface__"):
            self.arrays.append(value)
        nest = isinstance(value, (tuple, np.ndarray, *NESTS))
        if nest:
            self._walk_nest(value, path)
        if isinstance(value, MethodType):
            self._walk(value.__self__, path)
            self._walk(value.__func__, path)
        elif isinstance(value, partial):
            self._walk_partial(value, path)
        elif isinstance(value, ModuleType):
            if value.__name__.partition(".")[0] not in OWN:
                self._walk_attributes(path, vars(value))
        elif isinstance(value, FIXED) and _is_of_library(type(value)):
            return
        elif isinstance(value, type):
            if not _is_of_library(value):
                self._walk_attributes(path, *_places(value), *_places(type(value)))
        elif isinstance(value, OPAQUE) or _has_c_base(type(value)) or not (hasattr(value, "__dict__") or nest):
            what = "which a program would not call again" if callable(value) else "whose changes would not be found"
            self._refuse(f"{path} is a {type(value).__name__}, {what}; pass its results as arguments")
        elif hasattr(value, "__dict__"):
            self._walk_object(value, path)

    def _walk_nest(self, nest: Any, path: str) -> None:
        """Of a list, tuple, dictionary, set or array: keep a copy if it can change, and walk its elements."""
        size = nest.size if isinstance(nest, np.ndarray) else len(nest)
        if size > MANY:
            self._refuse(f"{path} has {size} elements, too many to look at in each step; pass them as arguments")
            return
        if not isinstance(nest, tuple):
            self._nests.append((nest, nest.copy(), path))
        if not isinstance(nest, np.ndarray):
            for part in nest.values() if isinstance(nest, dict) else nest:
                self._walk(part, f"an element of {path}")

    def _walk_partial(self, value: partial[Any], path: str) -> None:
        if isinstance(value.func, BuiltinFunctionType) and not is_pure(value.func):
            self._refuse(f"{path} calls {value.func.__qualname__}(), which a program would not call again")
        for part in (value.func, value.args, value.keywords):
            self._walk(part, path)

    def _walk_object(self, value: Any, path: str) -> None:
        if isinstance(value, Module):
            self.modules += [m for m in value.modules() if m not in self.modules]
        self._walk_attributes(path, vars(value), *_places(type(value)))
        if (self._globals | self._attributes) & ANY_NAME and not _is_of_library(type(value)):
            self._nests.append((vars(value), vars(value).copy(), path))

    def _refuse(self, reason: str) -> None:
        self.refusal = self.refusal or reason

    def _walk_attributes(self, path: str, *places: Mapping[str, Any]) -> None:
        """Those that code names, in each of the places: one may appear later."""
        for variables in places:
            for name in sorted(self._attributes):
                self._variable(variables, name, f"{path}.{name}")


def _is_of_library(owner: type) -> bool:
    """Whether a class belongs to this package, to Python or to NumPy: it does not change."""
    package = str(owner.__module__).partition(".")[0]
    return package in OWN | {"numpy"} or package in sys.stdlib_module_names


def _has_c_base(owner: type) -> bool:
    """Whether part of a class is written in C, so that its objects may hold more than their attributes."""
    known = object, tuple, FunctionType, SimpleNamespace, *NESTS
    return any(not c.__flags__ & HEAP_TYPE and c not in known for c in owner.__mro__)


def _places(owner: type) -> list[Mapping[str, Any]]:
    """Where attributes of a class may be, but for classes of libraries."""
    return [vars(c) for c in owner.__mro__ if not _is_of_library(c)]


def _contents(cell: CellType) -> Any:
    """What a cell of a closure holds; itself if it is empty."""
    try:
        return cell.cell_contents
    except ValueError:
        return cell


def _names(code: CodeType, opcodes: set[str] | None) -> Iterator[str]:
    """The names that these opcodes load; or those of attributes, also where they are texts. Of functions inside too."""
    for instruction in dis.get_instructions(code):
        if (instruction.opname in GLOBALS) == (opcodes is not None) and instruction.argval in code.co_names:
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant, opcodes)
        elif opcodes is None:
            texts = constant if isinstance(constant, tuple) else (constant,)
            yield from (text for text in texts if isinstance(text, str) and text.isidentifier())


def _functions(codes: Iterable[CodeType], first: Any) -> list[FunctionType]:
    """The functions that have this code, and `first` if it is one. Those that a step itself defined are gone by now."""
    codes = list(codes)
    found = [first, *(gc.get_referrers(*codes) if codes else ())]
    return [f for f in found if isinstance(f, FunctionType) and (f is first or f.__code__ in codes)]


def _is_same_nest(a: Any, b: Any) -> bool:
    """Whether lists, dictionaries, sets or arrays hold the same objects, or equal numbers and texts, in one order."""
    if isinstance(a, np.ndarray):
        return (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes())
    return a == b if isinstance(a, set) else same(*(list(n.items() if isinstance(n, dict) else n) for n in (a, b)))
