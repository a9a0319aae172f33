"""Looking on: functions of the engine that are replaced while a block looks on, and only then.

The engine has no code for this, so it costs nothing without a listener. A replacement calls the listeners of the
current thread or task, each around the next, so that blocks nest in any order: an explanation in `detect_anomaly`, or
the other way round. A listener has a method for each place that it looks at, with the function to call as its first
argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial, wraps
from threading import Lock, get_ident
from typing import Any

from tinygrad_bn_kernels import HELD_AT_FORKS, RENEWED_IN_CHILDREN

from tinygrad_bn import autograd, backend, random, tensor
from tinygrad_bn.functional import losses
from tinygrad_bn.nn.batch_norm import _BatchNorm
from tinygrad_bn.nn.module import Module
from tinygrad_bn.optim import gradients
from tinygrad_bn.optim.optimizer import Optimizer
from tinygrad_bn.optim.schedules import Schedule

# Owner, its function, and the method of a listener that is called instead.
PLACES = (
    (tensor, "apply", "apply"),
    (autograd, "apply", "apply"),
    (autograd, "_cotangent", "cotangent"),
    (autograd, "_accumulate", "accumulate"),
    (autograd, "_backprop", "backward_pass"),
    (autograd, "_pull", "pull"),
    (backend, "forward", "forward"),
    (backend, "vjp", "vjp"),
    (Module, "__call__", "module"),
    (Module, "zero_grad", "host"),
    (_BatchNorm, "track", "host"),
    (Optimizer, "zero_grad", "host"),
    (Optimizer, "step", "host"),
    (Optimizer, "state_dict", "read"),
    (Module, "state_dict", "read"),
    (Schedule, "state_dict", "read"),
    (tensor.Tensor, "zero_grad", "host"),
    (Schedule, "step", "host"),
    (gradients, "_clip_norm", "host"),
    (gradients, "_clip_value", "host"),
    (random, "draw_key", "host"),
    (losses, "note", "host"),
    (backend, "new_array", "copy"),
    (backend, "full", "copy"),
    (backend, "move", "copy"),
    (backend, "index_copy", "copy"),
    (backend, "new_values", "read"),
    (backend, "read_only", "read"),
    (backend, "numpy_view", "read"),
    (backend, "converted", "read"),
    (backend, "to_numpy", "read"),
    (tensor.Tensor, "item", "read"),
)
SEAM = ("forward", "vjp")  # inside of these nothing is seen: an op may call others

_listeners: ContextVar[tuple[Any, ...]] = ContextVar("listeners", default=())
_lock = Lock()
_blocks: dict[object, int] = {}  # that look on now, with their threads
_originals: list[Any] = []

HELD_AT_FORKS.append(_lock)


@contextmanager
def listening(listener: Any) -> Iterator[None]:
    """In this block, of this thread or task, `listener` sees what the engine does."""
    block, before = object(), _listeners.get()
    try:  # from here on: Ctrl-C may come at any moment
        with _lock:
            if not _blocks:
                _originals[:] = [getattr(owner, name) for owner, name, _ in PLACES]
            _blocks[block] = get_ident()
            for (owner, name, method), original in zip(PLACES, _originals, strict=True):
                setattr(owner, name, _replacement(original, method))
        _listeners.set((*before, listener))
        yield
    finally:
        _listeners.set(before)
        with _lock:
            _end([block])


def _end(blocks: Iterable[object]) -> None:
    """These blocks look on no more. After the last one the functions of the engine are as before."""
    for block in blocks:
        _blocks.pop(block, None)
    if not _blocks:
        for (owner, name, _), original in zip(PLACES, _originals, strict=False):  # none if Ctrl-C came first
            setattr(owner, name, original)


def _end_other_threads() -> None:
    """For a forked child, which has one thread."""
    _end([block for block, thread in _blocks.items() if thread != get_ident()])


RENEWED_IN_CHILDREN.append(_end_other_threads)


def replaced_code() -> set[Any]:
    """The code of the functions that are replaced now: code that runs it has found the function before."""
    return {original.__code__ for original in _originals if hasattr(original, "__code__")}


def has_listeners() -> bool:
    """Whether a listener looks on, in this thread or task."""
    return bool(_listeners.get())


@contextmanager
def unseen() -> Iterator[None]:
    """In this block no listener looks on, but for blocks that begin in it: a listener's own work, or a measurement."""
    before = _listeners.get()
    try:
        _listeners.set(())
        yield
    finally:
        _listeners.set(before)


def _replacement(original: Callable[..., Any], method: str) -> Callable[..., Any]:
    @wraps(original)
    def inside(*args: Any, **options: Any) -> Any:
        with unseen():
            return original(*args, **options)

    innermost = inside if method in SEAM else original

    @wraps(original)
    def call(*args: Any, **options: Any) -> Any:
        run = innermost
        for listener in _listeners.get():
            if (look := getattr(listener, method, None)) is not None:
                run = partial(look, run)
        return (original if run is innermost else run)(*args, **options)

    return call
