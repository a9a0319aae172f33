"""When a loop runs on several threads, and what makes that safe: for every result, and after a fork.

A compiled loop takes `(*arguments, start, stop)` and does that part of its work. Large work is cut into parts for
threads of our own. An item has one writer, and its terms are added in one order, so a result does not depend, in any
bit, on how many threads there are.

OpenMP (Numba's `prange`) was measured and left: a forked child that uses it is killed, a parallel loop takes several
times longer to compile, and every loop would be compiled twice, with and without threads.
"""

import atexit
import os
from collections.abc import Callable
from contextlib import suppress
from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinygrad_bn_kernels.cpu.helpers import Team


def setting(name: str, default: int, least: int, most: int = 1 << 40) -> int:
    """A whole number that the environment may give. Raises ValueError, with its name, for anything else."""
    text = os.environ.get(name, str(default))
    if not text.strip().isdecimal() or not least <= int(text) <= most:
        raise ValueError(f"{name} has to be a whole number, at least {least} and at most {most}; it is {text!r}")
    return int(text)


# Elements from which two threads are faster than one. Measured on 2 cores: handing work over takes 30 to 40 µs, a pass
# over 262,144 float32 elements about 80 µs.
PARALLEL_FROM = setting("TINYGRAD_BN_PARALLEL_FROM", 1 << 18, least=0)

# What one element costs in some loops, for that decision: an exponential as much as moving four elements; what is only
# read, and not written, an eighth (measured likewise, on arrays of 1 to 10 million elements).
EXP_COST = 4
ERF_COST = 20
PHILOX_COST = 4
READING_COST = 1 / 8

# Multiplications of a matrix product or a convolution that take as long as moving one element.
MULTIPLICATIONS = 16

# Parts of large work for each thread.
PARTS = 4

MOST_THREADS = 256

_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
_threads = setting("TINYGRAD_BN_NUM_THREADS", min(_cores, MOST_THREADS), least=1, most=MOST_THREADS)
_team: "Team | None" = None
_busy = Lock()


def num_threads() -> int:
    """How many threads large work is cut for: the cores, TINYGRAD_BN_NUM_THREADS, or what was set."""
    return _threads


def set_num_threads(count: int) -> None:
    """Use `count` threads for large work from now on. Raises ValueError for less than 1, or more than MOST_THREADS."""
    global _threads
    if not isinstance(count, int) or not 1 <= count <= MOST_THREADS:
        raise ValueError(f"there have to be 1 to {MOST_THREADS} threads; got {count!r}")
    with _busy:
        _leave()
        _threads = count


def split(loop: Callable[..., object], items: int, elements: float, *args: object) -> None:
    """Run `loop(*args, start, stop)` over all of `items`, in parts if there are `elements` enough for threads.

    The loop has to be compiled by Numba; its arguments are arrays, numbers, and tuples of whole numbers.
    Whoever is done with a part takes the next, so a thread that wakes late, or shares its core, holds up nobody.
    While the helpers work for another thread, this one does without them.
    """
    if elements < PARALLEL_FROM or items <= 1 or _threads == 1 or _busy.locked():
        loop(*args, 0, items)
        return
    with _busy:
        try:
            if team := _hired():
                team.run(loop, items, min(PARTS * _threads, items), args)
            else:
                loop(*args, 0, items)
        except BaseException:
            _leave()  # when nobody is at it any more
            raise


def _hired() -> "Team | None":
    """The helpers, or as many of them as there can be: none where loops are not compiled, or may raise an error in the
    midst of a part, as their indices are checked."""
    global _team
    if _team is None:
        from numba import config  # here, as small work does without Numba

        from tinygrad_bn_kernels.cpu.helpers import Team

        if config.DISABLE_JIT or config.BOUNDSCHECK:  # type: ignore[attr-defined]
            return None
        _team = Team()
    with suppress(RuntimeError):  # no more threads, or the interpreter is shutting down
        _team.hire(_threads - 1)
    return _team


def _leave() -> None:
    """End the helpers: before the interpreter, or their number changes, and after an error, which may leave them in the
    midst of a loop."""
    global _team
    team, _team = _team, None
    if team is not None:
        team.leave()


def _forget() -> None:
    """Threads do not survive a fork: the child makes its own when it first needs them."""
    global _team, _busy
    _team, _busy = None, Lock()


atexit.register(_leave)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
