"""Settings of the current thread or task: whether ops record, run as compositions, or remember their callers."""

from __future__ import annotations

import io
import operator
import os
import traceback
import types
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import ContextDecorator
from contextvars import ContextVar, copy_context
from functools import partial, wraps
from inspect import (
    CO_ITERABLE_COROUTINE,
    CORO_CREATED,
    GEN_CREATED,
    getcoroutinestate,
    getgeneratorstate,
    isasyncgenfunction,
    iscoroutinefunction,
    isgeneratorfunction,
)
from itertools import repeat, starmap
from typing import Any, Generic, TypeVar

from tinygrad_bn.arguments import flag

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

RECORDING: ContextVar[bool] = ContextVar("recording", default=True)
COMPOSED: ContextVar[bool] = ContextVar("composed", default=False)
DEBUGGING: ContextVar[bool] = ContextVar("debugging", default=False)
REPEATING: ContextVar[bool] = ContextVar("repeating", default=False)


class Block(io.IOBase, ContextDecorator, Generic[T]):
    """A change for a block or a decorated function, which is undone at the end, also if that is a Ctrl-C.

    Ctrl-C may come before the first line of any method in Python, and an `__exit__` in Python would then do nothing.
    That of IOBase is written in C, and calls `close`. Here `close` takes the last of `undo` and calls it, in C too. Its
    result is False: an exception in the block goes on.

    Args:
        prepare: changes nothing yet. It returns two functions: one written in C that undoes the change, and one that
            makes it and returns the value of `with … as`.
    """

    closed = True  # nothing is left to do when this object goes

    def __init__(self, prepare: Callable[[], tuple[Callable[[], object], Callable[[], T]]]) -> None:
        self.prepare = prepare
        self.undo: list[Any] = []  # several if entered twice
        undone = map(operator.call, iter(self.undo.pop, None))
        self.close = map(operator.is_, undone, repeat(Block)).__next__  # type: ignore[assignment]  # False

    def __enter__(self) -> T:  # type: ignore[override]
        undo, change = self.prepare()
        try:
            self.undo.append(undo)
            result = change()
        except BaseException:  # Ctrl-C: `with` does not call `__exit__` then
            undo()
            raise
        return result

    def _recreate_cm(self) -> Block[T]:
        return Block(self.prepare)  # a new one for each call of a decorated function: for threads

    def __call__(self, function: F) -> F:
        """The function, static method or class method, with this change during its calls.

        Raises TypeError for anything else; and for one whose body runs after the call, at the latest when it is called.
        """
        if isinstance(function, staticmethod | classmethod):
            return type(function)(self(function.__func__))
        if not callable(function) or isinstance(function, type):
            raise TypeError(f"only functions and methods can be decorated; got {function!r}")
        return self._decorated(function)

    def _decorated(self, function: Any) -> Any:
        if _kind_of_body(function) is not None:
            raise TypeError(f"the body of {function!r} runs after the call: use a with block in it")

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._recreate_cm():
                result = function(*args, **kwargs)
            return self._in_body(result) if isinstance(result, BODIES) else result

        return call

    def _in_body(self, body: Any) -> Any:
        """The generator or coroutine that a decorated function returned, with this change in its body."""
        if not (isinstance(body, types.AsyncGeneratorType) or _began(body)):
            body.close()
        raise TypeError(f"the body of {body.__qualname__} runs after the call: use a with block in it")


class Mode(Block[Any]):
    """A setting for a block or a decorated function: the value of a context variable."""

    def __init__(self, variable: ContextVar[Any], value: object) -> None:
        super().__init__(lambda: (partial(variable.set, variable.get()), partial(variable.set, value)))
        self.variable, self.value = variable, value

    def _decorated(self, function: Any) -> Any:
        """The function with this setting in its body, and not where the body waits at a yield or an await."""
        kind = _kind_of_body(function)
        return super()._decorated(function) if kind is None else _pausing(kind, function, self)

    def _in_body(self, body: Any) -> Any:
        if _began(body):
            return body
        paused = _pausing(type(body), lambda: body, self)
        awaitable = _is_awaitable(getattr(body, "gi_code", None))
        return (types.coroutine(paused) if awaitable else paused)()


