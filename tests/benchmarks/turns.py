"""Contenders in processes of their own that take turns.

Idle threads of OpenMP, OpenBLAS and JAX go on spinning for a while and slow down other work on the same cores, also
that of other processes. So a process is stopped by a signal while it is not its turn.
"""

import ctypes
import importlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

CORES = 2  # for each contender
WARM, TIMED = 10e-3, 2e-3  # seconds of calls in a turn: first untimed, as caches and clocks get going, then timed
MODULES = {
    "ours": "ours",
    "captured": "ours_captured",
    "NumPy": "in_numpy",
    "PyTorch": "in_torch",
    "compiled": "in_torch",
    "JAX jit": "in_jax",
}
PR_SET_PDEATHSIG = 1  # of Linux: a signal for when the parent ends


class Contender:
    """A library in a process of its own, which runs only while it is asked something. `work` names its functions."""

    def __init__(self, name: str) -> None:
        self.name = name
        command, pipe = [sys.executable, "-m", "tests.benchmarks.turns", name], subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, process_group=0)
        try:
            self.ask("begin")
        except BaseException:  # a library that is not installed, or Ctrl-C: leave no process behind
            self.close()
            raise

    def ask(self, *question: Any) -> Any:
        """The answer to one line; the process is stopped again then. Raises RuntimeError if it ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._send(signal.SIGCONT)
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        self._send(signal.SIGSTOP)
        if not answer:
            raise RuntimeError(f"the process of {self.name} ended with {self.process.wait()} at {question}")
        return json.loads(answer)

    def prepare(self, work: str, *args: Any) -> bool:
        """Get ready for turns of this work; False if this contender has no such row."""
        return bool(self.ask("prepare", work, *args))

    def turn(self) -> float:
        """Seconds that a call takes, on the mean of a few."""
        return float(self.ask("turn"))

    def once(self) -> float:
        """Seconds that one call takes, without calls before."""
        return float(self.ask("once"))

    def peak(self, work: str, *args: Any) -> int:
        """Bytes of memory that the first call of this work takes at its peak, beyond what the process has (Linux)."""
        return int(self.ask("peak", work, *args))

    def close(self) -> None:
        """End the process."""
        self._send(signal.SIGKILL)
        self.process.communicate()

    def _send(self, number: signal.Signals) -> None:
        """A signal to the process and to those that it started, such as compilers."""
        with suppress(ProcessLookupError):  # it ended
            os.killpg(self.process.pid, number)


def measured(contenders: Sequence[Contender], seconds: float, rounds: int, work: str, *args: Any) -> dict[str, float]:
    """Milliseconds of each contender that has this work: the median of its turns, in rounds of one turn each."""
    present = [c for c in contenders if c.prepare(work, *args)]
    times: dict[str, list[float]] = {c.name: [] for c in present}
    end, done = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or done < rounds:
        for c in present:
            times[c.name].append(c.turn())
        done += 1
    return {name: statistics.median(values) * 1e3 for name, values in times.items()}


# ---- in the contender's process --------------------------------------------------------------------------


def seconds_per_call(work: Callable[[], object], calls: int) -> float:
    """The mean over so many calls."""
    start = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - start) / calls


def turn(work: Callable[[], object]) -> float:
    """Calls that are not timed, for WARM seconds, then about TIMED seconds of calls that are."""
    start, calls = time.perf_counter(), 0
    while calls < 2 or time.perf_counter() - start < WARM:
        work()
        calls += 1
    each = (time.perf_counter() - start) / calls
    return seconds_per_call(work, max(1, int(TIMED / each)))


def peak(work: Callable[[], object]) -> int:
    """See `Contender.peak`."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _memory("VmRSS")
    work()
    return _memory("VmHWM") - before


def _memory(field: str) -> int:
    """A line of Linux' account of this process, in bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def built(library: Any, work: str, *args: Any) -> Callable[[], object] | None:
    """The work of a library; None if it has no such row."""
    build = getattr(library, work, None)
    return None if build is None else build(*args)  # type: ignore[no-any-return]


def answer_questions(name: str) -> None:
    """Read a question on each line, and write the answer, until the input ends."""
    if sys.platform == "linux":  # a stopped process does not see that the input ends
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if hasattr(os, "sched_setaffinity"):  # before anything asks how many cores there are
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries may print
    library = importlib.import_module(f"tests.benchmarks.{MODULES[name]}")
    library.COMPILED = name == "compiled"  # type: ignore[attr-defined]
    work: Any = None
    for line in sys.stdin:
        question, *args = json.loads(line)
        answer: Any = True
        if question == "prepare":
            work = None  # free the arrays of the last one
            work = built(library, *args)
            answer = work is not None
            if work:
                work()  # compiles
        elif question == "turn":
            answer = turn(work)
        elif question == "once":
            answer = seconds_per_call(work, 1)
        elif question == "peak":
            answer = peak(built(library, *args))
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    answer_questions(sys.argv[1])
