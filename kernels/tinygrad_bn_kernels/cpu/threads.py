"""When a loop runs on several threads, and what makes that safe: beside BLAS, after a fork, and for every result.

A loop takes `(*arrays, start, stop)` and does that part of its work. Large work is cut into parts for a pool of
Python threads; compiled loops hold no GIL. An item has one writer, and its terms are added in one order, so a result
does not depend, in any bit, on how many threads there are.

OpenMP (Numba's `prange`) was measured and left: its threads spin between loops while those of BLAS spin between
products, so that on 2 cores each stalls the other, a forked child that uses it is killed, and a parallel loop takes
several times longer to compile.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress


def _setting(name: str, default: int, least: int) -> int:
    """A whole number that the environment may give. Raises ValueError, with its name, for anything else."""
    text = os.environ.get(name, str(default))
    if not text.strip().isdecimal() or int(text) < least:
        raise ValueError(f"{name} has to be a whole number, at least {least}; it is {text!r}")
    return int(text)


# Elements from which two threads are faster than one. Measured on 2 cores: waking a thread takes 50 to 100 µs, a pass
# over a million float32 elements about 300 µs.
PARALLEL_FROM = _setting("TINYGRAD_BN_PARALLEL_FROM", 1 << 20, least=0)

# What one element costs in some loops, for that decision: an exponential as much as moving four elements; what is only
# read, and not written, an eighth (measured likewise, on arrays of 1 to 10 million elements).
EXP_COST = 4
ERF_COST = 20
PHILOX_COST = 4
READING_COST = 1 / 8

# Parts of large work for each thread.
PARTS = 4

_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
_threads = _setting("TINYGRAD_BN_NUM_THREADS", _cores, least=1)
_pool: ThreadPoolExecutor | None = None


def num_threads() -> int:
    """How many threads large work is cut for: the cores, TINYGRAD_BN_NUM_THREADS, or what was set."""
    return _threads


def set_num_threads(count: int) -> None:
    """Use `count` threads for large work from now on. Raises ValueError if that is less than 1."""
    global _threads, _pool
    if count < 1:
        raise ValueError(f"there has to be at least one thread; got {count}")
    _threads, _pool = count, None


def split(loop: Callable[..., object], items: int, elements: float, *args: object) -> None:
    """Run `loop(*args, start, stop)` over all of `items`, in parts if there are `elements` enough for threads.

    A thread that is done with a part takes the next, so one that wakes late, or shares its core, holds up nobody.
    """
    parts = min(PARTS * _threads, items) if elements >= PARALLEL_FROM else 1
    if parts <= 1 or _threads == 1:
        loop(*args, 0, items)
        return
    bounds = [i * items // parts for i in range(parts + 1)]
    unclaimed = iter(range(parts))

    def work() -> None:
        for part in unclaimed:
            loop(*args, bounds[part], bounds[part + 1])

    others = []
    with suppress(RuntimeError):  # no more threads, or the interpreter is shutting down: fewer threads do all of it
        for _ in range(1, _threads):
            others.append(_executor().submit(work))  # noqa: PERF401  # an error has to leave those before it
    try:
        work()
    finally:
        for other in others:
            if not other.cancel():  # it has begun
                other.result()


def _executor() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(max(_threads - 1, 1), thread_name_prefix="tinygrad_bn")
    return _pool


def _forget_pool() -> None:
    """Threads do not survive a fork: the child makes its own when it first needs them."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
