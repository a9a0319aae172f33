"""What Python code of a step does while it is recorded. A program runs without it, so it may do nothing that lasts."""

from __future__ import annotations

import abc
import dis
import gc
import math
import sys
import sysconfig
from collections.abc import Callable
from operator import is_
from types import CodeType, FrameType
from typing import Any

from tinygrad_bn import hooks
from tinygrad_bn.modes import Block
from tinygrad_bn.nn.module import Module
from tinygrad_bn.tensor import Tensor

OWN = {"tinygrad_bn", "tinygrad_bn_kernels"}
STDLIB = sysconfig.get_path("stdlib"), "<frozen "
# Parts of this package whose functions do nothing that lasts, or are recorded with what they do.
RECORDED = {
    "arguments", "autograd", "captured", "functional", "hooks", "modes", "more_ops", "nn", "ops", "optim",
    "tensor",
}  # fmt: skip
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
# Functions written in C that change nothing.
PURE = {
    abs, all, any, callable, divmod, format, getattr, hasattr, id, isinstance, issubclass, iter, len, max, min, next,
    repr, round, sorted, sum, tuple.__new__, *(getattr(abc, f"_abc_{kind}check") for kind in ("instance", "subclass")),
    *(f for f in vars(math).values() if callable(f)),
}  # fmt: skip
# Refused by name: C code may call them for Python code, as `map(print, …)` does, and such a call is not seen.
IMPURE = {"__setattr__", "__delattr__", "__setitem__", "__delitem__", "setattr", "delattr", "print", "input", "open"}
OWNERS = (
    str,
    bytes,
    int,
    float,
    tuple,
    frozenset,
    list,
    dict,
    set,
)  # whose methods change nothing, or what `Reads` sees
CODE, ENGINE, LIBRARY, REFUSED = "the step's own code", "this package", "what this package calls", "what is refused"


class Effects:
    """Runs a step, and looks at the Python code in it that is not this package's. `refusal` says what would last.

    Args:
        modules: those that the step calls; more are added while it runs.
    """

    def __init__(self, modules: list[Module]) -> None:
        self.modules, self.refusal = modules, ""
        self.ran: dict[CodeType, dict[str, Any]] = {}  # the code that ran, with its global variables
        self._replaced = hooks.replaced_code()
        self._kinds = [ENGINE]  # of the frames, the innermost last
        self._before: list[tuple[FrameType, Any]] = []  # calls of this package by the step's own code

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """The result of the step."""
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

    def refuse(self, reason: str) -> None:
        """Note why the step cannot be captured; the first reason stays."""
        self.refusal = self.refusal or reason

    def aside(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """The result of a call that a program repeats. Not looked at: loops would compile in four times the time."""
        sys.setprofile(None)
        try:
            return function(*args, **options)
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
        elif event == "c_call" and self._kinds[-1] is CODE and not is_pure(function):
            caller = frame.f_code.co_qualname
            self.refuse(f"{caller}() calls {function.__qualname__}(), which a program would not call again")

    def _modes(self) -> list[Any]:
        """The attributes of the modules, but for tensors; and which tensors require gradients."""
        every = [value for module in self.modules for value in vars(module).values()]
        return [value._requires_grad if isinstance(value, Tensor) else value for value in every]

    def _kind(self, frame: FrameType) -> str:
        """What the code of a frame is; code that may not be called, and code that does what lasts, is refused."""
        above, code, name = self._kinds[-1], frame.f_code, frame.f_globals.get("__name__") or ""
        package, _, rest = name.partition(".")
        if above is REFUSED:
            return REFUSED
        if package in OWN:
            if rest == "keywords":  # what it wraps is what the step calls
                return above
            if above is CODE and rest.partition(".")[0] not in RECORDED:
                self.refuse(f"the step calls {code.co_qualname}(), which a program would not call again")
                return REFUSED
            if above is CODE and code in self._replaced:
                self.refuse(f"the step calls {code.co_qualname}() by a name of its own; call it by its object")
            return ENGINE
        if above is not CODE and (package == "numpy" or _is_standard(package, code)):
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
                self.refuse(f"{code.co_qualname}() {what}{named}, which a program would not do again")
        for name in sorted(IMPURE.intersection(code.co_names)):
            self.refuse(f"{code.co_qualname}() uses {name}, which a program would not do again")


def _is_standard(package: str, code: CodeType) -> bool:
    """Whether it is code of Python's library."""
    file = code.co_filename
    return package in sys.stdlib_module_names and file.startswith(STDLIB) and "site-packages" not in file


def is_pure(function: Any) -> bool:
    """Whether a C function changes nothing that lasts. Changes of lists, dictionaries and sets are found by `Reads`."""
    owner = getattr(function, "__self__", None)
    return type(owner) in OWNERS or function in PURE or isinstance(owner, Block)
