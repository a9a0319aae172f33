"""The Python code of a step: what it does while it is recorded, and what it reads.

A program runs without this code. So the code may do nothing that lasts (`Observed` refuses it), and a program is used
only while everything that the code reads is as it was (`Reads`).
"""

from __future__ import annotations

import abc
import dis
import gc
import io
import math
import sys
import sysconfig
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from functools import _lru_cache_wrapper, partial
from operator import is_
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FrameType,
    FunctionType,
    GetSetDescriptorType,
    MethodDescriptorType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any

import numpy as np

from tinygrad_bn import hooks
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
CODE, ENGINE, LIBRARY, ASIDE = "the step's own code", "this package", "what it calls", "what a program does again"
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
    "CHECK_EXC_MATCH": "catches an error",
}
PURE = {
    abs, all, any, callable, divmod, format, getattr, hasattr, id, isinstance, issubclass, iter, len, max, min, next,
    repr, round, sorted, sum, tuple.__new__, *(getattr(abc, f"_abc_{kind}check") for kind in ("instance", "subclass")),
    *(f for f in vars(math).values() if callable(f)),
}  # fmt: skip
ANY_NAME = {"getattr", "hasattr", "__dict__", "__getattribute__"}  # used by code that may compute a name
# Functions that C code may call for Python code, where no call is seen.
IMPURE = {"__setattr__", "__delattr__", "__setitem__", "__delitem__", "setattr", "delattr", "print", "input", "open"}
NESTS = (list, dict, set)
MANY = 1000
GLOBALS = {"LOAD_GLOBAL", "LOAD_NAME"}
FIXED = (
    *SCALARS, bytes, complex, frozenset, type(...), type(NotImplemented), Enum, np.ufunc, type(np.sum), np.ndarray,
    Tensor, property, staticmethod, classmethod, BuiltinFunctionType, GetSetDescriptorType, MethodDescriptorType,
    CellType, CodeType,
)  # fmt: skip


OPAQUE = (_lru_cache_wrapper, io.IOBase, deque)  # hold what cannot be compared
HEAP_TYPE = 1 << 9  # flag of classes that are written in Python


