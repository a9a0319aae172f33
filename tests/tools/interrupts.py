"""Real Ctrl-C at many moments."""

import gc
import signal
from collections.abc import Callable


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
