"""`python -m tests.cuda.ptx.lesson` prints `kernels/block_reduction.md`: how a block of threads sums numbers.

It needs numba-cuda and the CUDA toolkit's compiler, and no GPU.
"""

import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda, float32, void

from tests.cuda.ptx.barriers import barriers, without_barrier
from tests.cuda.ptx.compile import compile_ptx
from tests.cuda.ptx.interpreter import Device, PTXError, Report, array_argument
from tests.cuda.ptx.machine import Machine
from tests.cuda.ptx.opcodes import source

ALL = 0xFFFFFFFF
SMALL, LARGE = 16, 256  # threads of a block: few enough to print, and as in the kernels


def tree(x, out):
    tile = cuda.shared.array(16, float32)
    t = cuda.threadIdx.x
    tile[t] = x[t]
    cuda.syncthreads()
    half = 8
    while half > 0:
        if t < half:
            tile[t] += tile[t + half]
        cuda.syncthreads()
        half //= 2
    if t == 0:
        out[0] = tile[0]


def warp(x, out):
    v = x[cuda.threadIdx.x]
    v += cuda.shfl_xor_sync(ALL, v, 16)
    v += cuda.shfl_xor_sync(ALL, v, 8)
    v += cuda.shfl_xor_sync(ALL, v, 4)
    v += cuda.shfl_xor_sync(ALL, v, 2)
    v += cuda.shfl_xor_sync(ALL, v, 1)
    out[cuda.threadIdx.x] = v


def neighbours(x, out):
    tile = cuda.shared.array(256, float32)
    t = cuda.threadIdx.x
    tile[t] = x[t]
    cuda.syncthreads()
    step = 1
    while step < 256:
        i = 2 * step * t
        if i < 256:
            tile[i] += tile[i + step]
        cuda.syncthreads()
        step *= 2
    if t == 0:
        out[0] = tile[0]


def halves(x, out):
    tile = cuda.shared.array(256, float32)
    t = cuda.threadIdx.x
    tile[t] = x[t]
    cuda.syncthreads()
    half = 128
    while half > 0:
        if t < half:
            tile[t] += tile[t + half]
        cuda.syncthreads()
        half //= 2
    if t == 0:
        out[0] = tile[0]


