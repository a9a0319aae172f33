"""Fuzz the readers of files: python -m tests.fuzz [NAME ...] [--cases N] [--seed N]. Prints a line for each format."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.target import Files, Target, check
from tests.fuzz.targets import TARGETS

RUN = 5_000  # cases: what Hypothesis keeps of a run grows with it


def fuzz(target: Target, cases: int, start: int) -> Counter[str]:
    """How many cases were accepted and refused. Raises what the smallest failing case raised."""
    seen: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:

        @seed(start)
        @settings(max_examples=cases, deadline=None, database=None, phases=(Phase.generate, Phase.shrink),
                  suppress_health_check=list(HealthCheck), print_blob=False)  # fmt: skip
        @given(files=target.files)
        def run(files: Files) -> None:
            seen[check(target, files, Path(folder))] += 1

        run()
    return seen


def main() -> None:
    """Fuzz the formats that are named, or all."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz the readers of files.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(TARGETS)}; all if none is given")
    parser.add_argument("--cases", type=int, default=100_000, help="for each format")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in options.names or TARGETS:
        if name not in TARGETS:
            parser.error(f"no format {name!r}; the formats are {', '.join(TARGETS)}")
        start, seen = time.perf_counter(), Counter[str]()
        for done in range(0, options.cases, RUN):
            seen += fuzz(TARGETS[name], min(RUN, options.cases - done), options.seed + done)
            seconds = time.perf_counter() - start
            counts = f"{seen['accepted']:7} accepted {seen['refused']:7} refused"
            print(f"\r{name:12} {counts} {seconds:7.0f} s", end="", flush=True)
        print()


if __name__ == "__main__":
    main()
