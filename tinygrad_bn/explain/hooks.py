"""Where explanations look on: functions of the engine that are replaced while a block records, and only then.

The engine has no code for this, so it costs nothing when nobody records. A replacement asks for the recorder of the
current thread or task; without one it calls the function that it replaces.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from threading import Lock
from typing import Any

from tinygrad_bn import autograd, backend, tensor
from tinygrad_bn.nn.module import Module

RECORDER: ContextVar[Any] = ContextVar("recorder", default=None)

# Owner, its function, and the method of the recorder that is called instead, with the function first.
PLACES = (
    (tensor, "apply", "apply"),
    (autograd, "apply", "apply"),
    (autograd, "_backprop", "backward_pass"),
    (autograd, "_pull", "pull"),
    (backend, "forward", "forward"),
    (backend, "vjp", "vjp"),
    (Module, "__call__", "module"),
)

_lock = Lock()
_blocks = 0  # how many blocks record now, in all threads
_originals: list[Any] = []


def _replacement(original: Callable[..., Any], method: str) -> Callable[..., Any]:
    @wraps(original)
    def call(*args: Any, **options: Any) -> Any:
        recorder = RECORDER.get()
        if recorder is None:
            return original(*args, **options)
        return getattr(recorder, method)(original, *args, **options)

    return call


def install() -> None:
    """Replace the functions of `PLACES`, unless another block has."""
    global _blocks
    with _lock:
        _blocks += 1
        if _blocks == 1:
            for owner, name, method in PLACES:
                _originals.append(getattr(owner, name))
                setattr(owner, name, _replacement(_originals[-1], method))


def uninstall() -> None:
    """Put the functions back when the last block ends."""
    global _blocks
    with _lock:
        _blocks -= 1
        if _blocks == 0:
            for owner, name, _ in reversed(PLACES):
                setattr(owner, name, _originals.pop())
