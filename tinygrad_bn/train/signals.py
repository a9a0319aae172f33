"""Ctrl-C and SIGTERM during a training that writes checkpoints."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from types import FrameType
from typing import Any


class Signals:
    """In this block SIGINT and SIGTERM raise KeyboardInterrupt; while `held`, only at the end of that.

    A second signal does not wait. A handler of SIGINT that is not Python's own stays. In other threads than the main
    one nothing changes, since signals do not come there.
    """

    def __init__(self) -> None:
        self.number = 0  # of the signal that came
        self._former: dict[int, Any] = {}
        self._held = False

    def __enter__(self) -> Signals:
        if current_thread() is main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                former = signal.getsignal(number)
                if number == signal.SIGTERM or former is signal.default_int_handler:
                    self._former[number] = former
                    signal.signal(number, self._came)
        return self

    def __exit__(self, *_: object) -> None:
        for number, former in self._former.items():
            signal.signal(number, former if former is not None else signal.SIG_DFL)

    def _came(self, number: int, _: FrameType | None) -> None:
        again, self.number = self.number, number
        if again or not self._held:
            raise KeyboardInterrupt

    @contextmanager
    def held(self) -> Iterator[None]:
        """A block in which a signal waits."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self.number:
            raise KeyboardInterrupt
