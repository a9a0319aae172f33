"""Settings of the current thread or task: whether ops record, run as compositions, or remember their callers."""

from __future__ import annotations

from contextlib import ContextDecorator
from contextvars import ContextVar, Token
from typing import Self

RECORDING: ContextVar[bool] = ContextVar("recording", default=True)
COMPOSED: ContextVar[bool] = ContextVar("composed", default=False)
DEBUGGING: ContextVar[bool] = ContextVar("debugging", default=False)


class _Mode(ContextDecorator):
    """A setting for a block or a decorated function. A class, as a generator takes three times as long to enter."""

    def __init__(self, variable: ContextVar[bool], value: bool) -> None:
        self.variable, self.value, self.tokens = variable, value, list[Token[bool]]()  # several if entered twice

    def __enter__(self) -> None:
        self.tokens.append(self.variable.set(self.value))

    def __exit__(self, *error: object) -> None:
        self.variable.reset(self.tokens.pop())

    def _recreate_cm(self) -> Self:
        return type(self)(self.variable, self.value)  # a new one for each call of a decorated function: for threads


def recording(on: bool) -> _Mode:
    """Inside `with recording(on):` ops record how their results are computed, or do not."""
    return _Mode(RECORDING, on)


def no_grad() -> _Mode:
    """Inside `with no_grad():`, or a function under `@no_grad()`, no graph is built, and `+=` changes a tensor."""
    return _Mode(RECORDING, False)


def is_recording() -> bool:
    """Whether ops record how their results are computed."""
    return RECORDING.get()


def composed() -> _Mode:
    """Inside `with composed():` fused ops run as their compositions, so that each step is a tensor of its own."""
    return _Mode(COMPOSED, True)


def debug() -> _Mode:
    """Inside `with debug():` an error in the backward pass of an op says where the op was called."""
    return _Mode(DEBUGGING, True)
