"""Settings of the current thread or task: whether ops record, run as compositions, or remember their callers."""

from __future__ import annotations

import io
import operator
import os
import traceback
import types
from collections.abc import Callable
from contextlib import ContextDecorator
from contextvars import ContextVar, copy_context
from functools import partial, wraps
from inspect import isasyncgenfunction, iscoroutinefunction, isgeneratorfunction
from typing import Any, Self, TypeVar

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

RECORDING: ContextVar[bool] = ContextVar("recording", default=True)
COMPOSED: ContextVar[bool] = ContextVar("composed", default=False)
DEBUGGING: ContextVar[bool] = ContextVar("debugging", default=False)


class _Mode(io.IOBase, ContextDecorator):
    """A setting for a block or a decorated function.

    Ctrl-C may come before the first line of any method in Python, and an `__exit__` in Python would then do nothing.
    That of IOBase is written in C, and calls `close`. Here `close` takes the last of `undo` and calls it, in C too.
    """

    closed = True  # nothing is left to do when this object goes

    def __init__(self, variable: ContextVar[bool], value: bool) -> None:
        self.variable, self.value = variable, value
        self.undo: list[Callable[[], None]] = []  # several if entered twice
        self.close = map(operator.call, iter(self.undo.pop, None)).__next__  # type: ignore[method-assign]

    def __enter__(self) -> Self:
        before = self.variable.get()
        try:
            self.undo.append(partial(self.variable.reset, self.variable.set(self.value)))
        except BaseException:  # Ctrl-C: `with` does not call `__exit__` then
            self.variable.set(before)
            raise
        return self

    def _recreate_cm(self) -> Self:
        return type(self)(self.variable, self.value)  # a new one for each call of a decorated function: for threads

    def __call__(self, function: F) -> F:
        """The function with this setting in its body, and not where the body waits at a yield or an await."""
        pausing: Any = _decorated(function, self)
        return pausing or super().__call__(function)


def _decorated(function: Callable[..., Any], mode: _Mode) -> Any:
    """A generator or coroutine function under `mode`; None for a plain function, whose body never waits."""
    if isgeneratorfunction(function):

        @wraps(function)
        def generator(*args: Any, **kwargs: Any) -> Any:
            return (yield from _Pausing(mode).steps(function(*args, **kwargs)))

        return generator
    if iscoroutinefunction(function):

        @wraps(function)
        async def coroutine(*args: Any, **kwargs: Any) -> Any:
            return await _Pausing(mode).steps(function(*args, **kwargs))

        return coroutine
    if isasyncgenfunction(function):

        @wraps(function)
        async def async_generator(*args: Any, **kwargs: Any) -> Any:
            body, pausing = function(*args, **kwargs), _Pausing(mode)
            step = body.asend(None)
            while True:
                try:
                    result = await pausing.steps(step)
                except StopAsyncIteration:
                    return
                try:
                    step = body.asend((yield result))
                except BaseException as error:  # thrown in here, for the body; also when it is closed
                    step = body.athrow(error)

        return async_generator
    return None


class _Pausing:
    """A setting that holds while a generator or coroutine runs, and not while it waits for its caller."""

    def __init__(self, mode: _Mode) -> None:
        self.variable, self.inside = mode.variable, mode.value

    @types.coroutine
    def steps(self, body: Any) -> Any:
        """Run `body` from pause to pause, passing on what is sent and thrown in; its result."""
        step, sent = body.send, None
        while True:
            before = self.variable.get()
            try:
                self.variable.set(self.inside)
                result = step(sent)
            except StopIteration as end:
                return end.value
            finally:
                try:
                    self.inside = self.variable.get()  # the body may have paused in a block of its own
                finally:  # after a Ctrl-C too
                    self.variable.set(before)
            try:
                step, sent = body.send, (yield result)
            except BaseException as error:
                step, sent = body.throw, error


def call_recording(on: bool, function: Callable[..., T], *args: Any) -> T:
    """`function(*args)`, in which ops record or do not. In a context of its own: the caller's never changes."""
    return copy_context().run(_call_recording, on, function, args)


def _call_recording(on: bool, function: Callable[..., T], args: tuple[Any, ...]) -> T:
    RECORDING.set(on)
    return function(*args)


def recording(on: bool) -> _Mode:
    """Inside `with recording(on):` ops record how their results are computed, or do not."""
    return _Mode(RECORDING, on)


def no_grad() -> _Mode:
    """Inside `with no_grad():`, or a function under `@no_grad()`, no graph is built, and `+=` changes a tensor.

    Under `@no_grad()` a generator or coroutine function records nothing in its body; its caller records while it waits.
    """
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


def calling_lines() -> str:
    """The innermost lines of the program outside this package."""
    frames = [f for f in traceback.extract_stack() if not f.filename.startswith(os.path.dirname(__file__))]
    return "".join(traceback.format_list(frames[-2:]))
