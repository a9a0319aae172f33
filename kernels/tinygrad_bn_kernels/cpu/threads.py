"""When a kernel runs on several threads, and what makes that safe: after a fork, and beside BLAS.

A kernel has a serial and a parallel driver over the same loops. OpenMP's threads do not survive a fork (libgomp ends
the child that tries), so a forked child runs the serial drivers; the results are the same, bit for bit.
"""

import os

# Read by libgomp when it is loaded: a thread that has nothing to do sleeps after about a microsecond instead of
# spinning for milliseconds, during which the next BLAS call would have to share its core.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# Elements from which two threads are faster than one. Measured on 2 cores: a launch takes 2 to 12 µs, a pass over
# 64 k float32 elements about 20 µs.
PARALLEL_FROM = int(os.environ.get("TINYGRAD_BN_PARALLEL_FROM", 1 << 16))

_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_after_fork)


def use_threads(elements: int) -> bool:
    """Whether to run the parallel driver for work on so many elements."""
    return elements >= PARALLEL_FROM and not _forked