def shuffles(x, out):
    tile = cuda.shared.array(8, float32)
    t = cuda.threadIdx.x
    v = x[t]
    v += cuda.shfl_xor_sync(ALL, v, 16)
    v += cuda.shfl_xor_sync(ALL, v, 8)
    v += cuda.shfl_xor_sync(ALL, v, 4)
    v += cuda.shfl_xor_sync(ALL, v, 2)
    v += cuda.shfl_xor_sync(ALL, v, 1)
    if t % 32 == 0:
        tile[t // 32] = v
    cuda.syncthreads()
    v = tile[t % 8]
    v += cuda.shfl_xor_sync(ALL, v, 4)
    v += cuda.shfl_xor_sync(ALL, v, 2)
    v += cuda.shfl_xor_sync(ALL, v, 1)
    if t == 0:
        out[0] = v


def execute(kernel: Callable[..., None], threads: int, watch: Any = None, edit: Any = str) -> tuple[np.ndarray, Report]:
    """The result of a kernel for x = 1, 2, …, and the interpreter's report."""
    ptx = edit(compile_ptx(kernel, void(float32[::1], float32[::1]), cc=(7, 5)))
    device, arguments = Device(), []
    for values in (np.arange(1, threads + 1), np.zeros(threads)):
        address = device.alloc(4 * threads)
        device.write(address, values.astype(np.float32))
        arguments += array_argument(address, values.shape, np.float32)
    report = device.launch(ptx, 1, threads, arguments, watch=watch)
    return device.read(address, (threads,), np.float32), report


def code(kernel: Callable[..., None]) -> str:
    return f"```python\n{textwrap.dedent(inspect.getsource(kernel))}```"


def text(lines: list[str]) -> str:
    return "```text\n" + "\n".join(lines) + "\n```"


def show_tree() -> str:
    """Shared memory at each barrier, and the threads that wrote since the previous one."""
    lines, wrote = [], np.zeros(SMALL, bool)

    def watch(machine: Machine, pc: int, lanes: np.ndarray) -> None:
        instruction = machine.kernel.instructions[pc]
        if instruction.opcode == "st" and "shared" in instruction.modifiers:
            wrote[lanes] = True
        if instruction.opcode == "bar":
            tile = machine.shared.data.view(np.float32)[:SMALL]
            lines.append("".join("#" if w else "." for w in wrote) + "  " + " ".join(f"{n:3.0f}" for n in tile))
            wrote[:] = False

    result, _ = execute(tree, SMALL, watch)
    head = f"{'wrote':{SMALL}}  tile, at the barrier"
    return text([head, *lines, "", f"out[0] = {result[0]:.0f}"])


def show_race(k: int) -> str:
    """The interpreter's error when the k-th barrier is missing."""
    try:
        execute(tree, SMALL, edit=lambda ptx: without_barrier(ptx, k))
    except PTXError as error:
        message = re.sub(r"_cudapy_smem_\d+", "tile's", re.sub(r"kernel \S+,", "kernel tree,", str(error)))
        return text(message.split("\n"))
    raise AssertionError("a missing barrier was not found")


def show_warp() -> str:
    """The values of a warp's lanes before each of its five shuffles, and at the end."""
    lines = []

    def watch(machine: Machine, pc: int, lanes: np.ndarray) -> None:
        instruction = machine.kernel.instructions[pc]
        if instruction.opcode in ("shfl", "st"):
            values = source(instruction.operands[1], "f32")(machine, slice(0, 32))
            step = "sum"
            if instruction.opcode == "shfl":
                step = str(np.ravel(source(instruction.operands[2], "u32")(machine, slice(0, 1)))[0])
            lines.append(f"{step:>4}  " + " ".join(f"{n:4.0f}" for n in (*values[:12], *values[-2:])))

    execute(warp, 32, watch)
    head = "xor   " + " ".join(f"{i:>4}" for i in (*range(12), 30, 31))
    return text([head + "   lane", *lines])


def show_costs() -> str:
    """Costs of three ways to sum 256 numbers."""
    rows = [
        "| | barriers | shuffles | shared words moved | bank conflicts | instructions |",
        "| --- |" + " ---: |" * 5,
    ]
    for kernel in (neighbours, halves, shuffles):
        result, report = execute(kernel, LARGE)
        assert result[0] == LARGE * (LARGE + 1) / 2
        words = sum(t.nbytes // 4 for (space, _, _), t in report.traffic.items() if space == "shared")
        numbers = report.barriers, report.shuffles, words, report.bank_conflicts, report.steps
        rows.append(f"| `{kernel.__name__}` | " + " | ".join(map(str, numbers)) + " |")
    return "\n".join(rows)


def page() -> str:
    """The page, in Markdown."""
    count = len(barriers(compile_ptx(tree, void(float32[::1], float32[::1]), cc=(7, 5))))
    return f"""# How a block of threads sums numbers

A sum, a mean and the statistics of BatchNorm all need many threads to compute one number together. This page shows how
they do it. `python -m tests.cuda.ptx.lesson` prints it: each kernel below is compiled to PTX, the assembly language of
NVIDIA's GPUs, and executed by the interpreter of `tests/cuda/ptx`. No GPU is needed.

Threads run in *blocks* of up to 1024, and the threads of a block have *shared memory*. 32 adjacent threads are a
*warp*; the index of a thread in its warp is its *lane*.

## A tree

The first half of the threads adds the values of the second half to its own, then the first quarter adds those of the
second quarter, and so on: log₂ n steps instead of n.

{code(tree)}

Here are {SMALL} threads with x = 1, 2, … {SMALL}. Each row is a barrier, `cuda.syncthreads()`, where every
thread waits for all others; `#` marks a thread that has written since the previous barrier.

{show_tree()}

In each step the active threads read elements that no other thread writes in that step. Threads read values written
before the last barrier, and write values that are read after the next one.

## Without a barrier

The kernel has {count} barriers. Without the first, a thread may read another thread's value before or after it is
written: a *data race*. The sum is often right, and sometimes wrong. The interpreter does not rely on a wrong sum. It
records which threads accessed each word since the last barrier, and reports the race:

{show_race(0)}

The threads of a warp often run in lockstep, but the hardware has not guaranteed it since 2017. The other barriers are
needed too; without the second:

{show_race(1)}

The tests check every kernel of the project this way: they remove each barrier in turn, and the interpreter must detect
it.

## Within a warp: shuffles

The lanes of a warp can read each other's registers, without shared memory and without a barrier. In step "xor 16" lane
i reads lane i ^ 16, in the other half of the warp; in step "xor 8" it reads lane i ^ 8; and so on.

{code(warp)}

A row shows the values of the lanes before a step; they start as 1, 2, … 32. After the last step every lane has the sum.

{show_warp()}

## In a block

`shuffles` does this in each of 8 warps, writes 8 numbers to shared memory, and sums those the same way. `halves` is the
tree from above for 256 threads. `neighbours` is another tree: it adds the adjacent number first, then the one two
elements away, then four.

{code(neighbours)}

{code(shuffles)}

{show_costs()}

Shared memory has 32 *banks*; word i is in bank i mod 32, and a bank serves one word at a time. `halves` always reads
adjacent words, one from each bank. `neighbours` reads words that are 2, 4, 8, … apart: more and more of them are in the
same bank, which serves them one after the other. Each extra turn is a conflict in the table.

The kernels of the project work like `shuffles`: see `warp_reduce` and `block_reduce` in
[`cuda/warps.py`](tinygrad_bn_kernels/cuda/warps.py). All threads get the result. A block that uses its shared memory
again needs one more barrier, after the reads.

The interpreter counts operations; it does not measure time. That needs a GPU.
"""


if __name__ == "__main__":
    print(page(), end="")
