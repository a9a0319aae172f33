"""Ctrl-C and SIGTERM during a training that writes checkpoints."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from types import FrameType
from typing import Any

WAITING = b"\ninterrupted: waiting for the end of the step; again to stop at once\n"


class Signals:
    """In this block SIGINT and SIGTERM raise KeyboardInterrupt: at once, or at the end of a block that is `held`.

    A second signal does not wait. At the end the handlers are those of before, and a signal that came is sent again, to
    them; but not SIGINT to Python's own handler, since `fit` says that it was interrupted. Signals that are ignored
    stay ignored. In other threads than the main one nothing changes, since signals do not come there.
    """

    def __init__(self) -> None:
        self.came: list[int] = []
        self._former: dict[int, Any] = {}
        self._held = False

    def __enter__(self) -> Signals:
        if current_thread() is main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                former = signal.getsignal(number)
                if former not in (None, signal.SIG_IGN):
                    self._former[number] = former
                    signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)
        for number in sorted({*self.came}):
            if self._former[number] is not signal.default_int_handler:
                signal.raise_signal(number)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.came.append(number)
        if len(self.came) > 1 or not self._held:
            raise KeyboardInterrupt
        os.write(2, WAITING)  # print() may not be called again while it runs

    @contextmanager
    def held(self) -> Iterator[None]:
        """A block in which the first signal waits."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self.came:
            raise KeyboardInterrupt
