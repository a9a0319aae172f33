"""Properties of the PTX and machine code of every CUDA program, for four GPU architectures; no GPU is needed."""

import re
from typing import Any

import pytest

from tests.cuda.ptx.compile import ARCHITECTURES, Assembly, assemble, compile_ptx, require_compiler
from tests.cuda.ptx.parse import parse
from tests.cuda.ptx.programs import programs, ptx_for

CEILING = 64  # the highest register limit that a program may declare
PARTS = 4  # programs are tested in parts, for parallel test processes
TARGETS = [(cc, "f4") for cc in ARCHITECTURES] + [((8, 0), "f8"), ((9, 0), "f8")]
POWERS = re.compile(r"r?pow\.")  # in float64 these call a function of libdevice


def inner_loops(ptx: str) -> list[list[str]]:
    """The opcodes, with modifiers, of each innermost loop of a kernel's PTX."""
    (kernel,) = parse(ptx).values()
    jumps = [
        (kernel.labels[i.operands[0]], pc)
        for pc, i in enumerate(kernel.instructions)
        if i.opcode == "bra" and kernel.labels[i.operands[0]] <= pc
    ]
    inner = [(a, b) for a, b in jumps if not any((c, d) != (a, b) and a <= c and d <= b for c, d in jumps)]
    return [[".".join((i.opcode, *i.modifiers)) for i in kernel.instructions[a : b + 1]] for a, b in inner]


def wrong_in_machine_code(program: Any, code: Assembly, kind: str) -> list[str]:
    """Deviations from the declared registers, spills, stack, shared memory, vector accesses and float64.

    Declarations are for float32. In float64 1.5 times the registers are allowed, and up to twice the shared memory, as
    some of it holds indices.
    """
    wide = bool(code.count("LDG.E.128")), bool(code.count("STG.E.128"))
    all_wide = program.vector, program.vector and not program.shared  # reductions store few numbers
    most, shared = (
        (program.registers, {program.shared})
        if kind == "f4"
        else (program.registers * 3 // 2, range(program.shared, 2 * program.shared + 1))
    )
    found = {
        f"{code.registers} registers, more than {most}": code.registers > most,
        f"declares {program.registers} registers, more than {CEILING}": program.registers > CEILING,
        f"{code.spills} bytes of spilled registers": code.spills,
        f"{code.stack} bytes of stack": code.stack,
        f"{code.shared} bytes of shared memory, of {program.shared} in float32": code.shared not in shared,
        f"{code.float64} instructions of float64": code.float64 and kind == "f4",
        f"128 bits are loaded, stored: {wide}": wide != all_wide,
    }
    return [what for what, is_wrong in found.items() if is_wrong]


def wrong_in_ptx(program: Any, ptx: str, kind: str) -> list[str]:
    """Float64 in a float32 program, calls, integer divisions in inner loops, and wrong numbers of shuffles."""
    body = re.sub(r"(?m)^\s*\.(reg|param).*$", "", ptx)
    shuffles = body.count("shfl.sync")
    divisions = [op for loop in inner_loops(ptx) for op in loop if re.fullmatch(r"(div|rem)\.[us]\d+", op)]
    found = {
        "float64": kind == "f4" and re.search(r"\.f64\b", body),
        "a call": re.search(r"\bcall\b", body) and not (kind == "f8" and POWERS.match(program.name)),
        f"{divisions} in an inner loop": divisions,
        f"{shuffles} shuffles, not {program.shuffles} or, in an unrolled loop, a multiple": (
            shuffles % program.shuffles if program.shuffles else shuffles
        ),
    }
    return [what for what, is_wrong in found.items() if is_wrong]


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize(("cc", "kind"), TARGETS, ids=[f"sm_{a}{b}-{kind}" for (a, b), kind in TARGETS])
def test_every_program_is_compiled_to_what_it_declares(cc, kind, part):
    require_compiler()
    some = {name: programs()[name] for name in sorted(programs())[part::PARTS]}  # sorted: as in other processes
    modules = {name: ptx_for(program, cc, kind) for name, program in some.items()}
    codes = assemble(modules, cc)
    wrong = {n: wrong_in_ptx(p, modules[n], kind) + wrong_in_machine_code(p, codes[n], kind) for n, p in some.items()}
    assert not {name: what for name, what in wrong.items() if what}


def test_sm_80_and_90_get_the_ptx_of_sm_75():
    """So two compilations serve four architectures."""
    require_compiler()
    from numba import float32, uint32, void

    def add(a, b, out, n):
        for i in range(n):
            out[i] = a[i] + b[i] * float32(0.5)

    arrays = [float32[::1]] * 3
    texts = [compile_ptx(add, void(*arrays, uint32), cc=cc) for cc in ARCHITECTURES[:3]]
    assert len({re.sub(r"\.target sm_\d+|_ZN\w+", "", text) for text in texts}) == 1


def test_the_checks_detect_a_bad_kernel():
    """They detect a local array, float64, a division in a loop and scalar loads."""
    require_compiler()
    from numba import cuda, float32, int64, void

    def bad(x, n):
        held = cuda.local.array(64, float32)
        for i in range(64):
            held[i] = x[i]
        total = 0.0
        for i in range(n):
            total += held[(i // n) & 63] * 0.5
        x[0] = total

    ptx = compile_ptx(bad, void(float32[::1], int64), cc=(9, 0))
    code = assemble({"bad": ptx}, (9, 0))["bad"]
    assert code.stack >= 256
    assert code.float64 > 0
    assert code.count("LDG") > code.count("LDG.E.128") == 0
    assert any(op == "div.s64" for loop in inner_loops(ptx) for op in loop)
