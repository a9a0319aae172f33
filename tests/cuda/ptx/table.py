"""`python -m tests.cuda.ptx.table` prints `kernels/cuda_programs.md`, a table of all CUDA programs.

It needs numba-cuda, the CUDA toolkit's compiler and nvdisasm, and no GPU.
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from tests.cuda.gpu_report import SIZES, cases
from tests.cuda.ptx.compile import ARCHITECTURES, assemble
from tests.cuda.ptx.programs import Interpreted, interpreted, programs, ptx_for
from tests.cuda.ptx.test_accesses import BUSY

HEAD = """# The CUDA programs

Printed by `python -m tests.cuda.ptx.table`, for float32. A name ends in the layout of its operands: `a` an array, `n` a
number, `4` for 128-bit accesses, `rows` for operands that are broadcast.

- *registers*: of a thread, for {archs}, from `ptxas`; no program spills or has a stack frame;
- *shared*: bytes of shared memory of a block;
- *bytes*: requested by the threads, for each element of the largest array, in the launches of
  `tests/cuda/ptx/test_accesses.py`; *least*: distinct bytes touched. A program that requests more reads data again,
  usually from a cache;
- *sectors*: 32-byte pieces that a warp's request touches, for loads and stores of 32 and of 128 bits a thread; with all
  lanes active at least 4 and 16;
- *executed*: the tests run its PTX in the interpreter of `tests/cuda/ptx` and compare with float64;
- *in the report*: `make gpu-report`, on a machine with a GPU, launches it in a timed case.

| program | registers | shared | bytes | least | sectors, 32 bits | 128 bits | executed | in the report |
| --- | --- | ---: | ---: | ---: | ---: | ---: | --- | --- |
"""


@dataclass
class Moved:
    """Sums over a program's launches."""

    elements: int = 0
    asked: int = 0
    least: int = 0
    requests: Counter[int] = field(default_factory=Counter)  # by bits of a lane
    sectors: Counter[int] = field(default_factory=Counter)


class Measuring(Interpreted):
    """A driver that sums the traffic of programs."""

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
    """The traffic of each program in the launches of `test_accesses.py`."""
    device = Measuring()
    with interpreted(device):
        for launch in BUSY.values():
            launch()
    return device.moved


class Recording(Interpreted):
    """A driver of a large GPU that only records the names of launched programs."""

    processors = 132

    def alloc(self, nbytes: int) -> int:
        address, self.end = self.end, self.end + -(-max(nbytes, 1) // 256) * 256
        return address

    def free(self, pointer: int) -> None:
        pass

    def write(self, pointer: int, array: np.ndarray) -> None:
        pass

    def copy(self, to: int, source: int, nbytes: int) -> None:
        pass

    def launch(self, ptx: str, *arguments) -> None:
        self.launches.append((self._program(ptx), None))


def reported() -> set[str]:
    """The programs that the cases of the GPU report launch."""
    device = Recording()
    with interpreted(device):
        for images, flat in SIZES:
            for case in cases(images, flat):
                case.run()
    return {name for name, _ in device.launches}


def rows(moved: dict[str, Moved], in_report: set[str]) -> list[str]:
    """A row of the table for each program."""
    codes = {cc: assemble({n: ptx_for(p, cc) for n, p in programs().items()}, cc) for cc in ARCHITECTURES}
    lines = []
    for name, program in programs().items():
        m = moved[name]
        registers = ", ".join(str(codes[cc][name].registers) for cc in ARCHITECTURES)
        sectors = [f"{m.sectors[b] / m.requests[b]:.1f}" if m.requests[b] else "" for b in (32, 128)]
        asked, least = (f"{n / m.elements:.1f}" for n in (m.asked, m.least))
        cells = [
            f"`{name}`",
            registers,
            str(program.shared or ""),
            asked,
            least,
            *sectors,
            "yes",
            "yes" if name in in_report else "no",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def page() -> str:
    """The page, in Markdown."""
    head = HEAD.format(archs=", ".join(f"sm_{major}{minor}" for major, minor in ARCHITECTURES))
    return head + "\n".join(rows(measured(), reported())) + "\n"


if __name__ == "__main__":
    print(page(), end="")