def attributes_as_before(attributes: Iterable[tuple[object, str]]) -> Callable[[], object]:
    """A function in C that gives attributes, each an object and a name, the values that they have now."""
    states = [(vars(owner), {name: getattr(owner, name)}) for owner, name in attributes]
    return partial(deque, starmap(dict.update, states), 0)


def _began(body: Any) -> bool:
    """Whether this generator or coroutine began before. Then the function that returns it did not make it."""
    if isinstance(body, types.GeneratorType):
        return getgeneratorstate(body) != GEN_CREATED
    return isinstance(body, types.CoroutineType) and getcoroutinestate(body) != CORO_CREATED


BODIES = (types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType)


def _kind_of_body(function: Any) -> type | None:
    """What a call of a generator or coroutine function, or of an object with such a `__call__`, returns."""
    for f in (function, type(function).__call__):
        if isgeneratorfunction(f) and not _is_awaitable(getattr(f, "__code__", None)):
            return types.GeneratorType
        if iscoroutinefunction(f):
            return types.CoroutineType
        if isasyncgenfunction(f):
            return types.AsyncGeneratorType
    return None


def _is_awaitable(code: types.CodeType | None) -> bool:
    """Whether this is the code of a generator function under `types.coroutine`."""
    return code is not None and bool(code.co_flags & CO_ITERABLE_COROUTINE)


def _pausing(kind: type, function: Callable[..., Any], mode: Mode) -> Any:
    """The function under `mode`; `kind` is the type of what it returns."""
    if kind is types.GeneratorType:

        @wraps(function)
        def generator(*args: Any, **kwargs: Any) -> Any:
            return (yield from _Pausing(mode).steps(function(*args, **kwargs)))

        return generator
    if kind is types.CoroutineType:

        @wraps(function)
        async def coroutine(*args: Any, **kwargs: Any) -> Any:
            return await _Pausing(mode).steps(function(*args, **kwargs))

        return coroutine

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


class _Pausing:
    """A setting that holds while a generator or coroutine runs, and not while it waits for its caller."""

    def __init__(self, mode: Mode) -> None:
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


def call_recording(create_graph: bool, function: Callable[..., T], *args: Any) -> T:
    """`function(*args)`, in which ops record or do not. In a context of its own: the caller's never changes."""
    on = create_graph if type(create_graph) is bool else flag("create_graph", create_graph)
    return copy_context().run(_call_recording, on, function, args)


def _call_recording(on: bool, function: Callable[..., T], args: tuple[Any, ...]) -> T:
    RECORDING.set(on)
    return function(*args)


def recording(on: bool) -> Mode:
    """Inside `with recording(on):` ops record how their results are computed, or do not."""
    return Mode(RECORDING, flag("on", on))


def no_grad() -> Mode:
    """Inside `with no_grad():`, or a function under `@no_grad()`, no graph is built, and `+=` changes a tensor.

    Under `@no_grad()` a generator or coroutine function records nothing in its body; its caller records while it waits.
    """
    return Mode(RECORDING, False)


def is_recording() -> bool:
    """Whether ops record how their results are computed."""
    return RECORDING.get()


def composed() -> Mode:
    """Inside `with composed():` fused ops run as their compositions, so that each step is a tensor of its own."""
    return Mode(COMPOSED, True)


def debug() -> Mode:
    """Inside `with debug():` an error in the backward pass of an op says where the op was called."""
    return Mode(DEBUGGING, True)


def repeating() -> Mode:
    """Inside `with repeating():` a module computes again what it has computed: running statistics do not move."""
    return Mode(REPEATING, True)


def calling_lines() -> str:
    """The innermost lines of the program outside this package."""
    frames = [f for f in traceback.extract_stack() if not f.filename.startswith(os.path.dirname(__file__))]
    return "".join(traceback.format_list(frames[-2:]))
