"""Arithmetic instructions of PTX as functions of NumPy arrays.

`operation(instruction)` returns the function, the types of its operands and the type of its result. Results are
correctly rounded. On hardware `.approx` instructions may be off by a few units in the last place, so tests of programs
that use them need that tolerance. NaNs keep NumPy's payload.
"""

from collections.abc import Callable

import numpy as np
from numba import vectorize
from numba.extending import intrinsic

from tests.cuda.ptx.parse import Instruction, UnknownInstruction

DTYPES = {f"{k}{n}": np.dtype(f"{d}{n // 8}") for k, d in (("b", "u"), ("u", "u"), ("s", "i")) for n in (8, 16, 32, 64)}
DTYPES |= {f"f{n}": np.dtype(f"f{n // 8}") for n in (16, 32, 64)} | {"pred": np.dtype(bool)}
WIDER = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}
ROUNDINGS = {"rn", "rz", "rm", "rp"}
TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater}
COMPARE |= {"ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}

Function = Callable[..., np.ndarray]
Operation = tuple[Function, list[str], str]


@intrinsic
def _llvm_fma(_, a, b, c):  # NumPy has no fused multiply-add
    return a(a, b, c), lambda _context, builder, _signature, arguments: builder.fma(*arguments)


@vectorize(["f4(f4, f4, f4)", "f8(f8, f8, f8)"])
def fma(a, b, c):
    return _llvm_fma(a, b, c)


def bits(kind: str) -> int:
    return 1 if kind == "pred" else 8 * DTYPES[kind].itemsize


def unsigned(kind: str) -> np.dtype:
    """The dtype of a register's bits."""
    return DTYPES[kind] if kind == "pred" else np.dtype(f"u{DTYPES[kind].itemsize}")


def operation(instruction: Instruction) -> Operation:
    """Function, operand types and result type of an arithmetic instruction."""
    return OPERATIONS[instruction.opcode](instruction, instruction.type, set(instruction.modifiers[:-1]))


def _check_modifiers(instruction: Instruction, modifiers: set[str], known: set[str]) -> None:
    if modifiers - known:
        raise UnknownInstruction(f"modifiers {sorted(modifiers - known)} of {instruction.opcode}")


# Rounding


def two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a + b, and its rounding error (Knuth)."""
    high = a + b
    virtual = high - a
    return high, (a - (high - virtual)) + (b - virtual)


def round_to_float32(high: np.ndarray, low: np.ndarray, mode: str) -> np.ndarray:
    """high + low, with tiny low, rounded to float32 in a directed mode: rm down, rp up, rz towards zero."""
    nearest = high.astype(np.float32)
    above = (nearest.astype(np.float64) - high) - low
    down = (above > 0) & ((mode == "rm") | ((mode == "rz") & (high > 0)))
    up = (above < 0) & ((mode == "rp") | ((mode == "rz") & (high < 0)))
    nearest = np.where(down, np.nextafter(nearest, np.float32(-np.inf)), nearest)
    return np.where(up, np.nextafter(nearest, np.float32(np.inf)), nearest)


def flush(x: np.ndarray) -> np.ndarray:
    """Replace subnormal float32 numbers by zeros of the same sign."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def saturate(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, np.minimum(x, x.dtype.type(1)), x.dtype.type(0))  # NaN and −0 become +0


def _with_modifiers(function: Function, kind: str, modifiers: set[str]) -> Function:
    """The function with the modifiers `.ftz` and `.sat` applied."""
    if "ftz" in modifiers and kind == "f32":
        inner = function
        function = lambda *operands: flush(inner(*map(flush, operands)))  # noqa: E731
    if "sat" in modifiers:
        unsaturated = function
        function = lambda *operands: saturate(unsaturated(*operands))  # noqa: E731
    return function


def _exactly(opcode: str, mode: str) -> Function:
    """add, sub, mul or fma of float32 in a directed rounding mode, by sums of two float64."""

    def compute(*operands: np.ndarray) -> np.ndarray:
        a, b, *c = (np.asarray(x, np.float64) for x in operands)
        if opcode == "mul":
            return round_to_float32(a * b, np.float64(0), mode)
        terms = (a * b, c[0]) if opcode == "fma" else (a, -b if opcode == "sub" else b)
        return round_to_float32(*two_sum(*terms), mode)

    return compute


# Integers


def _signed(kind: str) -> bool:
    return kind[0] == "s"


def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Integer division towards zero; division by zero gives all ones, as on hardware."""
    quotient = np.where(b == 0, a, a - np.fmod(a, b)) // np.where(b == 0, a.dtype.type(1), b)
    return np.where(b == 0, ~a.dtype.type(0), quotient).astype(a.dtype)


def remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(b == 0, a, np.fmod(a, b)).astype(a.dtype)


def multiply_high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of a product of integers."""
    kind = a.dtype
    if kind.itemsize < 8:
        wide = np.dtype(f"{kind.kind}{2 * kind.itemsize}")
        return ((a.astype(wide) * b.astype(wide)) >> (8 * kind.itemsize)).astype(kind)
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    x, y = a.view(np.uint64), b.view(np.uint64)
    x0, x1, y0, y1 = x & low, x >> shift, y & low, y >> shift
    middle = x1 * y0 + (x0 * y0 >> shift)
    high = x1 * y1 + (middle >> shift) + ((x0 * y1 + (middle & low)) >> shift)
    if kind.kind == "i":
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return high.view(kind)


def _shift(left: bool) -> Function:
    def compute(a: np.ndarray, amount: np.ndarray) -> np.ndarray:
        width = 8 * a.dtype.itemsize
        limited = np.minimum(amount, width - 1).astype(a.dtype)
        if not left and a.dtype.kind == "i":
            return a >> limited
        shifted = a << limited if left else a >> limited
        return np.where(amount >= width, a.dtype.type(0), shifted)

    return compute


def bit_length(x: np.ndarray) -> np.ndarray:
    """Number of the highest set bit, counted from 1; 0 for 0."""
    high, low = np.asarray(x, np.uint64) >> np.uint64(32), np.asarray(x, np.uint64) & np.uint64(0xFFFFFFFF)
    length = lambda half: np.frexp(half.astype(np.float64))[1]  # noqa: E731
    return np.where(high > 0, 32 + length(high), length(low)).astype(np.uint32)


def reverse_bits(x: np.ndarray) -> np.ndarray:
    x = np.atleast_1d(x)
    planes = np.unpackbits(x.view(np.uint8).reshape(x.size, -1), axis=1, bitorder="little")
    return np.packbits(planes[:, ::-1], axis=1, bitorder="little").copy().view(x.dtype).ravel()


def _low_mask(length: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A mask of the `length` lowest bits."""
    one, width = dtype.type(1), 8 * dtype.itemsize
    return np.where(length >= width, ~dtype.type(0), (one << np.minimum(length, width - 1).astype(dtype)) - one)


def extract_bits(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """bfe: the field of `length` bits at `position`, sign-extended if the type is signed."""
    position, length = position & 0xFF, length & 0xFF
    raw = np.dtype(f"u{a.dtype.itemsize}")
    width = 8 * raw.itemsize
    mask = _low_mask(length, raw)
    field = _shift(False)(a.view(raw), position) & mask
    if a.dtype.kind == "i":
        sign_at = np.minimum(position + length - 1, width - 1).astype(raw)  # unused at length 0
        negative = (a.view(raw) >> sign_at & raw.type(1)).astype(bool) & (length > 0)
        inside = mask & _low_mask(np.maximum(width - position.astype(np.int64), 0), raw)
        field = np.where(negative, field | ~inside, field)
    return field.view(a.dtype)


def insert_bits(a: np.ndarray, b: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """bfi: b with the low `length` bits of a at `position`."""
    position, length = position & 0xFF, length & 0xFF
    mask = _shift(True)(_low_mask(length, a.dtype), position)
    return (_shift(True)(a, position) & mask) | (b & ~mask)


def permute_bytes(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """prmt: four bytes selected from the eight of b:a; bit 3 of a selector replicates the sign of the byte."""
    pair = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.uint64(0)
    for k in range(4):
        pick = (selector >> np.uint32(4 * k)).astype(np.uint64)
        byte = (pair >> ((pick & np.uint64(7)) * np.uint64(8))) & np.uint64(0xFF)
        sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
        result = result | (np.where(pick & np.uint64(8), sign, byte) << np.uint64(8 * k))
    return result.astype(np.uint32)


def logic3(table: int) -> Function:
    """lop3: the bitwise function of three operands with an 8-bit truth table."""

    def compute(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        result = np.uint32(0)
        for row in range(8):
            if table >> row & 1:
                terms = (x if row >> k & 1 else ~x for x, k in ((a, 2), (b, 1), (c, 0)))
                result = result | np.bitwise_and.reduce(np.broadcast_arrays(*terms))
        return result

    return compute


# Floats


def extremum(pick: Function, merge: Function) -> Function:
    """min or max of floats; −0 is less than +0."""

    def compute(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        result = pick(a, b)
        if (equal := a == b).any():
            raw = unsigned(f"f{8 * result.dtype.itemsize}")
            result = np.where(equal, merge(a.view(raw), b.view(raw)).view(result.dtype), result)
        return result

    return compute


def _in_double(function: Function) -> Function:
    return lambda x: function(x.astype(np.float64)).astype(x.dtype)


def to_integer(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """An integral float as an integer, clamped to the type's range; NaN gives 0, or the sign bit for 64 bits."""
    info = np.iinfo(dtype)
    x = x.astype(np.float64)
    large, small = x >= float(info.max), x <= float(info.min)
    inside = np.where(large | small | np.isnan(x), 0.0, x).astype(dtype)
    inside = np.where(large, dtype.type(info.max), np.where(small, dtype.type(info.min), inside))
    nan = dtype.type(0) if dtype.itemsize < 8 else np.uint64(1 << 63).astype(dtype)
    return np.where(np.isnan(x), nan, inside)


# Builders: (instruction, its type, its other modifiers) → function, operand types, result type


def _arithmetic(plain: Function) -> Callable[..., Operation]:
    def build(instruction: Instruction, kind: str, modifiers: set[str]) -> Operation:
        opcode = instruction.opcode
        if kind[0] != "f":
            known = {"lo"} if opcode in ("mul", "mad") else set()
            _check_modifiers(instruction, modifiers, known)
            return plain, [kind, kind], kind
        _check_modifiers(instruction, modifiers, ROUNDINGS | {"ftz", "sat"})
        mode = next(iter(modifiers & ROUNDINGS), "rn")
        if mode != "rn" and kind != "f32":
            raise UnknownInstruction("directed rounding is supported for float32 only")
        function = plain if mode == "rn" else _exactly(opcode, mode)
        return _with_modifiers(function, kind, modifiers), [kind, kind], kind

    return build


def _multiply(instruction: Instruction, kind: str, modifiers: set[str]) -> Operation:
    if modifiers == {"wide"}:
        wide = DTYPES[WIDER[kind]]
        return (lambda a, b: a.astype(wide) * b.astype(wide)), [kind, kind], WIDER[kind]
    if modifiers == {"hi"}:
        return multiply_high, [kind, kind], kind
    return _arithmetic(np.multiply)(instruction, kind, modifiers)


def _multiply_add(instruction: Instruction, kind: str, modifiers: set[str]) -> Operation:
    if kind[0] == "f":
        _check_modifiers(instruction, modifiers, ROUNDINGS | {"ftz", "sat"})
        mode = next(iter(modifiers & ROUNDINGS), "rn")
        if mode != "rn" and kind == "f32":
            function = _exactly("fma", mode)
        elif kind == "f16":
            function = lambda a, b, c: (a.astype(float) * b.astype(float) + c.astype(float)).astype(np.float16)  # noqa: E731
        elif mode == "rn":
            function = fma
        else:
            raise UnknownInstruction("directed rounding is supported for float32 only")
        return _with_modifiers(function, kind, modifiers), [kind] * 3, kind
    _check_modifiers(instruction, modifiers, {"lo", "hi", "wide"})
    product, _, result = _multiply(instruction, kind, modifiers)
    return (lambda a, b, c: product(a, b) + c), [kind, kind, result], result


def _divide(instruction: Instruction, kind: str, modifiers: set[str]) -> Operation:
    _check_modifiers(instruction, modifiers, {"rn", "approx", "full", "ftz"} if kind[0] == "f" else set())
    if kind[0] == "f":
        return _with_modifiers(np.divide, kind, modifiers), [kind, kind], kind
    return divide, [kind, kind], kind


def _extremum(pick: Function, propagating: Function, merge: Function) -> Callable[..., Operation]:
    def build(instruction: Instruction, kind: str, modifiers: set[str]) -> Operation:
        _check_modifiers(instruction, modifiers, {"ftz", "NaN"} if kind[0] == "f" else set())
        if kind[0] != "f":
            return propagating, [kind, kind], kind
        function = extremum(propagating if "NaN" in modifiers else pick, merge)
        return _with_modifiers(function, kind, modifiers), [kind, kind], kind

    return build


def _unary(function: Function, known: set[str]) -> Callable[..., Operation]:
    def build(instruction: Instruction, kind: str, modifiers: set[str]) -> Operation:
        _check_modifiers(instruction, modifiers, known)
        return _with_modifiers(function, kind, modifiers), [kind], kind

    return build


def _reciprocal(instruction: Instruction, kind: str, modifiers: set[str]) -> Operation:
    _check_modifiers(instruction, modifiers, {"rn", "approx", "ftz"})
    if kind == "f64" and "approx" in modifiers:  # only the upper half of the bits
        high = lambda x: ((1 / x).view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)  # noqa: E731
        return high, [kind], kind
    return _with_modifiers(lambda x: x.dtype.type(1) / x, kind, modifiers), [kind], kind


def _fixed(function: Function, operands: list[str | None], result: str | None = None) -> Callable[..., Operation]:
    """An instruction without modifiers; a type None is the instruction's own type."""

    def build(instruction: Instruction, kind: str, modifiers: set[str]) -> Operation:
        _check_modifiers(instruction, modifiers, set())
        return function, [t or kind for t in operands], result or kind

    return build


def comparison(name: str, is_float: bool) -> Function:
    """The relation of `setp`. For floats it is ordered (false for NaN), or unordered (true for NaN) with suffix u."""
    if not is_float:
        return COMPARE[name]
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if name.endswith("u") and name[:2] in COMPARE:
        ordered = COMPARE[name[:2]]
        return lambda a, b: ordered(a, b) | np.isnan(a) | np.isnan(b)
    if name == "ne":
        return lambda a, b: (a != b) & ~(np.isnan(a) | np.isnan(b))
    return COMPARE[name]


def _compare(instruction: Instruction, kind: str, modifiers: set[str]) -> Operation:
    name, *logic = [m for m in instruction.modifiers[:-1] if m != "ftz"]
    relation = _with_input_flush(comparison(name, kind[0] == "f"), kind, modifiers)
    if not logic:
        return relation, [kind, kind], "pred"
    join = LOGIC[logic[0]]
    return (lambda a, b, c: join(relation(a, b), c)), [kind, kind, "pred"], "pred"


def _with_input_flush(function: Function, kind: str, modifiers: set[str]) -> Function:
    if "ftz" in modifiers and kind == "f32":
        return lambda a, b: function(flush(a), flush(b))
    return function


def _convert(instruction: Instruction, source: str, modifiers: set[str]) -> Operation:
    target = instruction.modifiers[-2]
    modifiers = modifiers - {target}
    _check_modifiers(instruction, modifiers, ROUNDINGS | set(TO_INTEGER) | {"ftz", "sat"})
    dtype = DTYPES[target]
    mode = next(iter(modifiers & (ROUNDINGS | set(TO_INTEGER))), None)
    if source[0] == "f" and target[0] == "f":
        function = _between_floats(instruction, source, dtype, mode)
        if "ftz" in modifiers:
            inner = function
            function = lambda x: _flush_if_float32(inner(_flush_if_float32(x)))  # noqa: E731
        return _with_modifiers(function, target, modifiers - {"ftz"}), [source], target
    if source[0] == "f":
        if mode not in TO_INTEGER:
            raise UnknownInstruction("a conversion to integer needs a rounding mode")
        start = _flush_if_float32 if "ftz" in modifiers else np.asarray
        return (lambda x: to_integer(TO_INTEGER[mode](start(x).astype(np.float64)), dtype)), [source], target
    if target[0] == "f":
        if mode == "rn":
            return _with_modifiers(lambda x: x.astype(dtype), target, modifiers), [source], target
        if target == "f32" and bits(source) <= 32 and mode in ROUNDINGS:
            return (lambda x: round_to_float32(x.astype(np.float64), np.float64(0), mode)), [source], target
        raise UnknownInstruction(f"rounding {mode}")
    if "sat" in modifiers:
        to, of = np.iinfo(dtype), np.iinfo(DTYPES[source])
        low, high = max(to.min, of.min), min(to.max, of.max)
        return (lambda x: np.clip(x, low, high).astype(dtype)), [source], target
    return (lambda x: x.astype(dtype)), [source], target


def _flush_if_float32(x: np.ndarray) -> np.ndarray:
    return flush(x) if x.dtype == np.float32 else x


def _between_floats(instruction: Instruction, source: str, dtype: np.dtype, mode: str | None) -> Function:
    if mode in TO_INTEGER:
        return lambda x: TO_INTEGER[mode](x).astype(dtype)
    if mode in (None, "rn"):
        return lambda x: x.astype(dtype)
    if source == "f64" and dtype == np.float32:
        return lambda x: round_to_float32(x, np.float64(0), mode)
    raise UnknownInstruction(f"rounding {mode}")


def _funnel_shift(instruction: Instruction, kind: str, modifiers: set[str]) -> Operation:
    """shf: one word of a shifted pair of words."""
    _check_modifiers(instruction, modifiers, {"l", "r", "wrap", "clamp"})

    def compute(low: np.ndarray, high: np.ndarray, amount: np.ndarray) -> np.ndarray:
        pair = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
        amount = (amount & np.uint32(31) if "wrap" in modifiers else np.minimum(amount, np.uint32(32))).astype(
            np.uint64
        )
        shifted = (pair << amount) >> np.uint64(32) if "l" in modifiers else pair >> amount
        return shifted.astype(np.uint32)

    return compute, ["b32", "b32", "u32"], "b32"


def _find_bit(instruction: Instruction, kind: str, modifiers: set[str]) -> Operation:
    """bfind: the position of the highest bit that differs from the sign; all ones if no bit does."""
    _check_modifiers(instruction, modifiers, {"shiftamt"})
    top = np.uint32(bits(kind) - 1)

    def compute(x: np.ndarray) -> np.ndarray:
        length = bit_length((np.where(x < 0, ~x, x)).view(unsigned(kind)))
        place = top - (length - np.uint32(1)) if "shiftamt" in modifiers else length - np.uint32(1)
        return np.where(length == 0, np.uint32(0xFFFFFFFF), place)

    return compute, [kind], "u32"


def _logic3(instruction: Instruction, kind: str, modifiers: set[str]) -> Operation:
    _check_modifiers(instruction, modifiers, set())
    return logic3(int(instruction.operands[4].text, 0)), [kind] * 3, kind


OPERATIONS: dict[str, Callable[[Instruction, str, set[str]], Operation]] = {
    "add": _arithmetic(np.add),
    "sub": _arithmetic(np.subtract),
    "mul": _multiply,
    "mad": _multiply_add,
    "fma": _multiply_add,
    "div": _divide,
    "rem": _fixed(remainder, [None, None]),
    "min": _extremum(np.fmin, np.minimum, np.bitwise_or),
    "max": _extremum(np.fmax, np.maximum, np.bitwise_and),
    "neg": _unary(np.negative, {"ftz"}),
    "abs": _unary(np.abs, {"ftz"}),
    "copysign": _fixed(lambda a, b: np.copysign(b, a), [None, None]),
    "rcp": _reciprocal,
    "sqrt": _unary(np.sqrt, {"rn", "approx", "ftz"}),
    "rsqrt": _unary(_in_double(lambda x: 1 / np.sqrt(x)), {"approx", "ftz"}),
    "ex2": _unary(_in_double(np.exp2), {"approx", "ftz"}),
    "lg2": _unary(_in_double(np.log2), {"approx", "ftz"}),
    "sin": _unary(_in_double(np.sin), {"approx", "ftz"}),
    "cos": _unary(_in_double(np.cos), {"approx", "ftz"}),
    "tanh": _unary(_in_double(np.tanh), {"approx"}),
    "and": _fixed(np.bitwise_and, [None, None]),
    "or": _fixed(np.bitwise_or, [None, None]),
    "xor": _fixed(np.bitwise_xor, [None, None]),
    "not": _fixed(np.bitwise_not, [None]),
    "shl": _fixed(_shift(True), [None, "u32"]),
    "shr": _fixed(_shift(False), [None, "u32"]),
    "shf": _funnel_shift,
    "popc": _fixed(lambda x: np.bitwise_count(x).astype(np.uint32), [None], "u32"),
    "clz": _fixed(lambda x: np.uint32(8 * x.dtype.itemsize) - bit_length(x), [None], "u32"),
    "brev": _fixed(reverse_bits, [None]),
    "bfind": _find_bit,
    "bfe": _fixed(extract_bits, [None, "u32", "u32"]),
    "bfi": _fixed(insert_bits, [None, None, "u32", "u32"]),
    "prmt": _fixed(permute_bytes, [None, None, "b32"]),
    "lop3": _logic3,
    "selp": _fixed(lambda a, b, p: np.where(p, a, b), [None, None, "pred"]),
    "setp": _compare,
    "cvt": _convert,
}
