"""The CUDA stream that each thread submits its work to."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_stream: ContextVar[int] = ContextVar("stream", default=0)


def current_stream() -> int:
    """Handle of this thread's current stream; 0 is the default stream."""
    return _stream.get()


@contextmanager
def on_stream(handle: int, order: Callable[[int, int], None]) -> Iterator[None]:
    """Make `handle` this thread's current stream in the block.

    `order(first, then)` makes stream `then` wait for all work submitted to `first` so far. It is called on entry and on
    exit, so work runs in program order on any streams, and memory freed on one stream can be reused on another.
    """
    before = current_stream()
    order(before, handle)
    token = _stream.set(handle)
    try:
        yield
    finally:
        try:
            order(handle, before)  # before the reset: memory freed in this call may still be in use on this stream
        finally:
            _stream.reset(token)
