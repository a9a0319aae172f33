"""Train the networks of the articles for thousands of steps, and fail if memory or anything else grows.

The cycle collector is off. Every step has another batch size than the one before, and every PERIOD steps graphs of
2,000 layers and of 2,000 branches come between. Each network trains with and without `capture`. After a warm-up, none
of these may grow: resident memory, Python's memory blocks and objects, Tensors and Nodes, cached programs and results,
open files, and threads; and the collector may find no cycle.
"""

import argparse
import functools
import gc
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from tinygrad_bn_kernels.cpu import thread_pool

from tests.tools.networks import NETWORKS, Training, deep_graph, wide_graph
from tinygrad_bn.tensor import Node, Tensor

PERIOD = 40 * Training.PERIOD  # steps from one sample of the counts to the next: the batch sizes are then the same
WARM_UP = 0.25  # of the steps: libraries fill their pools, and programs are recorded
BLOCKS = 12  # of samples, whose means are fitted by a line: neighbouring samples are not independent
STUDENT = 2.228  # 97.5 % quantile of Student's t for BLOCKS - 2 degrees of freedom
EVERY = 20  # steps from one measurement of resident memory to the next
SLACK = {"objects": 50, "blocks": 500}  # of Python itself, such as its caches of code
TOLERATED = 128  # bytes of resident memory in a step: one arena of Python's, 1 MB, is 67 in 15,000 steps


@contextmanager
def without_collector() -> Iterator[None]:
    """No collection of cycles in this block."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def counts(training: Training) -> dict[str, int]:
    """What is alive now. Exact, and the same after each PERIOD of steps unless something grows."""
    objects = gc.get_objects()
    caches = [o for o in objects if type(o) is functools._lru_cache_wrapper and "tinygrad_bn" in o.__module__]
    return {
        "tensors": sum(issubclass(type(o), Tensor) for o in objects),  # not isinstance: it asks weak proxies too
        "nodes": sum(type(o) is Node for o in objects),
        "objects": len(objects),
        "blocks": sys.getallocatedblocks(),
        "programs": len(getattr(training.update, "programs", ())),
        "cached": len(thread_pool._entries) + sum(o.cache_info().currsize for o in caches),
        "threads": threading.active_count(),
        "files": len(os.listdir("/dev/fd")) if os.path.isdir("/dev/fd") else 0,
    }


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def slope(values: np.ndarray, steps: int) -> tuple[float, float]:
    """Growth in a step, and half of its 95 % confidence interval. The values are evenly spaced over `steps` steps."""
    y = np.array([block.mean() for block in np.array_split(values, BLOCKS)])
    x = (np.arange(BLOCKS) - (BLOCKS - 1) / 2) * steps / BLOCKS
    rise = x @ (y - y.mean()) / (x @ x)
    residual = y - y.mean() - rise * x
    return rise, STUDENT * math.sqrt(residual @ residual / (BLOCKS - 2) / (x @ x))


def soak(name: str, captured: bool, steps: int) -> list[str]:
    """Train, print what was measured, and return what grew."""
    began, training = time.perf_counter(), Training(name, captured)
    memory = np.zeros(-(-steps // EVERY))  # not a list, which would grow
    first, last, cycles = {}, {}, 0
    with without_collector():
        for n in range(steps):
            if n % PERIOD == 0:
                deep_graph()
                wide_graph()
                if n >= WARM_UP * steps:
                    found = gc.collect()
                    cycles += found if first else 0
                    last = counts(training)
                    first = first or last
            if n % EVERY == 0:
                memory[n // EVERY] = resident()
            training.step(n)
    quartiles = [memory[round(q * (len(memory) - 1))] / 2**20 for q in (0, 0.25, 0.5, 0.75, 1)]
    rise, half = slope(memory[int(WARM_UP * len(memory)) :], round((1 - WARM_UP) * steps))
    grown = [f"{key} from {first[key]} to {last[key]}" for key in first if last[key] - first[key] > SLACK.get(key, 0)]
    if rise - half > TOLERATED:
        grown.append(f"resident memory by {rise:.0f} ± {half:.0f} bytes in a step")
    if cycles:
        grown.append(f"{cycles} objects in cycles")
    print(
        f"{name}, {'captured' if captured else 'not captured'}: {steps} steps in {time.perf_counter() - began:.0f} s; "
        f"MB at quartiles {' '.join(f'{q:.1f}' for q in quartiles)}; {rise:+.1f} ± {half:.1f} bytes in a step\n"
        f"    {', '.join(f'{last[key]} {key} ({last[key] - first[key]:+d})' for key in last)}, {cycles} in cycles\n"
        f"    {'GREW: ' + '; '.join(grown) if grown else 'nothing grew'}",
        flush=True,
    )
    return grown


def main() -> int:
    """The status: 1 if anything grew."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000, help=f"of each network, at least {8 * PERIOD}")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--capture", choices=["on", "off", "both"], default="both")
    args = parser.parse_args()
    if args.steps < 8 * PERIOD:
        parser.error(f"--steps has to be at least {8 * PERIOD}; got {args.steps}")
    modes = {"on": [True], "off": [False], "both": [True, False]}[args.capture]
    grown = [soak(name, captured, args.steps) for name in args.networks for captured in modes]
    return 1 if any(grown) else 0


if __name__ == "__main__":
    sys.exit(main())