class Observed:
    """Calls a function, and notes which Python code runs in it, outside of this package. `refuse` gets a reason.

    Code inside of an op, of an optimizer's step and of other calls that a program repeats does not count: `aside` holds
    the functions around such calls.
    """

    def __init__(self, refuse: Callable[[str], None], aside: Iterable[Any], modules: list[Module]) -> None:
        self.refuse, self.modules = refuse, modules
        self.ran: dict[CodeType, dict[str, Any]] = {}  # with the global variables of each
        self._aside = {function.__code__ for function in aside}
        self._replaced = hooks.replaced_code()
        self._kinds = [ENGINE]
        self._before: list[tuple[FrameType, Any]] = []  # calls of this package by the step's own code

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Its result."""
        collects = gc.isenabled()
        try:
            gc.disable()  # code that runs when memory is freed is not the step's
            try:
                sys.setprofile(self._look)
                return function(*args)
            finally:
                sys.setprofile(None)
        finally:
            if collects:
                gc.enable()

    def aside(self, run: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """The result of a call that a program repeats. Not observed: a loop would compile in four times the time."""
        sys.setprofile(None)
        try:
            return run(*args, **options)
        finally:
            sys.setprofile(self._look)

    def _look(self, frame: FrameType, event: str, function: Any) -> None:
        if event == "call":
            above = self._kinds[-1]
            self._kinds.append(self._kind(frame))
            if above is CODE and self._kinds[-1] is ENGINE:
                self._before.append((frame, self._modes()))
        elif event == "return" and len(self._kinds) > 1:
            self._kinds.pop()
            if self._before and self._before[-1][0] is frame:
                _, before = self._before.pop()
                if not all(map(is_, before, self._modes())):
                    self.refuse(f"the step calls {frame.f_code.co_qualname}(), which changes a module")
        elif event == "c_call" and self._kinds[-1] is CODE and not _is_pure(function):
            self.refuse(f"{_place(frame.f_code)} calls {function.__qualname__}(), which a program would not call again")

    def _modes(self) -> list[Any]:
        """The attributes of the modules that are called, but for tensors; and which tensors require gradients."""
        every = [value for module in self.modules for value in vars(module).values()]
        return [value._requires_grad if isinstance(value, Tensor) else value for value in every]

    def _kind(self, frame: FrameType) -> str:
        above, code, name = self._kinds[-1], frame.f_code, frame.f_globals.get("__name__") or ""
        package, _, rest = name.partition(".")
        if above is ASIDE or code in self._aside:
            return ASIDE
        if package in OWN:
            if above is CODE and rest.partition(".")[0] not in RECORDED:
                self.refuse(f"the step calls {code.co_qualname}(), which a program would not call again")
                return ASIDE
            if above is CODE and code in self._replaced:
                self.refuse(f"the step calls {code.co_qualname}() by a name of its own; call it by its object")
            return ENGINE
        if above in (ENGINE, LIBRARY) and (package in LIBRARIES or _is_standard(package, code)):
            return LIBRARY
        if code not in self.ran:
            self.ran[code] = frame.f_globals
            self._refuse_what_lasts(code)
        return CODE

    def _refuse_what_lasts(self, code: CodeType) -> None:
        for instruction in dis.get_instructions(code):
            what = LASTING.get(instruction.opname)
            if what and (instruction.opname != "STORE_DEREF" or instruction.argval in code.co_freevars):
                named = f" ({instruction.argval})" if instruction.argval else ""
                self.refuse(f"{_place(code)} {what}{named}, which a program would not do again")
        for name in sorted(IMPURE.intersection(code.co_names)):
            self.refuse(f"{_place(code)} uses {name}, which a program would not do again")


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
        fresh: tensors that had no gradient when a backward pass gave them one.

    `refusal` says what could change without being found; "" if nothing could.
    """

    def __init__(
        self, function: Any, ran: dict[CodeType, dict[str, Any]], modules: list[Module], fresh: list[Tensor]
    ) -> None:
        self.ran, self.modules, self.fresh, self.refusal = ran, modules, fresh, ""
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
        nest = isinstance(value, (tuple, np.ndarray, *NESTS))
        if isinstance(value, Tensor | np.ndarray) or hasattr(value, "__cuda_array_interface__"):
            self.arrays.append(value)
        if nest and not isinstance(value, tuple) and self._is_small(value, path):
            self._nests.append((value, value.copy(), path))
        if nest and not isinstance(value, np.ndarray) and self._is_small(value, path):
            for part in value.values() if isinstance(value, dict) else value:
                self._walk(part, f"an element of {path}")
        if isinstance(value, MethodType):
            self._walk(value.__self__, path)
            self._walk(value.__func__, path)
        elif isinstance(value, partial):
            if isinstance(value.func, BuiltinFunctionType) and not _is_pure(value.func):
                self.refusal = self.refusal or f"{path} calls {value.func.__qualname__}()"
            for part in (value.func, value.args, value.keywords):
                self._walk(part, path)
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
            self.refusal = self.refusal or f"{path} is a {type(value).__name__}, {what}; pass its results as arguments"
        elif hasattr(value, "__dict__"):
            if isinstance(value, Module):
                self.modules += [m for m in value.modules() if m not in self.modules]
            self._walk_attributes(path, vars(value), *_places(type(value)))
            if (self._globals | self._attributes) & ANY_NAME and not _is_of_library(type(value)):
                self._nests.append((vars(value), vars(value).copy(), path))

    def _is_small(self, nest: Any, path: str) -> bool:
        size = nest.size if isinstance(nest, np.ndarray) else len(nest)
        if size > MANY:
            what = f"{path} has {size} elements, too many to look at in each step; pass them as arguments"
            self.refusal = self.refusal or what
        return size <= MANY

    def _walk_attributes(self, path: str, *places: Mapping[str, Any]) -> None:
        """Those that code names, in each of the places: one may appear later."""
        for variables in places:
            for name in sorted(self._attributes):
                self._variable(variables, name, f"{path}.{name}")


def _is_of_library(owner: type) -> bool:
    """Whether a class belongs to this package, to Python or to NumPy: it does not change."""
    package = str(owner.__module__).partition(".")[0]
    return package in OWN | LIBRARIES or package in sys.stdlib_module_names


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
