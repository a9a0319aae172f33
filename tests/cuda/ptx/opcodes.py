"""Instructions, decoded once into functions that execute them for a set of lanes.

A decoded function takes the machine and the lanes (a slice or an index array), and reads and writes registers, which
hold raw bits. The machine itself executes control flow: branches, barriers and exits.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from tests.cuda.ptx import arithmetic
from tests.cuda.ptx.arithmetic import DTYPES, bits, unsigned
from tests.cuda.ptx.memory import in_turns
from tests.cuda.ptx.parse import (
    Address,
    Instruction,
    Kernel,
    Literal,
    Operand,
    PTXError,
    Register,
    Special,
    Symbol,
    UnknownInstruction,
)

CONTROL = {"bra", "ret", "exit", "bar", "barrier"}
NO_EFFECT = {"membar", "fence", "nanosleep", "prefetch", "discard", "applypriority"}
SPACES = {"global", "shared", "local", "const", "param"}
STRONG = {"volatile", "relaxed", "acquire", "release", "acq_rel", "mmio"}
HINTS = {
    "ca",
    "cg",
    "cs",
    "lu",
    "cv",
    "wb",
    "wt",
    "nc",
    "weak",
    "sys",
    "gpu",
    "cta",
    "cluster",
}  # cache hints and scopes

Lanes = slice | np.ndarray
Step = Callable[..., None]  # of the machine and the lanes
Read = Callable[..., np.ndarray]


class InactiveLane(PTXError):
    """A warp-wide instruction names a lane that does not execute it."""


@lru_cache(maxsize=256)
def decode(kernel: Kernel) -> list[Step | None]:
    """A function for each instruction of a kernel; None for control flow, which the machine executes."""
    return [_decode(kernel, pc, instruction) for pc, instruction in enumerate(kernel.instructions)]


def _decode(kernel: Kernel, pc: int, instruction: Instruction) -> Step | None:
    try:
        if instruction.opcode in CONTROL:
            return _check_control(instruction)
        if instruction.opcode in NO_EFFECT:
            return lambda m, lanes: None
        if "cc" in instruction.modifiers:
            return _carrying(instruction)
        if instruction.opcode in SPECIFIC:
            return SPECIFIC[instruction.opcode](instruction)
        if instruction.opcode not in arithmetic.OPERATIONS:
            raise UnknownInstruction(f"the interpreter has no opcode {instruction.opcode}")
        function, kinds, result = arithmetic.operation(instruction)
        write = target(instruction.operands[0], result)
        sources = [source(o, kind) for o, kind in zip(instruction.operands[1:], kinds, strict=False)]
        return _apply(function, sources, write)
    except (UnknownInstruction, KeyError) as error:
        raise UnknownInstruction(f"{kernel.label(pc)}: {error}") from error


def _apply(function: Callable, sources: list[Read], write: Step) -> Step:
    """The step that applies a function to operands; one and two operands are special cases for speed."""
    if len(sources) == 1:
        (a,) = sources
        return lambda m, lanes: write(m, lanes, function(a(m, lanes)))
    if len(sources) == 2:
        a, b = sources
        return lambda m, lanes: write(m, lanes, function(a(m, lanes), b(m, lanes)))
    return lambda m, lanes: write(m, lanes, function(*[s(m, lanes) for s in sources]))


def literal(text: str, dtype: np.dtype) -> np.generic:
    """The value of a constant; 0f and 0d prefix the bits of a float."""
    if text[:2] in ("0f", "0F"):
        return np.uint32(int(text[2:], 16)).view(np.float32).astype(dtype)
    if text[:2] in ("0d", "0D"):
        return np.uint64(int(text[2:], 16)).view(np.float64).astype(dtype)
    if dtype.kind == "b":
        return np.bool_(int(text, 0) != 0)
    if dtype.kind == "f":
        return dtype.type(float(text))
    value = int(text.rstrip("U"), 0) & ((1 << 8 * dtype.itemsize) - 1)
    return np.dtype(f"u{dtype.itemsize}").type(value).view(dtype)


def source(operand: Operand, kind: str) -> Read:
    """The function that reads an operand as a type."""
    dtype = DTYPES[kind]
    match operand:
        case Register(index, declared) if declared == "pred" or bits(declared) == bits(kind):
            return lambda m, lanes: m.registers[index][lanes].view(dtype)
        case Register(index, declared) if bits(declared) > bits(kind):
            raw = unsigned(kind)
            return lambda m, lanes: m.registers[index][lanes].astype(raw).view(dtype)
        case Literal(text):
            value = literal(text, dtype)
            return lambda m, lanes: value
        case Special("WARP_SZ"):
            return lambda m, lanes: dtype.type(32)
        case Special(name):
            return lambda m, lanes: m.special(name)[lanes].astype(unsigned(kind)).view(dtype)
        case Symbol(space, name, offset):
            return lambda m, lanes: np.uint64(m.address_of(space, name, offset)).astype(unsigned(kind)).view(dtype)
        case ("!", Register(index)):
            return lambda m, lanes: ~m.registers[index][lanes]
    raise UnknownInstruction(f"cannot read {operand} as {kind}")


def target(operand: Operand, kind: str) -> Step:
    """The function that writes values of a type to an operand, extended if its register is wider."""
    if operand == Special("_"):
        return lambda m, lanes, values: None
    if not isinstance(operand, Register):
        raise UnknownInstruction(f"cannot write to {operand}")
    index, raw = operand.index, unsigned(kind)
    if operand.type == "pred" or bits(operand.type) == bits(kind):

        def write(m, lanes: Lanes, values: np.ndarray) -> None:
            m.registers[index][lanes] = values.view(raw)

    elif bits(operand.type) > bits(kind):
        wide = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{bits(operand.type) // 8}")

        def write(m, lanes: Lanes, values: np.ndarray) -> None:
            same = values if kind[0] == "s" else values.view(raw)
            m.registers[index][lanes] = same.astype(wide).view(f"u{wide.itemsize}")

    else:
        raise UnknownInstruction(f"a {operand.type} register is too narrow for {kind}")
    return write


def address(operand: Address) -> Read:
    """The function that computes an address as an int64."""
    base, offset = source(operand.base, "u64"), np.int64(operand.offset)
    return lambda m, lanes: base(m, lanes).view(np.int64) + offset


def _move(instruction: Instruction) -> Step:
    """mov, which also packs a tuple of registers into a wider register, or unpacks one."""
    into, value = instruction.operands
    kind = instruction.type
    if isinstance(into, tuple):
        part = f"b{bits(kind) // len(into)}"
        read, writes = source(value, kind), [target(o, part) for o in into]
        narrow = unsigned(part)

        def unpack(m, lanes: Lanes) -> None:
            whole = read(m, lanes)
            for k, write in enumerate(writes):
                write(m, lanes, (whole >> whole.dtype.type(8 * narrow.itemsize * k)).astype(narrow))

        return unpack
    if isinstance(value, tuple):
        part = f"b{bits(kind) // len(value)}"
        reads, write_whole = [source(o, part) for o in value], target(into, kind)
        wide = unsigned(kind)

        def pack(m, lanes: Lanes) -> None:
            parts = [r(m, lanes).astype(wide) << wide.type(bits(part) * k) for k, r in enumerate(reads)]
            write_whole(m, lanes, np.bitwise_or.reduce(np.broadcast_arrays(*parts)))

        return pack
    return _apply(lambda x: x, [source(value, kind)], target(into, kind))


def _convert_address(instruction: Instruction) -> Step:
    """cvta: an address of a space to a generic one, or, with `.to`, back."""
    into, value = instruction.operands
    space = next(m for m in instruction.modifiers if m in SPACES)
    read, write = source(value, "u64"), target(into, "u64")
    sign = -1 if "to" in instruction.modifiers else 1
    return lambda m, lanes: write(
        m, lanes, (read(m, lanes).view(np.int64) + np.int64(sign * m.WINDOWS[space])).view(np.uint64)
    )


def _access_modifiers(instruction: Instruction) -> tuple[str, int, bool]:
    """State space ("": generic), vector length, and whether the access is strong."""
    modifiers = set(instruction.modifiers[:-1])
    unknown = {m for m in modifiers - SPACES - STRONG - HINTS if m not in ("v2", "v4", "v8") and m[0] != "L"}
    if unknown - {"shared_cta"}:
        raise UnknownInstruction(f"modifiers {sorted(unknown)} of {instruction.opcode}")
    space = "shared" if "shared_cta" in modifiers else next(iter(modifiers & SPACES), "")
    vector = next((int(m[1]) for m in modifiers if m in ("v2", "v4", "v8")), 1)
    return space, vector, bool(modifiers & STRONG)


def _load(instruction: Instruction) -> Step:
    space, vector, strong = _access_modifiers(instruction)
    into, place = instruction.operands
    kind, dtype = instruction.type, DTYPES[instruction.type]
    if isinstance(place.base, Symbol) and place.base.space == "param":
        name, write = place.base.name, target(into, kind)
        return lambda m, lanes: write(m, lanes, m.parameter(name, place.offset, dtype))
    writes = [target(o, kind) for o in (into if isinstance(into, tuple) else (into,))]
    where = address(place)
    space = "local" if space == "param" else space

    def load(m, lanes: Lanes) -> None:
        memory, index = m.access(space, where(m, lanes), lanes, vector * dtype.itemsize, store=False, atomic=strong)
        for k, write in enumerate(writes):
            write(m, lanes, memory.load(index + k * dtype.itemsize, dtype))

    return load


def _store(instruction: Instruction) -> Step:
    space, vector, strong = _access_modifiers(instruction)
    place, value = instruction.operands
    kind, dtype = instruction.type, DTYPES[instruction.type]
    reads = [source(o, kind) for o in (value if isinstance(value, tuple) else (value,))]
    where = address(place)
    space = "local" if space == "param" else space

    def store(m, lanes: Lanes) -> None:
        memory, index = m.access(space, where(m, lanes), lanes, vector * dtype.itemsize, store=True, atomic=strong)
        for k, read in enumerate(reads):
            memory.store(index + k * dtype.itemsize, read(m, lanes))

    return store


ATOMICS: dict[str, Callable[..., np.ndarray]] = {
    "add": lambda old, x: old + x,
    "min": lambda old, x: np.minimum(old, x),
    "max": lambda old, x: np.maximum(old, x),
    "and": lambda old, x: old & x,
    "or": lambda old, x: old | x,
    "xor": lambda old, x: old ^ x,
    "exch": lambda old, x: x,
    "cas": lambda old, expected, x: np.where(old == expected, x, old),
    "inc": lambda old, x: np.where(old >= x, old.dtype.type(0), old + old.dtype.type(1)),
    "dec": lambda old, x: np.where((old == 0) | (old > x), x, old - old.dtype.type(1)),
}


def _atomic(instruction: Instruction) -> Step:
    """atom and red: lanes with the same address are executed in order, the lowest first."""
    *modifiers, name, kind = instruction.modifiers
    if name == "noftz":
        name = modifiers.pop()
    unknown = set(modifiers) - SPACES - STRONG - HINTS
    if unknown or name not in ATOMICS:
        raise UnknownInstruction(f"modifiers {sorted(unknown) or name} of {instruction.opcode}")
    space, dtype = next((m for m in modifiers if m in SPACES), ""), DTYPES[kind]
    operands = instruction.operands
    write = target(operands[0], kind) if instruction.opcode == "atom" else None
    place, *values = operands[1:] if write else operands
    where, reads, function = address(place), [source(v, kind) for v in values], ATOMICS[name]

    def update(m, lanes: Lanes) -> None:
        memory, index = m.access(space, where(m, lanes), lanes, dtype.itemsize, store=True, atomic=True, load=True)
        inputs = [np.broadcast_to(r(m, lanes), index.shape) for r in reads]
        before = np.empty(index.size, dtype)

        def turn(at: np.ndarray) -> None:
            before[at] = old = memory.load(index[at], dtype)
            memory.store(index[at], function(old, *[x[at] for x in inputs]).astype(dtype))

        in_turns(index, turn)
        m.report.atomics += index.size
        if write:
            write(m, lanes, before)

    return update


def _carrying(instruction: Instruction) -> Step:
    """add, sub and mad of 32 bits that set (`.cc`) or use (addc, subc, madc) the carry flag."""
    opcode, modifiers = instruction.opcode, set(instruction.modifiers[:-1])
    if bits(instruction.type) != 32:
        raise UnknownInstruction("carries are supported for 32 bits only")
    signed = instruction.type[0] == "s" and "hi" in modifiers
    reads = [source(o, instruction.type) for o in instruction.operands[1:]]
    write = target(instruction.operands[0], "u32")

    def compute(m, lanes: Lanes) -> None:
        values = [np.asarray(r(m, lanes)).astype(np.int64) for r in reads]
        low = np.int64(0xFFFFFFFF)
        carry = m.carry[lanes].astype(np.int64) if opcode.endswith("c") else np.int64(0)
        if opcode.startswith("mad"):
            product = values[0] * values[1] if signed else (values[0] & low).view("u8") * (values[1] & low).view("u8")
            half = product >> product.dtype.type(32) if "hi" in modifiers else product
            total = (half.astype(np.int64) & low) + (values[2] & low) + carry
        elif opcode.startswith("add"):
            total = (values[0] & low) + (values[1] & low) + carry
        else:
            total = (values[0] & low) - (values[1] & low) - carry
        if "cc" in modifiers:
            m.carry[lanes] = (total >> 32) & 1
        write(m, lanes, (total & low).astype(np.uint32))

    return compute


# Warp-wide instructions. The machine ensures that all live lanes of their masks are active.


def warp_mask(instruction: Instruction) -> Read | None:
    """The function that reads the mask of a warp-wide instruction; None for other instructions."""
    if instruction.opcode in ("shfl", "vote", "match", "redux"):
        return source(instruction.operands[-1], "b32")
    if instruction.opcode in ("bar", "barrier") and instruction.modifiers[0] == "warp":
        return source(instruction.operands[0], "b32")
    return None


def _shuffle(instruction: Instruction) -> Step:
    into, value, offset, clamp, mask = instruction.operands
    mode = instruction.modifiers[1]
    both = into if isinstance(into, tuple) else (into, Special("_"))
    write, write_inside = target(both[0], "b32"), target(both[1], "pred")
    reads = [source(o, "b32") for o in (value, offset, clamp, mask)]

    def shuffle(m, lanes: Lanes) -> None:
        x, b, c, member = (np.broadcast_to(r(m, lanes), m.number_of(lanes)).astype(np.int64) for r in reads)
        ids = m.ids[lanes]
        lane, b, segment = ids & 31, b & 31, c >> 8 & 31
        lowest = lane & segment
        highest = lowest | (c & 31 & ~segment)
        start = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": lowest | (b & ~segment)}[mode]
        inside = start >= highest if mode == "up" else start <= highest
        other = np.where(inside, start, lane)
        here = np.zeros(m.lanes, np.bool_)
        here[ids] = True
        if (absent := ~here[(ids & ~31) + other] | (member >> other & 1 == 0)).any():
            at = int(absent.argmax())
            m.fail(InactiveLane, ids[at], f"reads lane {other[at]}, which is not active in it")
        values = np.zeros(m.lanes, np.uint32)
        values[ids] = x
        m.report.shuffles += np.unique(ids >> 5).size
        write(m, lanes, values[(ids & ~31) + other])
        write_inside(m, lanes, inside)

    return shuffle


def _ballots(m, lanes: Lanes, true: np.ndarray) -> np.ndarray:
    """For each lane, a mask of the lanes of its warp for which `true` holds."""
    ids = m.ids[lanes]
    flags = np.zeros(m.lanes, np.bool_)
    flags[ids] = true
    return np.packbits(flags.reshape(-1, 32), axis=1, bitorder="little").view(np.uint32).ravel()[ids >> 5]


def _vote(instruction: Instruction) -> Step:
    into, value, mask = instruction.operands
    mode = instruction.modifiers[1]
    read, members = source(value, "pred"), source(mask, "b32")
    write = target(into, "b32" if mode == "ballot" else "pred")

    def vote(m, lanes: Lanes) -> None:
        true_lanes = _ballots(m, lanes, read(m, lanes)) & members(m, lanes)
        all_lanes = _ballots(m, lanes, np.True_) & members(m, lanes)
        answers = {
            "ballot": true_lanes,
            "any": true_lanes != 0,
            "all": true_lanes == all_lanes,
            "uni": (true_lanes == 0) | (true_lanes == all_lanes),
        }
        write(m, lanes, answers[mode])

    return vote


def _match(instruction: Instruction) -> Step:
    """match.any: for each lane, a mask of the lanes of its warp that have the same value."""
    if instruction.modifiers[0] != "any":
        raise UnknownInstruction("match.all")
    into, value, _ = instruction.operands
    read, write = source(value, instruction.type), target(into, "b32")

    def match(m, lanes: Lanes) -> None:
        values = np.broadcast_to(read(m, lanes), m.number_of(lanes))
        result = np.zeros(values.size, np.uint32)
        for v in np.unique(values):
            same = values == v
            result[same] = _ballots(m, lanes, same)[same]
        write(m, lanes, result)

    return match


def _warp_reduce(instruction: Instruction) -> Step:
    """redux: the sum, minimum, … of a value over the lanes of a warp (one mask for all of them)."""
    name, kind = instruction.modifiers[1], instruction.type
    combine = {"add": np.add, "min": np.minimum, "max": np.maximum, **arithmetic.LOGIC}[name]
    into, value, _ = instruction.operands
    read, write = source(value, kind), target(into, kind)

    def reduce(m, lanes: Lanes) -> None:
        values = np.broadcast_to(read(m, lanes), m.number_of(lanes))
        warps, starts, where = np.unique(m.ids[lanes] >> 5, return_index=True, return_inverse=True)
        write(m, lanes, combine.reduceat(values, starts, dtype=values.dtype)[where])
        m.report.shuffles += warps.size

    return reduce


def _active_mask(instruction: Instruction) -> Step:
    write = target(instruction.operands[0], "b32")
    return lambda m, lanes: write(m, lanes, _ballots(m, lanes, np.True_))


def _check_control(instruction: Instruction) -> None:
    """Raise for a barrier that the machine does not support."""
    if instruction.opcode not in ("bar", "barrier"):
        return
    kind = [m for m in instruction.modifiers if m not in ("cta", "aligned")]
    known = kind == ["sync"] and len(instruction.operands) == 1, kind == ["warp", "sync"], kind[:1] == ["red"]
    if not any(known):
        raise UnknownInstruction("barriers are supported for all threads of a block or warp")


def _trap(instruction: Instruction) -> Step:
    return lambda m, lanes: m.fail(PTXError, m.ids[lanes][0], "the kernel executed a trap")


SPECIFIC: dict[str, Callable[[Instruction], Step]] = {
    "mov": _move,
    "cvta": _convert_address,
    "ld": _load,
    "ldu": _load,
    "st": _store,
    "atom": _atomic,
    "red": _atomic,
    "addc": _carrying,
    "subc": _carrying,
    "madc": _carrying,
    "shfl": _shuffle,
    "vote": _vote,
    "match": _match,
    "redux": _warp_reduce,
    "activemask": _active_mask,
    "trap": _trap,
}
