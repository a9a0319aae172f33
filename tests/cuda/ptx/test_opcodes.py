"""Every instruction of the interpreter, compared with values derived by hand from the PTX manual."""

import math
import re

import numpy as np
import pytest

from tests.cuda.ptx import arithmetic, opcodes
from tests.cuda.ptx.compile import assemble
from tests.cuda.ptx.interpreter import Device, PTXError, UnknownInstruction

inf, nan = math.inf, math.nan
ulp, half = 2.0**-23, 2.0**-24  # of float32 at 1
LOW, HIGH = -(2**31), 2**31 - 1
ALL = 2**32 - 1  # ones

# instruction: {operands: result}. Result and operands have the instruction's type unless TYPES has others. In
# instructions with explicit operands, d is the result and a, b, c are the operands.
VALUES = {
    "add.s32": {(HIGH, 1): LOW},
    "add.u16": {(65535, 2): 1},
    "add.s64": {(2**63 - 1, 1): -(2**63)},
    "add.f32": {(1, half): 1, (1, 3 * half): 1 + 2 * ulp, (inf, -inf): nan},
    "add.rz.f32": {(1, -half / 4): 1 - half, (1, half): 1, (-1, -ulp * 0.75): -1},
    "add.rp.f32": {(1, 2.0**-60): 1 + ulp, (-1, -(2.0**-60)): -1},
    "add.rm.f32": {(1, 2.0**-60): 1, (-1, -(2.0**-60)): -1 - ulp},
    "add.ftz.f32": {(1e-39, 1e-39): 0, (-1e-39, -1e-39): -0.0, (1, 1): 2},
    "add.sat.f32": {(0.75, 0.5): 1, (-1, 0.5): 0, (nan, 1): 0, (0.25, 0.5): 0.75},
    "add.f64": {(1, 2.0**-52): 1 + 2.0**-52},
    "add.f16": {(1, 2.0**-11): 1, (2048, 3): 2052},
    "sub.u32": {(1, 2): ALL},
    "sub.s64": {(1, 2): -1},
    "sub.f32": {(1, half / 2): 1, (inf, inf): nan},
    "sub.rz.f32": {(1, 2.0**-60): 1 - half},
    "mul.lo.s32": {(65537, 65537): 131073, (-3, 5): -15},
    "mul.lo.u64": {(2**32 + 1, 2**32 + 1): 2**33 + 1},
    "mul.hi.u32": {(ALL, ALL): ALL - 1},
    "mul.hi.s32": {(-2, 3): -1, (HIGH, 4): 1},
    "mul.hi.u64": {(2**64 - 1, 2**64 - 1): 2**64 - 2, (2**32, 2**32): 1},
    "mul.hi.s64": {(-1, 1): -1, (-(2**63), -(2**63)): 2**62, (-(2**63), 2): -1},
    "mul.wide.s32": {(-3, 5): -15, (LOW, LOW): 2**62},
    "mul.wide.u32": {(ALL, 2): 2**33 - 2},
    "mul.wide.s16": {(-300, 300): -90000},
    "mul.f32": {(3, 0.5): 1.5, (0, inf): nan, (1e30, 1e30): inf},
    "mul.rz.f32": {(1 + ulp, 1 + ulp): 1 + 2 * ulp, (1e30, 1e30): float(np.finfo("f4").max)},
    "mul.rp.f32": {(1 + ulp, 1 + ulp): 1 + 3 * ulp},
    "mul.ftz.f32": {(1e-30, 1e-10): 0, (2, 3): 6},
    "mad.lo.s32": {(3, 4, 5): 17},
    "mad.lo.s64": {(-3, 2**40, 5): 5 - 3 * 2**40},
    "mad.hi.u32": {(ALL, 2, 10): 11},
    "mad.wide.u32": {(65536, 65536, 1): 2**32 + 1},
    "fma.rn.f32": {
        (1 + 2.0**-12, 1 + 2.0**-12, -1 - 2.0**-11): 2.0**-24,
        ((1 + 2.0**-15) * 2.0**-12, (1 - 2.0**-15) * 2.0**-12, 1 + ulp): 1 + ulp,  # 1 + 2 ulp if rounded twice
    },
    "fma.rm.f32": {(1 + ulp, 1 + ulp, 0): 1 + 2 * ulp, (-1 - ulp, 1 + ulp, 0): -1 - 3 * ulp},
    "fma.rp.f32": {(1 + ulp, 1 + ulp, 0): 1 + 3 * ulp},
    "fma.rz.f32": {(-1 - ulp, 1 + ulp, 0): -1 - 2 * ulp},
    "fma.rn.ftz.f32": {(1e-30, 1e-10, 0): 0, (2, 3, 4): 10},
    "fma.rn.sat.f32": {(2, 3, 4): 1},
    "fma.rn.f64": {(1 + 2.0**-30, 1 + 2.0**-30, -1 - 2.0**-29): 2.0**-60},
    "fma.rn.f16": {(1.5, 2, 0.25): 3.25},
    "div.s32": {(-7, 2): -3, (7, -2): -3, (5, 0): -1, (6, 3): 2},
    "div.u32": {(ALL, 10): 429496729, (5, 0): ALL},
    "div.s64": {(-(2**40) - 1, 2): -(2**39)},
    "div.rn.f32": {(1, 3): 0.3333333432674408, (1, 0): inf, (-1, 0): -inf, (0, 0): nan},
    "div.full.f32": {(6, 3): 2},
    "div.approx.ftz.f32": {(6, 4): 1.5},
    "div.rn.f64": {(1, 3): 1 / 3},
    "rem.s32": {(-7, 2): -1, (7, -2): 1},
    "rem.u64": {(2**64 - 1, 10): 5},
    "min.s32": {(-1, 1): -1},
    "min.u32": {(ALL, 1): 1},
    "min.f32": {(nan, 1): 1, (1, nan): 1, (nan, nan): nan, (0.0, -0.0): -0.0, (2, 3): 2},
    "min.f32 d, b, a": {(0.0, -0.0): -0.0},
    "min.NaN.f32": {(nan, 1): nan, (2, 3): 2},
    "max.s64": {(-1, 1): 1},
    "max.u32": {(ALL, 1): ALL},
    "max.f32": {(nan, 1): 1, (0.0, -0.0): 0.0, (-inf, 3): 3},
    "max.f32 d, b, a": {(0.0, -0.0): 0.0},
    "max.NaN.f32": {(1, nan): nan},
    "max.f64": {(2, 3): 3},
    "neg.s32": {(5,): -5},
    "neg.f32": {(0.0,): -0.0, (inf,): -inf},
    "abs.s32": {(-5,): 5},
    "abs.f32": {(-0.0,): 0.0, (-2,): 2},
    "abs.ftz.f32": {(-1e-40,): 0.0},
    "copysign.f32": {(-1, 3): -3, (1, -3): 3},
    "rcp.rn.f32": {(3,): 0.3333333432674408},
    "rcp.approx.ftz.f32": {(4,): 0.25, (0.0,): inf, (inf,): 0, (1e-40,): inf},
    "rcp.approx.f32": {(-0.0,): -inf, (2,): 0.5},
    "rcp.approx.ftz.f64": {(4,): 0.25, (3,): 0.33333325386047363},  # only the upper half of the bits
    "sqrt.rn.f32": {(2,): 1.4142135381698608, (-1,): nan},
    "sqrt.approx.ftz.f32": {(9,): 3},
    "sqrt.rn.f64": {(2,): 1.4142135623730951},
    "rsqrt.approx.f32": {(4,): 0.5, (0.0,): inf, (-4,): nan},
    "ex2.approx.ftz.f32": {(3,): 8, (-inf,): 0, (0.5,): 1.4142135381698608},
    "lg2.approx.ftz.f32": {(8,): 3, (0,): -inf, (-1,): nan},
    "sin.approx.ftz.f32": {(1,): 0.8414709568023682},
    "cos.approx.ftz.f32": {(0,): 1, (1,): 0.5403022766113281},
    "tanh.approx.f32": {(0.5,): 0.46211716532707214},
    "and.b32": {(0b1100, 0b1010): 0b1000},
    "and.pred": {(True, False): False, (True, True): True},
    "or.b64": {(1 << 40, 1): 2**40 + 1},
    "or.pred": {(True, False): True, (False, False): False},
    "xor.b32": {(0b1100, 0b1010): 0b0110},
    "xor.pred": {(True, True): False},
    "not.b32": {(0,): ALL},
    "not.pred": {(False,): True},
    "shl.b32": {(3, 31): 2**31, (1, 32): 0},
    "shl.b64": {(1, 40): 2**40},
    "shr.u32": {(2**31, 31): 1, (2**31, 40): 0},
    "shr.s32": {(-8, 1): -4, (-8, 40): -1},
    "shf.l.wrap.b32": {(2**31, 1, 1): 3, (2**31, 1, 33): 3},
    "shf.r.wrap.b32": {(2, 1, 1): 2**31 + 1},
    "shf.l.clamp.b32": {(7, 1, 40): 7},
    "shf.r.clamp.b32": {(7, 1, 40): 1},
    "popc.b32": {(0xF0F0,): 8},
    "popc.b64": {(2**64 - 1,): 64},
    "clz.b32": {(1,): 31, (0,): 32, (2**31,): 0},
    "clz.b64": {(1,): 63, (2**40,): 23},
    "brev.b32": {(1,): 2**31, (0b1011,): 0b1101 << 28},
    "brev.b64": {(2,): 2**62},
    "bfind.u32": {(16,): 4, (0,): ALL},
    "bfind.s32": {(-17,): 4, (-1,): ALL, (17,): 4},
    "bfind.shiftamt.u32": {(1,): 31},
    "bfe.u32": {(0xABCD1234, 8, 8): 0x12, (0xABCD1234, 8, 0): 0, (0xF0000000, 28, 8): 0xF},
    "bfe.s32": {(0xF000, 12, 4): -1, (0x7000, 12, 4): 7, (LOW, 28, 8): -8},
    "bfe.u64": {(0xAB << 40, 40, 8): 0xAB},
    "bfi.b32": {(0xFF, 0, 8, 4): 0xF00, (0, ALL, 0, 32): 0},
    "bfi.b64": {(1, 0, 40, 8): 2**40},
    "prmt.b32": {(0x33221100, 0x77665544, 0x7531): 0x77553311, (0x80, 0, 8): 0x808080FF},
    "lop3.b32 d, a, b, c, 0x96": {(0b1100, 0b1010, 0b1111): 0b1001},  # the exclusive or of all three
    "lop3.b32 d, a, b, c, 0x80": {(0b1100, 0b1010, 0b1111): 0b1000},
    "selp.s32": {(1, 2, True): 1, (1, 2, False): 2},
    "setp.lt.s32": {(-1, 1): True, (1, 1): False},
    "setp.lo.u32": {(ALL, 1): False},
    "setp.ge.s64": {(1, 1): True},
    "setp.hi.u32": {(ALL, 1): True},
    "setp.hs.u32": {(1, 1): True},
    "setp.ls.u32": {(2, 1): False},
    "setp.gt.u64": {(2**63, 1): True},
    "setp.ne.b32": {(1, 2): True},
    "setp.eq.f32": {(0.0, -0.0): True, (nan, nan): False},
    "setp.ne.f32": {(nan, 1): False, (2, 1): True},
    "setp.neu.f32": {(nan, 1): True, (1, 1): False},
    "setp.equ.f32": {(nan, 1): True, (2, 1): False},
    "setp.lt.f32": {(nan, 1): False, (0, 1): True},
    "setp.ltu.f32": {(nan, 1): True, (2, 1): False},
    "setp.leu.f64": {(1, 1): True},
    "setp.gtu.f32": {(1, nan): True},
    "setp.ge.f32": {(1, nan): False},
    "setp.num.f32": {(1, nan): False, (1, 2): True},
    "setp.nan.f64": {(1, nan): True, (1, 2): False},
    "setp.lt.ftz.f32": {(0, 1e-40): False},
    "setp.lt.and.s32 d, a, b, c": {(1, 2, True): True, (1, 2, False): False},
    "setp.lt.xor.s32 d, a, b, c": {(1, 2, True): False},
    "setp.lt.or.s32 d, a, b, !c": {(2, 1, False): True, (2, 1, True): False},
    "cvt.rn.f32.s32": {(2**24 + 1,): 2**24, (2**24 + 3,): 2**24 + 4},
    "cvt.rz.f32.u32": {(2**24 + 3,): 2**24 + 2},
    "cvt.rp.f32.s32": {(2**24 + 1,): 2**24 + 2},
    "cvt.rn.f32.u64": {(2**64 - 1,): 2.0**64},
    "cvt.rn.f64.s64": {(-(2**53) - 1,): -(2.0**53)},
    "cvt.rzi.s32.f32": {(-2.7,): -2, (nan,): 0, (3e9,): HIGH, (-3e9,): LOW},
    "cvt.rni.s32.f32": {(2.5,): 2, (3.5,): 4},
    "cvt.rmi.s32.f32": {(-2.5,): -3},
    "cvt.rpi.u32.f32": {(2.1,): 3, (-5,): 0},
    "cvt.rzi.u8.f32": {(300,): 255, (200.5,): 200},
    "cvt.rzi.s64.f64": {(nan,): -(2**63), (1e30,): 2**63 - 1},
    "cvt.rzi.ftz.u32.f32": {(3.9,): 3},
    "cvt.rni.f32.f32": {(2.5,): 2, (-0.4,): -0.0},
    "cvt.rmi.f64.f64": {(-1.5,): -2},
    "cvt.sat.f32.f32": {(1.5,): 1, (nan,): 0, (-1,): 0, (0.25,): 0.25},
    "cvt.f64.f32": {(0.5,): 0.5},
    "cvt.ftz.f64.f32": {(1e-40,): 0},
    "cvt.rn.f32.f64": {(1 + 2.0**-25,): 1, (1 + 2.0**-23,): 1 + ulp},
    "cvt.rz.f32.f64": {(0.1,): 0.09999999403953552},
    "cvt.rn.f16.f32": {(65520,): inf, (1 + 2.0**-12,): 1},
    "cvt.f32.f16": {(1.5,): 1.5, (-inf,): -inf},
    "cvt.rn.f16.s32": {(2049,): 2048},
    "cvt.u16.u32": {(0x12345,): 0x2345},
    "cvt.s64.s32": {(-1,): -1},
    "cvt.u64.u32": {(ALL,): ALL},
    "cvt.s32.s8": {(-128,): -128},
    "cvt.u32.u8": {(200,): 200},
    "cvt.sat.s8.s32": {(300,): 127, (-300,): -128},
    "cvt.sat.u16.s32": {(-5,): 0},
    "mov.b32 d, a": {(7,): 7},
    "mov.b64 d, {a, b}": {(1, 2): 2**33 + 1},
    "mov.b32 d, {a, b}": {(1, 2): 2**17 + 1},
    "mov.u32 d, WARP_SZ": {(): 32},
    "mov.u32 d, %ntid.x": {(): 32},
    ".reg .b32 x; mov.b64 {d, x}, a": {(2**33 + 1,): 1},
    ".reg .b32 x; mov.b64 {x, d}, a": {(2**33 + 1,): 2},
    ".reg .b32 x; add.cc.u32 x, a, b; addc.u32 d, c, 0": {(ALL, 1, 5): 6, (1, 1, 5): 5},
    ".reg .b32 x; sub.cc.u32 x, a, b; subc.u32 d, c, 0": {(0, 1, 5): 4, (1, 1, 5): 5},
    ".reg .b32 x; mad.lo.cc.u32 x, a, b, c; madc.hi.u32 d, a, b, 0": {(ALL, ALL, ALL): ALL, (2, 3, 4): 0},
    ".reg .b32 x; mad.lo.cc.u32 x, a, b, c; madc.lo.u32 d, a, b, 0": {(ALL, 1, 1): 0, (2, 3, 4): 6},
    "activemask.b32 d": {(): ALL},
    "nanosleep.u32 20; membar.gl; fence.acq_rel.gpu; mov.u32 d, 1": {(): 1},
}
TYPES = {  # result, operands
    "mul.wide.s32": ("s64", "s32 s32"),
    "mul.wide.u32": ("u64", "u32 u32"),
    "mul.wide.s16": ("s32", "s16 s16"),
    "mad.wide.u32": ("u64", "u32 u32 u64"),
    "popc.b64": ("u32", "b64"),
    "clz.b64": ("u32", "b64"),
    "bfind.s32": ("u32", "s32"),
    "shl.b64": ("b64", "b64 u32"),
    "shr.s32": ("s32", "s32 u32"),
    "bfe.s32": ("s32", "s32 u32 u32"),
    "bfe.u64": ("u64", "u64 u32 u32"),
    "bfi.b64": ("b64", "b64 b64 u32 u32"),
    "selp.s32": ("s32", "s32 s32 pred"),
    "setp.lt.and.s32 d, a, b, c": ("pred", "s32 s32 pred"),
    "setp.lt.xor.s32 d, a, b, c": ("pred", "s32 s32 pred"),
    "setp.lt.or.s32 d, a, b, !c": ("pred", "s32 s32 pred"),
    "mov.b64 d, {a, b}": ("b64", "b32 b32"),
    "mov.b32 d, {a, b}": ("b32", "b16 b16"),
    ".reg .b32 x; mov.b64 {d, x}, a": ("b32", "b64"),
    ".reg .b32 x; mov.b64 {x, d}, a": ("b32", "b64"),
}
HEADER = ".version 9.0\n.target sm_90\n.address_size 64\n"


