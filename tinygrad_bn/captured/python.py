"""The Python code of a step: what it does while it is recorded, and what it reads.

A program runs without this code. So the code may do nothing that lasts (`Observed` refuses it), and a program is used
only while everything that the code reads is as it was (`Reads`).
"""

from __future__ import annotations

import abc
import dis
import gc
import math
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from functools import partial
from operator import is_
from types import (
    BuiltinFunctionType,
    CodeType,
    FrameType,
    FunctionType,
    GetSetDescriptorType,
    MethodDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any

import numpy as np

from tinygrad_bn.captured.nests import SCALARS, same
from tinygrad_bn.modes import Block
from tinygrad_bn.nn.module import Module
from tinygrad_bn.tensor import Tensor

OWN = {"tinygrad_bn", "tinygrad_bn_kernels"}
LIBRARIES = {"numpy", "numba", "llvmlite"}  # what this package calls
STDLIB = sysconfig.get_path("stdlib"), "<frozen "
# Parts of this package whose functions do nothing that lasts, or are recorded with what they do.
RECORDED = {
    "arguments",
    "autograd",
    "captured",
    "functional",
    "hooks",
    "modes",
    "more_ops",
    "nn",
    "ops",
    "optim",
    "tensor",
}
CODE, ENGINE, ASIDE = "the step's own code", "this package", "what a program does again, or does not need"
LASTING = {
    "STORE_ATTR": "assigns an attribute",
    "DELETE_ATTR": "deletes an attribute",
    "STORE_SUBSCR": "assigns an element",
    "STORE_SLICE": "assigns a slice",
    "DELETE_SUBSCR": "deletes an element",
    "STORE_GLOBAL": "assigns a global variable",
    "DELETE_GLOBAL": "deletes a global variable",
    "STORE_DEREF": "assigns a variable of the function around it",
    "IMPORT_NAME": "imports a module",
}
PURE = {
    abs, all, any, callable, divmod, format, getattr, hasattr, id, isinstance, issubclass, iter, len, max, min, next,
    repr, round, sorted, sum, tuple.__new__, *(getattr(abc, f"_abc_{kind}check") for kind in ("instance", "subclass")),
    *(f for f in vars(math).values() if callable(f)),
}  # fmt: skip
ANY_NAME = {"getattr", "hasattr", "__dict__", "__getattribute__"}  # used by code that may compute a name
NESTS = (list, dict, set)
MANY = 1000
FIXED = (
    *SCALARS, bytes, complex, frozenset, type(...), type(NotImplemented), Enum, np.ufunc, np.ndarray, Tensor, property,
    staticmethod, classmethod, FunctionType, BuiltinFunctionType, GetSetDescriptorType, MethodDescriptorType,
)  # fmt: skip


class Observed:
    """Calls a function, and notes which Python code runs in it, outside of this package. `refuse` gets a reason.

    Code inside of an op, of an optimizer's step and of other calls that a program repeats does not count: `aside` holds
    the functions around such calls.
    """

    def __init__(self, refuse: Callable[[str], None], aside: Iterable[Any]) -> None:
        self.refuse = refuse
        self.ran: dict[CodeType, dict[str, Any]] = {}  # with the global variables of each
        self._aside = {function.__code__ for function in aside}
        self._kinds = [ENGINE]

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Its result."""
        if sys.getprofile() is not None:
            self.refuse("a profiler runs")
            return function(*args)
        collects = gc.isenabled()
        gc.disable()  # code that runs when memory is freed is not the step's
        try:
            sys.setprofile(self._look)
            return function(*args)
        finally:
            sys.setprofile(None)
            if collects:
                gc.enable()

    def _look(self, frame: FrameType, event: str, function: Any) -> None:
        if event == "call":
            self._kinds.append(self._kind(frame))
        elif event == "return" and len(self._kinds) > 1:
            self._kinds.pop()
        elif event == "c_call" and self._kinds[-1] is CODE and not _is_pure(function):
            self.refuse(f"{_place(frame.f_code)} calls {function.__qualname__}(), which a program would not call again")

    def _kind(self, frame: FrameType) -> str:
        above, code, name = self._kinds[-1], frame.f_code, frame.f_globals.get("__name__") or ""
        package, _, rest = name.partition(".")
        if above is ASIDE or code in self._aside:
            return ASIDE
        if package in OWN:
            if above is CODE and rest.partition(".")[0] not in RECORDED:
                self.refuse(f"the step calls {code.co_qualname}(), which a program would not call again")
                return ASIDE
            return ENGINE
        if above is ENGINE and (package in LIBRARIES or _is_standard(package, code)):
            return ASIDE
        if code not in self.ran:
            self.ran[code] = frame.f_globals
            for instruction in dis.get_instructions(code):
                what = LASTING.get(instruction.opname)
                if what and (instruction.opname != "STORE_DEREF" or instruction.argval in code.co_freevars):
                    named = f" ({instruction.argval})" if instruction.argval else ""
                    self.refuse(f"{_place(code)} {what}{named}, which a program would not do again")
        return CODE


def _is_standard(package: str, code: CodeType) -> bool:
    """Whether it is code of Python's library."""
    file = code.co_filename
    return package in sys.stdlib_module_names and file.startswith(STDLIB) and "site-packages" not in file


def _is_pure(function: Any) -> bool:
    """Whether a C function changes nothing that lasts. Changes of lists, dictionaries and sets are found otherwise."""
    owner = getattr(function, "__self__", None)
    return (
        type(owner) in (str, bytes, int, float, tuple, frozenset, *NESTS)
        or function in PURE
        or isinstance(owner, Block)
    )


def _place(code: CodeType) -> str:
    return f"{code.co_qualname}()"


class Reads:
    """What Python code reads: the variables that it names, their attributes, and those of its modules.

    Args:
        function: the step.
        ran: the code that ran in it, with its global variables.
        modules: modules that were called.

    `refusal` says what could change without being found; "" if nothing could.
    """

    def __init__(self, function: Any, ran: dict[CodeType, dict[str, Any]], modules: list[Module]) -> None:
        self.ran, self.modules, self.refusal = ran, modules, ""
        self._names = {name for code in ran for name in _names(code)}
        self._variables: list[tuple[Mapping[str, Any], str]] = []
        self._cells: list[Any] = []
        self._nests: list[tuple[Any, Any]] = []  # lists, dictionaries and sets, with copies
        self._walked: set[int] = set()
        for code, variables in ran.items():
            for name in _names(code):
                self._variable(variables, name, name)
        self._walk(function, "the step")
        for f in _functions(ran, function):
            for value in (f.__defaults__, f.__kwdefaults__):
                self._walk(value, f"a default of {f.__qualname__}")
            for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
                self._cells.append(cell)
                self._walk(cell.cell_contents, name)
        for module in modules:  # more are found on the way
            self._walk(module, type(module).__name__)
        self._seen = self._look()

    def are_as_before(self) -> bool:
        """Whether nothing has changed."""
        objects, forms = self._look()
        objects_before, forms_before = self._seen
        if forms != forms_before or len(objects) != len(objects_before):
            return False
        if not (all(map(is_, objects, objects_before)) or same(objects, objects_before)):
            return False
        return all(_is_same_nest(nest, before) for nest, before in self._nests)

    def _look(self) -> tuple[list[Any], list[Any]]:
        """The objects that are read; and of tensors among them, what else a program relies on."""
        objects: list[Any] = []
        for module in self.modules:
            objects += vars(module).values()
        objects += [cell.cell_contents for cell in self._cells]
        objects += [variables.get(name) for variables, name in self._variables]
        forms = [(t._requires_grad, t._data.dtype, t._data.shape) for t in objects if isinstance(t, Tensor)]
        return objects, forms

    def _variable(self, variables: Mapping[str, Any], name: str, path: str) -> None:
        self._variables.append((variables, name))
        if name in variables:
            self._walk(variables[name], path)

    def _walk(self, value: Any, path: str) -> None:
        """Note what is read through `value`."""
        if isinstance(value, FIXED) or id(value) in self._walked:
            return
        self._walked.add(id(value))
        if isinstance(value, (tuple, *NESTS)):
            if len(value) > MANY:
                what = f"{path} has {len(value)} elements, too many to look at in each step; pass them as arguments"
                self.refusal = self.refusal or what
                return
            if isinstance(value, NESTS):
                self._nests.append((value, value.copy()))
            for part in value.values() if isinstance(value, dict) else value:
                self._walk(part, f"an element of {path}")
        elif isinstance(value, MethodType):
            self._walk(value.__self__, path)
        elif isinstance(value, partial):
            for part in (value.func, value.args, value.keywords):
                self._walk(part, path)
        elif isinstance(value, ModuleType):
            if value.__name__.partition(".")[0] not in OWN:
                self._attributes(path, vars(value))
        elif isinstance(value, type):
            if not _is_of_library(value):
                self._attributes(path, vars(value))
        elif hasattr(value, "__dict__"):
            if isinstance(value, Module):
                self.modules += [m for m in value.modules() if m not in self.modules]
            self._attributes(path, vars(value), *(vars(c) for c in type(value).__mro__ if not _is_of_library(c)))
        elif not hasattr(value, "__array_interface__") and not hasattr(value, "__cuda_array_interface__"):
            what = "which a program would not call again" if callable(value) else "whose changes would not be found"
            self.refusal = self.refusal or f"{path} is a {type(value).__name__}, {what}; pass its results as arguments"

    def _attributes(self, path: str, *places: Mapping[str, Any]) -> None:
        """Those in one of the places that code names, or all if it may name any: a new one may come before another."""
        present = {name for place in places for name in place}
        if self._names & ANY_NAME:
            named = {name for name in present if not name.startswith("__")}
        else:
            named = present & self._names
        for name in sorted(named):
            for variables in places:
                self._variable(variables, name, f"{path}.{name}")


def _is_of_library(owner: type) -> bool:
    """Whether a class belongs to this package, to Python or to NumPy: it does not change."""
    package = owner.__module__.partition(".")[0]
    return package in OWN | LIBRARIES or package in sys.stdlib_module_names


def _names(code: CodeType) -> Iterator[str]:
    """The names that code uses for global variables and attributes, that of functions inside of it too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _functions(codes: Iterable[CodeType], first: Any) -> list[FunctionType]:
    """The functions that have this code, and `first` if it is one. Those that a step itself defined are gone by now."""
    codes = list(codes)
    found = [first, *(gc.get_referrers(*codes) if codes else ())]
    return [f for f in found if isinstance(f, FunctionType) and (f is first or f.__code__ in codes)]


def _is_same_nest(a: Any, b: Any) -> bool:
    """Whether two lists, dictionaries or sets hold the same objects, or equal numbers and texts."""
    return a == b if isinstance(a, set) else same(a, b)
