"""When a loop runs on several threads, and on how many.

A compiled loop takes `(*arguments, start, stop)` and processes the items [start, stop). Large work is split into parts
for a thread pool. Each item has one writer and sums its terms in a fixed order, so results have the same bits for any
number of threads.

Numba's own threads (OpenMP, TBB, workqueue) take the same time for whole training steps, but OpenMP kills forked
children that use it, and workqueue aborts beside a `prange` of the user. `kernels/README.md` has the figures.
"""

import atexit
import os
from collections.abc import Callable
from contextlib import suppress
from threading import Lock
from typing import TYPE_CHECKING

from tinygrad_bn_kernels import RENEWED_IN_CHILDREN, importing

if TYPE_CHECKING:
    from tinygrad_bn_kernels.cpu.thread_pool import ThreadPool


def setting(name: str, default: int, least: int, most: int = 1 << 40) -> int:
    """The environment variable `name` as an integer. Raises ValueError if it is not one in [least, most]."""
    text = os.environ.get(name, str(default))
    if not text.strip().isdecimal() or not least <= int(text) <= most:
        raise ValueError(f"{name} has to be a whole number, at least {least} and at most {most}; it is {text!r}")
    return int(text)


# From this many elements two threads are faster than one. Measured on 2 cores: starting a job takes 30 to 40 µs, a pass
# over 262,144 float32 elements about 80 µs.
PARALLEL_FROM = setting("TINYGRAD_BN_PARALLEL_FROM", 1 << 18, least=0)

# Cost of one element in some loops, for that threshold; reading and writing one costs 1. READING_COST is for loops that
# only read. Measured on arrays of 1 to 10 million elements.
EXP_COST = 4
ERF_COST = 20
PHILOX_COST = 4
READING_COST = 1 / 8

# Multiplications of a matrix product or a convolution that cost as much as one element.
MULTIPLICATIONS = 16

# Parts per thread: a late or slow thread takes fewer of them.
PARTS = 4

MOST_THREADS = 256

_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
_threads = setting("TINYGRAD_BN_NUM_THREADS", min(_cores, MOST_THREADS), least=1, most=MOST_THREADS)
_pool: "ThreadPool | None" = None
_busy = Lock()


def num_threads() -> int:
    """Number of threads for large work: `set_num_threads`, TINYGRAD_BN_NUM_THREADS, or by default the cores."""
    return _threads


def set_num_threads(count: int) -> None:
    """Use `count` threads for large work. Raises ValueError unless it is from 1 to MOST_THREADS."""
    global _threads
    if not isinstance(count, int) or not 1 <= count <= MOST_THREADS:
        raise ValueError(f"expected 1 to {MOST_THREADS} threads; got {count!r}")
    with _busy:
        _shutdown()
        _threads = count


def split(loop: Callable[..., object], items: int, elements: float, *args: object) -> None:
    """Run `loop(*args, start, stop)` over `items` items: in parallel if `elements` reaches PARALLEL_FROM.

    `loop` is compiled by Numba; `args` are arrays, numbers and tuples of integers. If another thread uses the pool, the
    loop runs serially, and rarely waits.
    """
    if elements < PARALLEL_FROM or items <= 1 or _threads == 1 or _busy.locked():
        loop(*args, 0, items)
        return
    with _busy:
        try:
            if pool := _started_pool():
                pool.run(loop, items, min(PARTS * _threads, items), args)
            else:
                loop(*args, 0, items)
        except BaseException:
            _shutdown()  # waits until no worker uses the arguments
            raise


def _started_pool() -> "ThreadPool | None":
    """The pool with its workers; None without compilation, and with bounds checks, which may raise on any thread."""
    global _pool
    if _pool is None:
        with importing:  # not at the top: small reductions do not import Numba
            from numba import config

            from tinygrad_bn_kernels.cpu.thread_pool import ThreadPool

        if config.DISABLE_JIT or config.BOUNDSCHECK:  # type: ignore[attr-defined]
            return None
        _pool = ThreadPool()
    with suppress(RuntimeError):  # the limit of threads is reached, or the interpreter exits: use fewer
        _pool.start_workers(_threads - 1)
    return _pool


def _shutdown() -> None:
    """End the workers: at exit, when their number changes, and after an error."""
    global _pool
    pool, _pool = _pool, None
    if pool is not None:
        pool.shutdown()


def _reset_after_fork() -> None:
    """Threads do not survive a fork: the child starts its own."""
    global _pool, _busy
    _pool, _busy = None, Lock()


atexit.register(_shutdown)
RENEWED_IN_CHILDREN.append(_reset_after_fork)
