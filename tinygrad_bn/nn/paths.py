"""In which module something happened: its path in the network, and a note of it on errors."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tinygrad_bn.backend import described

if TYPE_CHECKING:
    from tinygrad_bn.nn.module import Module


def path_of(modules: Sequence[Module]) -> str:
    """The path of the innermost of the running modules, as in the outermost's state dict, and its type; "" for none."""
    if not modules:
        return ""
    names = {module: name for name, module in modules[0].named_modules()}
    for module in reversed(modules):
        for candidate in (module, *module.children()):  # a module made for the occasion has the real one as child
            if candidate in names:
                name, kind = names[candidate], type(candidate).__name__
                return f"{name} ({kind})" if name else kind
    return ""


def add_path(error: Exception) -> None:
    """Note on an error that leaves the call of a module in which module it was raised, and what that was called with.

    To be called by `Module.__call__`. Only the outermost call adds the note: the traceback has the others.
    """
    frame = sys._getframe(1)
    call, outer = frame.f_code, frame.f_back
    while outer is not None:
        if outer.f_code is call:
            return
        outer = outer.f_back
    calls = [f.f_locals for f, _ in traceback.walk_tb(error.__traceback__) if f.f_code is call and f.f_locals]
    try:
        path = path_of([found["self"] for found in calls])
    except (TypeError, ValueError, RecursionError):  # state that is not found, a module in itself, or too deep
        path = type(calls[-1]["self"]).__name__
    got = ", ".join([described(a) for a in calls[-1]["args"]])
    error.add_note(f"in module {path}, called with {got or 'no input'}")
