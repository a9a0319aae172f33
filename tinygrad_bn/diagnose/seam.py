"""Watching the seam: every op with its operands and its result, and the place in the program that called it."""

from __future__ import annotations

import linecache
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np

from tinygrad_bn import autograd, hooks
from tinygrad_bn.nn.module import Module
from tinygrad_bn.tensor import Node, Op

PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep
ENGINE = {PACKAGE + name for name in ("tensor.py", "autograd.py", "backend.py", "modes.py")}
LOOKING_ON = (PACKAGE + "hooks.py", *(os.path.join(PACKAGE, folder, "") for folder in ("explain", "diagnose")))
LINES = 2  # of the caller's program


class Line(NamedTuple):
    """A line of a program that was being executed."""

    file: str
    number: int
    function: str

    def __str__(self) -> str:
        code = linecache.getline(self.file, self.number).strip()
        path = Path(self.file)
        for folder in (Path(PACKAGE), Path.cwd()):
            if path.is_relative_to(folder):
                path = path.relative_to(folder)
                break
        return f"{path}, line {self.number}, in {self.function}" + (f": {code}" if code else "")


@dataclass(frozen=True)
class Place:
    """Where an op was called.

    `modules` are those whose forward was running, the outermost first. `inside` is the line of this package, such as a
    step of a composition; `outside` are the innermost lines of the caller's program. In a backward pass, `node` is the
    node whose gradient was being computed. `recomputed`: the backward pass was running a composition forwards again.
    """

    modules: tuple[Module, ...] = ()
    inside: Line | None = None
    outside: tuple[Line, ...] = ()
    backward: bool = False
    node: Node | None = None
    recomputed: bool = False


@dataclass(frozen=True)
class Call:
    """A call of an op on arrays."""

    op: Op
    arrays: Sequence[Any]
    params: dict[str, Any]
    result: Any
    saved: Sequence[Any]
    place: Place


class Watcher:
    """Base of what watches the seam, as a listener of `hooks`. While `saw` or `saw_vjp` runs, nothing is watched."""

    def saw(self, call: Call) -> None:
        """An op has run. Operands that it overwrites are copies from before."""

    def saw_vjp(self, op: Op, g: Any, y: Any, arrays: Sequence[Any], params: dict[str, Any], gradients: Any) -> None:
        """The gradients of an op's operands, None where not needed; NotImplemented: its composition will give them."""

    def forward(self, original: Any, op: Op, arrays: Sequence[Any], params: dict[str, Any]) -> Any:
        """`backend.forward`, watched."""
        before = [a.copy() if hasattr(a, "dtype") else a for a in arrays] if op.updates else arrays
        with np.errstate(all="ignore"):
            y, saved = original(op, arrays, params)
            with hooks.unseen():
                self.saw(Call(op, before, params, y, saved, place()))
        return y, saved

    def vjp(
        self, original: Any, op: Op, g: Any, y: Any, arrays: Any, params: dict[str, Any], needs: Any, saved: Any
    ) -> Any:
        """`backend.vjp`, watched."""
        with np.errstate(all="ignore"):
            gradients = original(op, g, y, arrays, params, needs, saved)
            with hooks.unseen():
                self.saw_vjp(op, g, y, arrays, params, gradients)
        return gradients


# ---- places ---------------------------------------------------------------------------------------------

CALL, BACKPROP, RECOMPUTE = (
    function.__code__ for function in (Module.__call__, autograd._backprop, autograd._pull_composition)
)


def place() -> Place:
    """The place of the op that is being called, from the frames of the stack."""
    modules: list[Module] = []
    outside: list[Line] = []
    inside: Line | None = None
    node: Node | None = None
    backward = recomputed = False
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code is CALL:
            modules.append(frame.f_locals["self"])
        elif code is RECOMPUTE:
            recomputed = recomputed or not backward
        elif code is BACKPROP:
            backward, node = True, frame.f_locals["node"]  # the outermost wins: the op that the caller's program knows
        elif code is STOP:
            break
        elif not code.co_filename.startswith(PACKAGE):
            if len(outside) < LINES and "importlib" not in code.co_filename:
                outside.append(Line(code.co_filename, frame.f_lineno, code.co_name))
        elif inside is None and code.co_filename not in ENGINE and not code.co_filename.startswith(LOOKING_ON):
            inside = Line(code.co_filename, frame.f_lineno, code.co_name)
        frame = frame.f_back
    return Place(tuple(reversed(modules)), inside, tuple(reversed(outside)), backward, node, recomputed)


def alone(function: Any, *args: Any) -> Any:
    """Call a function whose ops have places of their own: without what is further out on the stack."""
    return function(*args)


STOP = alone.__code__