def types_of(code: str, count: int) -> tuple[str, list[str]]:
    """The types of result and operands of a row."""
    if code in TYPES:
        result, operands = TYPES[code]
        return result, operands.split()
    name = re.split(r"[ ;]", code.split("; ")[-1])[0]
    *_, before, kind = ["", *name.split(".")]
    kind = kind if kind in arithmetic.DTYPES else "u32"
    if name.startswith("cvt"):
        return before, [kind]
    return ("pred" if name.startswith("setp") else kind), [kind] * count


def snippet(code: str, operands: tuple, name: str = "snippet") -> str:
    """An entry that computes d from constants and stores it for each thread of a block."""
    result, kinds = types_of(code, len(operands))
    lines = [".reg .b64 out, place; .reg .b32 thread; ld.param.u64 out, [to]; mov.u32 thread, %tid.x;"]
    for letter, kind in zip("dabce", [result, *kinds], strict=False):
        lines.append(f".reg .{'pred' if kind == 'pred' else f'b{max(16, arithmetic.bits(kind))}'} {letter};")
    for letter, kind, value in zip("abce", kinds, operands, strict=False):
        if kind == "pred":
            lines.append(f"setp.ne.u32 {letter}, {int(value)}, 0;")
        else:
            raw = int(np.array(value, arithmetic.DTYPES[kind]).view(arithmetic.unsigned(kind)))
            lines.append(f"mov.b{max(16, arithmetic.bits(kind))} {letter}, {raw};")
    lines.append(code if " " in code else f"{code} d, {', '.join('abce'[: len(operands)])}")
    size = 4 if result == "pred" else max(2, arithmetic.bits(result) // 8)
    lines.append(f"; mad.wide.u32 place, thread, {size}, out;")
    if result == "pred":
        lines.append(".reg .b32 truth; selp.u32 truth, 1, 0, d; st.global.u32 [place], truth; ret;")
    else:
        lines.append(f"st.global.b{8 * size} [place], d; ret;")
    return f".visible .entry {name}(.param .u64 to)\n{{\n" + "\n".join(lines) + "\n}\n"


def run(ptx: str, dtype: str, *args: object, threads: int = 32, size: int | None = None) -> np.ndarray:
    """The first argument after a launch: an array with an element for each thread, initially zeros."""
    device = Device()
    zeros = np.zeros(size or threads, dtype)
    out = device.alloc(zeros.nbytes)
    device.write(out, zeros)
    device.launch(HEADER + ptx, 1, threads, [out, *args])
    return device.read(out, zeros.shape, dtype)


@pytest.mark.parametrize("code", VALUES)
def test_an_arithmetic_instruction(code):
    for operands, expected in VALUES[code].items():
        result, _ = types_of(code, len(operands))
        stored = "u4" if result == "pred" else arithmetic.DTYPES[result]
        small = result != "pred" and arithmetic.bits(result) == 8  # in a 16-bit register
        found = run(snippet(code, operands), f"{stored.kind}2" if small else stored)
        np.testing.assert_array_equal(found, np.full(32, expected, found.dtype), str(operands))
        if found.dtype.kind == "f" and expected == 0:
            assert np.signbit(found[0]) == np.signbit(expected)


# Instructions that touch memory, other lanes or the program counter

PROLOGUE = """.visible .entry k({parameters})
{{
.shared .align 16 .b8 tile[512]; .local .align 16 .b8 own[32];
.reg .b64 out, place, x, y, z; .reg .b32 thread, lane, r, s, t; .reg .f32 f, g; .reg .pred p, q; .reg .f64 v;
.reg .b16 h;
ld.param.u64 out, [to]; mov.u32 thread, %tid.x; mov.u32 lane, %laneid; mad.wide.u32 place, thread, 4, out;
"""
LANE = np.arange(32, dtype=np.uint32)
EPILOGUE = "\nst.global.u32 [place], r; ret;\n}\n"
EVEN = 0x55555555

PROGRAMS = {  # each sets r, which is compared with the expected value of every lane
    "st.shared, ld.shared": (
        "mov.u64 x, tile; mad.wide.u32 y, thread, 4, x; st.shared.u32 [y], thread; bar.sync 0;"
        "xor.b32 s, thread, 1; mad.wide.u32 y, s, 4, x; ld.shared.u32 r, [y];",
        LANE ^ 1,
    ),
    "ld.shared.v4": (
        "mov.u64 x, tile; mad.wide.u32 y, thread, 16, x; st.shared.v4.b32 [y], {thread, lane, 5, 6};"
        "ld.shared.v2.b32 {s, t}, [y+8]; mad.lo.u32 r, s, t, thread;",
        LANE + 30,
    ),
    "st.local, ld.local.v2": (
        "st.local.v2.u32 [own+8], {thread, lane}; ld.local.u32 s, [own+8]; ld.local.u32 t, [own+12]; add.u32 r, s, t;",
        2 * LANE,
    ),
    "ld.global of bytes and shorts": (
        "st.global.u32 [place], thread; ld.global.u8 h, [place]; cvt.u32.u16 s, h; st.global.u16 [place+2], h;"
        "ld.global.u16 h, [place+2]; cvt.u32.u16 t, h; st.global.u32 [place], 0; add.u32 r, s, t;",
        2 * LANE,
    ),
    "ld.global.s8 spreads the sign": (
        "st.global.u32 [place], 0x80; ld.global.s8 r, [place];",
        np.full(32, 0xFFFFFF80, "u4"),
    ),
    "ld.global.nc, ld.volatile": (
        "st.volatile.global.u32 [place], lane; ld.volatile.global.u32 s, [place]; ld.global.u32 t, [place];"
        "add.u32 r, s, t;",
        2 * LANE,
    ),
    "cvta and generic accesses": (
        "mov.u64 x, tile; cvta.shared.u64 y, x; mad.wide.u32 z, thread, 4, y; st.u32 [z], thread;"
        "cvta.to.shared.u64 z, z; ld.shared.u32 s, [z]; cvta.global.u64 z, place; st.u32 [z], 3; ld.u32 t, [z];"
        "mov.u64 x, own; cvta.local.u64 x, x; st.u32 [x], 4; ld.u32 r, [x]; add.u32 r, r, t; add.u32 r, r, s;",
        LANE + 7,
    ),
    "ldu.global": ("st.global.u32 [place], lane; ldu.global.u32 r, [place];", LANE),
    "bra and a loop": (
        "mov.u32 r, 0; mov.u32 s, 0;\nagain: add.u32 r, r, s; add.u32 s, s, 1; setp.le.u32 p, s, lane; @p bra again;",
        LANE * (LANE + 1) // 2,
    ),
    "a guard, and its negation": (
        "and.b32 s, lane, 1; setp.eq.u32 p, s, 1; @p mov.u32 r, 1; @!p mov.u32 r, 2;",
        2 - LANE % 2,
    ),
    "exit": ("mov.u32 r, 1; setp.gt.u32 p, lane, 3; @p exit; mov.u32 r, 1;", np.where(LANE > 3, 0, 1)),
    "ret": ("mov.u32 r, 1; setp.gt.u32 p, lane, 3; @p ret;", np.where(LANE > 3, 0, 1)),
    "bar.red": (
        "setp.lt.u32 p, lane, 5; bar.red.popc.u32 r, 0, p; bar.red.and.pred q, 0, p; selp.u32 s, 100, 0, q;"
        "add.u32 r, r, s; bar.red.or.pred q, 0, p; selp.u32 s, 1000, 0, q; add.u32 r, r, s;",
        np.full(32, 1005),
    ),
    "barrier.sync, bar.warp.sync": ("barrier.sync 0; bar.warp.sync 0xffffffff; mov.u32 r, lane;", LANE),
    "shfl.sync.down": ("shfl.sync.down.b32 r, lane, 3, 31, -1;", np.where(LANE + 3 < 32, LANE + 3, LANE)),
    "shfl.sync.up": ("shfl.sync.up.b32 r, lane, 3, 0, -1;", np.where(LANE >= 3, LANE - 3, LANE)),
    "shfl.sync.bfly": ("shfl.sync.bfly.b32 r, lane, 5, 31, -1;", LANE ^ 5),
    "shfl.sync.idx": ("shfl.sync.idx.b32 r, lane, 7, 31, -1;", np.full(32, 7)),
    "shfl.sync of segments of eight": (
        "shfl.sync.down.b32 r|p, lane, 3, 0x181f, -1; @!p mov.u32 r, 99;",
        np.where(LANE % 8 + 3 < 8, LANE + 3, 99),
    ),
    "shfl.sync.idx of segments of eight": ("shfl.sync.idx.b32 r, lane, 2, 0x181f, -1;", LANE // 8 * 8 + 2),
    "shfl.sync of half a warp": (
        "mov.u32 r, 99; setp.lt.u32 p, lane, 16; @p shfl.sync.bfly.b32 r, lane, 1, 31, 0xffff;",
        np.where(LANE < 16, LANE ^ 1, 99),
    ),
    "shfl.sync waits for lanes that come later": (
        "setp.lt.u32 p, lane, 16; @p bra low; bra high;\nlow: mov.u32 s, 1; bra meet;\n"
        "meet: shfl.sync.bfly.b32 r, s, 16, 31, -1; bra end;\nhigh: mov.u32 s, 2; bra meet;\nend:",
        np.where(LANE < 16, 2, 1),
    ),
    "vote.sync.ballot": ("setp.lt.u32 p, lane, 4; vote.sync.ballot.b32 r, p, -1;", np.full(32, 15)),
    "vote.sync.any, all and uni": (
        "setp.lt.u32 p, lane, 4; vote.sync.any.pred q, p, -1; selp.u32 r, 1, 0, q; vote.sync.all.pred q, p, -1;"
        "selp.u32 s, 2, 0, q; add.u32 r, r, s; vote.sync.uni.pred q, p, -1; selp.u32 s, 4, 0, q; add.u32 r, r, s;",
        np.full(32, 1),
    ),
    "match.any.sync": ("and.b32 s, lane, 1; match.any.sync.b32 r, s, -1;", np.where(LANE % 2, EVEN << 1, EVEN)),
    "redux.sync": (
        "redux.sync.add.u32 r, lane, -1; redux.sync.max.u32 s, lane, -1; redux.sync.min.s32 t, lane, -1;"
        "add.u32 r, r, s; add.u32 r, r, t; redux.sync.or.b32 s, lane, -1; add.u32 r, r, s;",
        np.full(32, 496 + 31 + 0 + 31),
    ),
    "activemask of a branch": ("mov.u32 r, 0; setp.lt.u32 p, lane, 4; @p activemask.b32 r;", np.where(LANE < 4, 15, 0)),
    "%lanemask": ("mov.u32 s, %lanemask_lt; mov.u32 t, %lanemask_eq; or.b32 r, s, t;", (np.uint64(2) << LANE) - 1),
    "prefetch": ("prefetch.global.L1 [place]; mov.u32 r, 1;", np.full(32, 1)),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program(name):
    code, expected = PROGRAMS[name]
    ptx = PROLOGUE.format(parameters=".param .u64 to") + code + EPILOGUE
    np.testing.assert_array_equal(run(ptx, "u4"), expected)


ATOMIC = {  # values before and after every lane applied its number, or the bound 10 for inc and dec
    "add.u32": (5, 5 + 496),
    "add.f32": (0.5, 496.5),
    "add.f64": (0.5, 496.5),
    "min.s32": (7, 0),
    "max.u32": (7, 31),
    "and.b32": (0xFF, 0),
    "or.b32": (0, 31),
    "xor.b32": (1, 1),
    "exch.b32": (77, 31),
    "inc.u32": (0, 10),  # 32 steps in a circle of 11: 0, 1, … 10, 0, …
    "dec.u32": (40, 1),  # above the bound, so the first step gives 10: 10, 9, … 0, 10, …
}


@pytest.mark.parametrize("opcode", ["atom.global", "atom.shared", "red.global", "red.shared"])
@pytest.mark.parametrize("name", ATOMIC)
def test_an_atomic_operation(opcode, name):
    operation, kind = name.split(".")
    if operation == "exch":  # red has no exch, as it returns no result
        opcode = opcode.replace("red.", "atom.")
    dtype, size = arithmetic.DTYPES[kind], arithmetic.bits(kind)
    start, end = (int(np.array(n, dtype).view(arithmetic.unsigned(kind))) for n in ATOMIC[name])
    space, register = opcode.split(".")[1], {"f32": "f", "f64": "v"}.get(kind, "s")
    convert = f"cvt.rn.{kind}.u32 {register}, lane;" if kind[0] == "f" else "mov.u32 s, lane;"
    old = {"f32": "g, ", "f64": "v, "}.get(kind, "r, ") if opcode.startswith("atom") else ""
    number = "10" if operation in ("inc", "dec") else register
    whole, part = ("y", "z") if size == 64 else ("t", "r")
    code = (
        f"mov.u64 x, {'tile' if space == 'shared' else 'out'}; setp.eq.u32 p, lane, 0; mov.b{size} {whole}, {start};"
        f"@p st.{space}.b{size} [x], {whole}; bar.sync 0; {convert} {opcode}.{name} {old}[x], {number}; bar.sync 0;"
        f"ld.{space}.b{size} {part}, [x]; bar.sync 0; @p st.global.b{size} [out], {part}; ret;\n}}\n"
    )
    found = run(PROLOGUE.format(parameters=".param .u64 to") + code, "u8", size=16)[0]
    assert found == end


def test_compare_and_swap_lets_one_lane_win():
    code = "mov.u64 x, out; setp.eq.u32 p, lane, 0; @p st.global.u32 [x], 9; bar.sync 0;"
    code += "atom.global.cas.b32 r, [x], 9, lane; bar.sync 0; mov.u64 y, 128; add.u64 place, place, y;"
    found = run(PROLOGUE.format(parameters=".param .u64 to") + code + EPILOGUE, "u4", size=64)
    assert found[0] == 0  # lane 0 came first
    assert list(found[32:]) == [9] + [0] * 31


def test_a_called_function_is_executed():
    function = """.func (.param .b32 result) twice(.param .b32 number)
{ .reg .b32 n; ld.param.b32 n, [number]; add.u32 n, n, n; st.param.b32 [result+0], n; ret; }
"""
    code = "{ .param .b32 given; st.param.b32 [given], lane; .param .b32 got; call.uni (got), twice, (given);"
    code += "ld.param.b32 r, [got]; }"
    ptx = function + PROLOGUE.format(parameters=".param .u64 to") + code + EPILOGUE
    np.testing.assert_array_equal(run(ptx, "u4"), 2 * LANE)


def test_parameters_constants_and_the_grid():
    ptx = ".const .align 4 .u32 table[3] = {10, 20, 30};\n" + PROLOGUE.format(
        parameters=".param .u64 to, .param .f32 scale, .param .u32 number"
    )
    ptx += "ld.const.u32 r, [table+4]; ld.param.u32 s, [number]; add.u32 r, r, s; ld.param.f32 f, [scale];"
    ptx += "cvt.rzi.u32.f32 s, f; add.u32 r, r, s; mov.u32 s, %ctaid.y; mov.u32 t, %nctaid.y; mad.lo.u32 r, s, 100, r;"
    ptx += "mov.u32 s, %tid.y; mad.lo.u32 r, s, 1000, r; mad.lo.u32 s, s, 4, %tid.x; mov.u32 t, %ctaid.y;"
    ptx += "mad.lo.u32 s, t, 8, s; mad.wide.u32 place, s, 4, out;" + EPILOGUE
    device = Device()
    out = device.alloc(16 * 4)
    device.launch(HEADER + ptx, (1, 2), (4, 2), [out, np.float32(3.5), 2**32 - 1])
    row = np.array([22] * 4 + [1022] * 4)  # 20 + 3 − 1
    np.testing.assert_array_equal(device.read(out, (16,), "u4"), [*row, *(row + 100)])


def test_every_opcode_is_tested():
    known = {*arithmetic.OPERATIONS, *opcodes.SPECIFIC, *opcodes.CONTROL, *opcodes.NO_EFFECT}
    code = " ".join([*VALUES, *(p for p, _ in PROGRAMS.values()), *(f"atom.{a} red.{a}" for a in ATOMIC)])
    words = set(re.findall(r"\b([a-z][a-z0-9]*)(?=[.; ])", code))
    assert known - words == {"trap", "discard", "applypriority"}


def test_the_snippets_are_ptx():
    codes = [snippet(code, operands) for code, rows in VALUES.items() for operands in rows]
    codes += [PROLOGUE.format(parameters=".param .u64 to") + code + EPILOGUE for code, _ in PROGRAMS.values()]
    assert len(assemble({str(k): HEADER + code for k, code in enumerate(codes)}, (9, 0))) == len(codes)


@pytest.mark.parametrize(
    "code",
    ["dp4a.u32.u32 r, s, t, r;", "add.sat.s32 r, s, t;", "mov.u32 r, %clock;", "bar.arrive 0, 64;", "bar.sync 0, 64;"],
)
def test_an_unsupported_instruction_is_named_with_its_line(code):
    with pytest.raises(UnknownInstruction, match=r"kernel k, line 10: .*" + re.escape(code[:-1].split(".")[0])):
        run(PROLOGUE.format(parameters=".param .u64 to") + code + EPILOGUE, "u4")


def test_a_trap_and_an_endless_loop_are_errors(monkeypatch):
    with pytest.raises(PTXError, match=r"line 10: trap\n.*the kernel executed a trap"):
        run(PROLOGUE.format(parameters=".param .u64 to") + "trap;" + EPILOGUE, "u4")
    monkeypatch.setattr("tests.cuda.ptx.machine.STEPS", 100)
    with pytest.raises(PTXError, match="has not ended"):
        run(PROLOGUE.format(parameters=".param .u64 to") + "again: bra again;" + EPILOGUE, "u4")
