"""The table of programs for cuda: what the compiler and the interpreter say of each. `python -m tests.ptx.table`.

It prints `kernels/cuda_programs.md`; numba-cuda, the CUDA toolkit's compiler and nvdisasm are needed, and no GPU.
"""

import math
from collections import Counter
from dataclasses import dataclass, field

from tests.ptx.compile import ARCHITECTURES, assemble
from tests.ptx.programs import Interpreted, interpreted, programs, ptx_for
from tests.ptx.test_accesses import BUSY

HEAD = """# The programs for cuda

What `python -m tests.ptx.table` says of each program, for float32. A name ends in the layout of its operands: `a` an
array, `n` a number, a `4` that 128 bits are moved at a time, `rows` that operands are broadcast.

- *registers* of a thread, for {archs}, as `ptxas` gives them; no program spills any or has a
  stack frame;
- *shared*: bytes of shared memory of a block;
- *bytes*: what the threads ask memory for, for each element of the largest array, in the launches of
  `tests/ptx/test_accesses.py`; *least*: the bytes that were touched at all, each counted once. A program that asks for
  more reads something again, most often from a cache;
- *sectors*: pieces of 32 bytes that a warp's request touches, for loads and stores of 32 and of 128 bits a thread; 4
  and 16 are the least where all lanes take part;
- *executed*: its PTX was run by the interpreter of `tests/ptx`, against float64, in the tests;
- *timed*: on a GPU.

| program | registers | shared | bytes | least | sectors, 32 bits | 128 bits | executed | timed |
| --- | --- | ---: | ---: | ---: | ---: | ---: | --- | --- |
"""


PAPER = """
## On paper: BatchNorm on an H100

Nobody has timed these programs. What can be said before: the bytes of the table at {rate} TB/s, the data sheet's figure
for an H100, take a time that no launch can beat, unless it finds them in the 50 MB of the L2 cache; and each launch has
a cost, taken as {launch} µs here. The *share* is that of the bandwidth that could be reached at most, if nothing else
took time.

| (N, C, S) | pass | launches | bytes an element | µs for the bytes | share, at most |
| --- | --- | ---: | ---: | ---: | ---: |
{lines}

So large layers are a matter of bytes, and small ones of launches. What to measure first, in this order:

1. the rate of a plain copy on the same device, which is the true ceiling;
2. whether the second reading of `plane4_moments` comes from the cache, as it is meant to: its time against that of one
   reading of x. If not, the forward pass moves 16 bytes an element in place of 12;
3. the gaps between the three launches of a pass, on a small layer;
4. `plane4_sums_relu`, whose 64 registers leave room for half of the threads that a multiprocessor could hold;
5. `normalize_planes4`, in which each lane reads its channel's constants again for every row.
"""
BANDWIDTH, LAUNCH = 3.35, 3.0  # TB/s and µs
PASSES = {  # the programs of each, but for those that work on channels alone
    "forward": ("plane4_moments", "normalize_planes4"),
    "backward": ("plane4_sums", "gradient_planes4"),
    "forward, with ReLU": ("plane4_moments", "normalize_planes4_relu"),
    "backward, with ReLU": ("plane4_sums_relu", "gradient_planes4_relu"),
}


@dataclass
class Moved:
    """Sums over a program's launches."""

    elements: int = 0
    asked: int = 0
    least: int = 0
    requests: Counter[int] = field(default_factory=Counter)  # by bits that a lane moves
    sectors: Counter[int] = field(default_factory=Counter)


class Measuring(Interpreted):
    """A driver that adds up what programs move."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: dict[str, Moved] = {}

    def launch(self, *arguments) -> None:
        super().launch(*arguments)
        name, report = self.launches[-1]
        touched = self.last.touched()
        moved = self.moved.setdefault(name, Moved())
        moved.elements += max(self.sizes[address] for address in touched) // 4
        moved.least += sum(read + written for read, written in touched.values())
        for (space, kind, bits), traffic in report.traffic.items():
            if space == "global":
                moved.asked += traffic.nbytes
                if kind != "atomic":
                    moved.requests[bits] += traffic.requests
                    moved.sectors[bits] += traffic.sectors


def measured() -> dict[str, Moved]:
    """What each program moves in the launches of `test_accesses.py`."""
    device = Measuring()
    with interpreted(device):
        for launch in BUSY.values():
            launch()
    return device.moved


def rows(moved: dict[str, Moved]) -> list[str]:
    """A row of the table for each program."""
    codes = {cc: assemble({n: ptx_for(p, cc) for n, p in programs().items()}, cc) for cc in ARCHITECTURES}
    lines = []
    for name, program in programs().items():
        m = moved[name]
        registers = ", ".join(str(codes[cc][name].registers) for cc in ARCHITECTURES)
        sectors = [f"{m.sectors[b] / m.requests[b]:.1f}" if m.requests[b] else "" for b in (32, 128)]
        asked, least = (f"{n / m.elements:.1f}" for n in (m.asked, m.least))
        cells = [f"`{name}`", registers, str(program.shared or ""), asked, least, *sectors, "yes", "no"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def estimates(moved: dict[str, Moved]) -> list[str]:
    """What bytes and launches leave of the bandwidth."""
    lines = []
    for shape in ((256, 64, 3136), (64, 256, 196), (128, 64, 64)):
        for name, parts in PASSES.items():
            found = [moved[f"batch_norm.{part}"] for part in parts]
            each = sum(round(m.least / m.elements) for m in found)
            time = each * math.prod(shape) / BANDWIDTH / 1e6
            share = time / (time + 3 * LAUNCH)
            lines.append(f"| {shape} | {name} | 3 | {each} | {time:.1f} | {share:.0%} |")
    return lines


def page() -> str:
    """The page, in Markdown."""
    moved = measured()
    head = HEAD.format(archs=", ".join(f"sm_{major}{minor}" for major, minor in ARCHITECTURES))
    paper = PAPER.format(rate=BANDWIDTH, launch=LAUNCH, lines="\n".join(estimates(moved)))
    return head + "\n".join(rows(moved)) + "\n" + paper


if __name__ == "__main__":
    print(page(), end="")
