"""Ctrl-C at many moments."""

import gc
import signal
import sys
from collections.abc import Callable
from linecache import getline
from types import FrameType


def interrupted_at(moment: int, function: Callable[[], object], files: tuple[str, ...]) -> tuple[object, int]:
    """The result of `function`, or None after KeyboardInterrupt; and how many lines it ran.

    Ctrl-C comes before a line of `files`, which are beginnings of paths; not before a `with`, whose end would be left
    out. No interrupt comes at moment 0.
    """
    lines = 0

    def trace(frame: FrameType, event: str, arg: object) -> object:
        nonlocal lines
        if event == "line" and not getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with "):
            lines += 1
            if lines == moment:
                raise KeyboardInterrupt
        return trace

    former = sys.gettrace()
    sys.settrace(lambda frame, *_: trace if frame.f_code.co_filename.startswith(files) else None)
    try:
        return function(), lines
    except KeyboardInterrupt:
        return None, lines
    finally:
        sys.settrace(former)


def caught_interrupts(count: int, work: Callable[[], object], after: Callable[[], object]) -> int:
    """Run `work` until an interrupt comes, and `after`, `count` times. How many interrupts reached this function."""
    delivered: list[int] = []
    caught = 0

    def handler(number: int, frame: object) -> None:
        delivered.append(number)
        raise KeyboardInterrupt

    def interrupted(i: int) -> None:  # a function: Python 3.13 handles no interrupt where a `while` ends a `try`
        signal.setitimer(signal.ITIMER_REAL, 1e-4 + i * 1e-6)
        while len(delivered) == i:
            work()

    callbacks = gc.callbacks[:]
    gc.callbacks.clear()  # Python ignores an interrupt in one, and Hypothesis has one
    former = signal.signal(signal.SIGALRM, handler)
    try:
        for i in range(count):
            try:
                interrupted(i)
            except KeyboardInterrupt:
                caught += 1
            after()
    finally:
        signal.signal(signal.SIGALRM, former)
        gc.callbacks.extend(callbacks)
    return caught
