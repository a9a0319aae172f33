"""The table of programs for cuda: what the compiler and the interpreter say of each. `python -m tests.ptx.table`.

It prints `kernels/cuda_programs.md`; numba-cuda, the CUDA toolkit's compiler and nvdisasm are needed, and no GPU.
"""

from dataclasses import dataclass

from tests.ptx.compile import ARCHITECTURES, assemble
from tests.ptx.programs import Interpreted, interpreted, programs, ptx_for
from tests.ptx.test_accesses import BUSY

HEAD = """# The programs for cuda

What `python -m tests.ptx.table` says of each program, for float32. A name ends in the layout of its operands: `a` an array,
`n` a number, a `4` that 128 bits are moved at a time, `rows` that operands are broadcast.

- *registers* of a thread, for {archs}, as `ptxas` gives them; no program spills any or has a stack frame;
- *shared*: bytes of shared memory of a block;
- *bytes*: what the threads ask memory for, for each element of the largest array, in the launches of
  `tests/ptx/test_accesses.py`; *least*: the bytes that were touched at all, each counted once. A program that asks for
  more reads something again, most often from a cache;
- *sectors*: pieces of 32 bytes that a warp's request touches, for loads and stores of 32 and of 128 bits a thread; 4 and
  16 are the least where all lanes take part;
- *executed*: its PTX was run by the interpreter of `tests/ptx`, against float64, in the tests;
- *timed*: on a GPU.

| program | registers | shared | bytes | least | sectors, 32 bits | 128 bits | executed | timed |
| --- | --- | ---: | ---: | ---: | ---: | ---: | --- | --- |
"""


@dataclass
class Moved:
    """Sums over a program's launches."""

    elements: int = 0
    asked: int = 0
    least: int = 0
    requests: dict[int, int] | None = None
    sectors: dict[int, int] | None = None


class Measuring(Interpreted):
    """A driver that adds up what programs move."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: dict[str, Moved] = {}

    def launch(self, *arguments) -> None:
        super().launch(*arguments)
        name, report = self.launches[-1]
        touched = self.last.touched()
        moved = self.moved.setdefault(name, Moved(requests={32: 0, 128: 0}, sectors={32: 0, 128: 0}))
        moved.elements += max(self.sizes[address] for address in touched) // 4
        moved.least += sum(read + written for read, written in touched.values())
        for (space, kind, bits), traffic in report.traffic.items():
            if space == "global":
                moved.asked += traffic.nbytes
                if kind != "atomic" and bits in moved.requests:
                    moved.requests[bits] += traffic.requests
                    moved.sectors[bits] += traffic.sectors


def rows() -> list[str]:
    """A row of the table for each program."""
    codes = {cc: assemble({n: ptx_for(p, cc) for n, p in programs().items()}, cc) for cc in ARCHITECTURES}
    with interpreted(device=Measuring()) as device:
        for launch in BUSY.values():
            launch()
    lines = []
    for name, program in programs().items():
        moved = device.moved[name]
        sectors = [f"{moved.sectors[b] / moved.requests[b]:.1f}" if moved.requests[b] else "" for b in (32, 128)]
        numbers = [
            f"`{name}`",
            ", ".join(str(codes[cc][name].registers) for cc in ARCHITECTURES),
            str(program.shared or ""),
            f"{moved.asked / moved.elements:.1f}",
            f"{moved.least / moved.elements:.1f}",
            *sectors,
            "yes",
            "no",
        ]
        lines.append("| " + " | ".join(numbers) + " |")
    return lines


def page() -> str:
    archs = ", ".join(f"sm_{major}{minor}" for major, minor in ARCHITECTURES)
    return HEAD.format(archs=archs) + "\n".join(rows()) + "\n"


if __name__ == "__main__":
    print(page(), end="")
