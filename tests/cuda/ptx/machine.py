"""A SIMT machine: one lane for each thread; all lanes at the lowest program counter step together.

Lanes at one instruction are a slice or an index array. Groups merge again when they reach the same program counter.
"""

from dataclasses import dataclass, field

import numpy as np

from tests.cuda.ptx.memory import (
    ALLOCATED,
    INITIALISED,
    SECTOR,
    Fault,
    Memory,
    OutOfBounds,
    Shadow,
    bank_conflicts,
    sectors,
)
from tests.cuda.ptx.opcodes import InactiveLane, Lanes, decode, source
from tests.cuda.ptx.parse import GUARD, PTXError, UnknownInstruction

BASE = 1 << 44  # of global memory
# Offsets from an address within a space to a generic address.
WINDOWS = {"global": 0, "const": 0, "shared": 1 << 40, "local": 1 << 41}
STEPS = 2_000_000  # most instructions of a launch: beyond it, the kernel does not terminate


class DivergentBarrier(PTXError):
    """Threads of a block wait at a barrier, and others wait at another one or have ended."""


@dataclass
class Traffic:
    """Costs of accesses: requests of warps, 32-byte sectors or bank conflicts, and bytes requested."""

    requests: int = 0
    sectors: int = 0
    conflicts: int = 0
    nbytes: int = 0


@dataclass
class Report:
    """Counts of a launch. Keys of traffic are the space, "load", "store" or "atomic", and bits of a lane."""

    steps: int = 0
    barriers: int = 0  # counted for each block
    shuffles: int = 0  # counted for each warp
    atomics: int = 0  # counted for each lane
    traffic: dict[tuple[str, str, int], Traffic] = field(default_factory=dict)

    def sectors_per_request(self, bits: int) -> float:
        """Sectors of a global load or store of so many bits a lane; a full warp of 32-bit lanes needs at least 4."""
        found = [
            t for (space, kind, b), t in self.traffic.items() if space == "global" and kind != "atomic" and b == bits
        ]
        return sum(t.sectors for t in found) / max(1, sum(t.requests for t in found))

    def moved(self, kind: str = "load") -> int:
        """Bytes requested by "load" or "store" instructions of global memory."""
        return sum(t.nbytes for (space, k, _), t in self.traffic.items() if space == "global" and k == kind)

    @property
    def bank_conflicts(self) -> int:
        return sum(t.conflicts for t in self.traffic.values())


class Machine:
    """Executes some blocks of a launch."""

    WINDOWS = WINDOWS

    def __init__(self, launch, first_block: int, blocks: int):
        kernel = launch.kernel
        self.launch, self.kernel, self.report = launch, kernel, launch.report
        self.blocks = blocks
        self.threads = int(np.prod(launch.block))
        self.padded = -(-self.threads // 32) * 32  # lanes of a block
        self.lanes = blocks * self.padded
        self.ids = np.arange(self.lanes)
        self.thread, self.block = self.ids % self.padded, self.ids // self.padded + first_block
        self.number = (self.block << launch.shift) + self.thread  # the race detector's number of a thread
        self.clock = np.zeros(self.lanes, np.int64)
        self.registers = [_register(kind, self.lanes) for kind in kernel.registers]
        self.carry = np.zeros(self.lanes, np.bool_)
        self.specials: dict[str, np.ndarray] = {}
        self.shared_size = kernel.dynamic + -(-launch.dynamic_shared // GUARD) * GUARD + GUARD
        self.shared = Memory(blocks * self.shared_size)
        for offset, nbytes in (*kernel.shared.values(), (kernel.dynamic, launch.dynamic_shared)):
            self.shared.state.reshape(blocks, -1)[:, offset : offset + nbytes] = ALLOCATED
        self.local = Memory(self.lanes * kernel.local_bytes, ALLOCATED)
        self.shared_shadow = Shadow(self.shared.data.size, launch.granules["shared"], launch.shift)
        self.program = decode(kernel)
        self.masks = launch.masks
        self.live = self.thread < self.threads
        self.ready: dict[int, Lanes] = {0: self.compact(np.flatnonzero(self.live))}
        self.waiting: dict[int, Lanes] = {}  # at a barrier
        self.stalled: dict[int, Lanes] = {}  # at a warp-wide instruction, waiting for other lanes of its mask
        self.pc = self.steps = 0

    # Lanes

    def compact(self, ids: np.ndarray) -> Lanes:
        """Sorted lanes, as a slice if they are consecutive."""
        if ids.size and ids[-1] - ids[0] == ids.size - 1:
            return slice(int(ids[0]), int(ids[-1]) + 1)
        return ids

    def number_of(self, lanes: Lanes) -> int:
        return lanes.stop - lanes.start if isinstance(lanes, slice) else lanes.size

    def merge(self, a: Lanes | None, b: Lanes) -> Lanes:
        return b if a is None else self.compact(np.sort(np.concatenate([self.ids[a], self.ids[b]])))

    def split(self, lanes: Lanes, chosen: np.ndarray) -> tuple[Lanes, Lanes]:
        ids = self.ids[lanes]
        return self.compact(ids[chosen]), self.compact(ids[~chosen])

    # Control

    def run(self) -> None:
        """Execute until all threads have ended."""
        with np.errstate(all="ignore"):
            while self.ready or self.release():
                pc = min(self.ready)
                lanes = self.ready.pop(pc)
                while lanes is not None:
                    pc, lanes = self.step(pc, lanes)
                    if lanes is not None and pc in self.ready:
                        lanes = self.merge(lanes, self.ready.pop(pc))

    def step(self, pc: int, lanes: Lanes) -> tuple[int, Lanes | None]:
        """Execute the instruction at pc. Returns the next pc and its lanes, or None for lanes to select again."""
        self.pc = pc
        if pc >= len(self.program):
            self.live[lanes] = False
            return pc, None
        instruction = self.kernel.instructions[pc]
        self.report.steps += 1
        self.steps += 1
        if self.steps > STEPS:
            raise PTXError(f"{self.kernel.label(pc)}: {STEPS} instructions were executed, and the kernel has not ended")
        active, passive = lanes, None
        if instruction.guard is not None:
            chosen = self.registers[instruction.guard.index][lanes] ^ instruction.negated
            if not chosen.any():
                return pc + 1, lanes
            if not chosen.all():
                active, passive = self.split(lanes, chosen)
        if self.launch.watch is not None:
            self.launch.watch(self, pc, self.ids[active])
        if pc in self.masks and (active := self.converge(pc, active)) is None:
            return self.onward(pc + 1, passive)
        run = self.program[pc]
        if run is not None:
            run(self, active)
        elif instruction.opcode == "bra":
            if passive is not None:
                self.ready[pc + 1] = self.merge(self.ready.get(pc + 1), passive)
            return self.onward(self.kernel.labels[instruction.operands[0]], active)
        elif pc in self.masks:
            self.synchronise_warps(active)
        else:
            if instruction.opcode in ("ret", "exit"):
                self.live[active] = False
            else:
                self.waiting[pc] = self.merge(self.waiting.get(pc), active)
            return self.onward(pc + 1, passive)
        return pc + 1, self.merge(passive, active)

    def onward(self, pc: int, lanes: Lanes | None) -> tuple[int, Lanes | None]:
        """Continue with lanes at pc, unless other lanes are at a lower one."""
        if lanes is None or not self.ready or pc <= min(self.ready):
            return pc, lanes
        self.ready[pc] = self.merge(self.ready.get(pc), lanes)
        return pc, None

    def converge(self, pc: int, lanes: Lanes) -> Lanes | None:
        """The lanes whose masks are complete for a warp-wide instruction; the others wait."""
        lanes = self.merge(self.stalled.pop(pc, None), lanes)
        ids = self.ids[lanes]
        lane = ids & 31
        mask = np.broadcast_to(self.masks[pc](self, lanes), ids.shape).astype(np.int64)
        if (outside := mask >> lane & 1 == 0).any():
            self.fail(InactiveLane, ids[outside.argmax()], "is not in its own mask")
        here = np.zeros(self.lanes, np.bool_)
        here[ids] = True
        missing = _bits(self.live & ~here)[ids >> 5] & mask
        if not missing.any():
            return lanes
        incomplete = np.zeros(self.lanes // 32, np.bool_)
        incomplete[ids[missing != 0] >> 5] = True
        complete, rest = self.split(lanes, ~incomplete[ids >> 5])
        self.stalled[pc] = rest
        return complete if self.number_of(complete) else None

    def synchronise_warps(self, lanes: Lanes) -> None:
        """Order memory accesses within complete warps; a partial warp is not ordered."""
        ids = self.ids[lanes]
        here = np.zeros(self.lanes, np.bool_)
        here[ids] = True
        whole = _bits(self.live & ~here)[ids >> 5] == 0
        self.clock[ids[whole]] += 1

    def release(self) -> bool:
        """Release blocks whose threads all wait at one barrier. Returns False at the end of the launch."""
        if self.stalled:
            self.pc, lanes = next(iter(self.stalled.items()))
            self.fail(InactiveLane, self.ids[lanes][0], "waits for lanes of its mask that never arrive")
        if not self.waiting:
            return False
        at = np.full(self.lanes, -1)
        for pc, lanes in self.waiting.items():
            at[lanes] = pc
        table = at.reshape(self.blocks, self.padded)[:, : self.threads]
        first = table.max(1)
        if (odd := (table != first[:, None]) & (first >= 0)[:, None]).any():
            block, thread = (int(i[0]) for i in np.nonzero(odd))
            self.pc = int(first[block])
            other = int(table[block, thread])
            does = "has ended" if other < 0 else f"waits at line {self.kernel.instructions[other].line}"
            waiting = int(table[block].argmax())
            self.fail(DivergentBarrier, block * self.padded + waiting, f"waits for thread {thread}, which {does}")
        for pc, lanes in self.waiting.items():
            self._reduce_at_barrier(pc, lanes)
            self.ready[pc + 1] = lanes
            self.clock[lanes] = ((self.clock[lanes] >> 32) + 1) << 32
            self.report.barriers += self.number_of(lanes) // self.threads
        self.waiting = {}
        return True

    def _reduce_at_barrier(self, pc: int, lanes: Lanes) -> None:
        """bar.red: the number of threads of a block for which a predicate is true, or whether all or any are."""
        instruction = self.kernel.instructions[pc]
        modifiers = [m for m in instruction.modifiers if m not in ("cta", "aligned")]
        if modifiers[0] == "sync":
            return
        into, _, predicate = instruction.operands
        flags = source(predicate, "pred")(self, lanes).reshape(-1, self.threads)
        result = {"popc": flags.sum, "and": flags.all, "or": flags.any}[modifiers[1]](axis=1)
        register = self.registers[into.index]
        register[lanes] = np.repeat(result.astype(register.dtype), self.threads)

    # Used by decoded instructions

    def special(self, name: str) -> np.ndarray:
        """The values of a special register."""
        if name not in self.specials:
            self.specials[name] = np.broadcast_to(self._special(name), self.lanes).astype(np.uint32)
        return self.specials[name]

    def _special(self, name: str) -> np.ndarray | int:
        stem, _, axis = name[1:].partition(".")
        lane = self.ids & 31
        match stem:
            case "tid" | "ctaid":
                index, shape = (self.thread, self.launch.block) if stem == "tid" else (self.block, self.launch.grid)
                return _coordinates(index, shape)["xyz".index(axis)]
            case "ntid" | "nctaid":
                return (self.launch.block if stem == "ntid" else self.launch.grid)["xyz".index(axis)]
            case "laneid":
                return lane
            case "warpid":
                return self.thread >> 5
            case "nwarpid":
                return self.padded >> 5
            case "lanemask_lt":
                return (1 << lane) - 1
            case "lanemask_le":
                return (2 << lane) - 1
            case "lanemask_eq":
                return 1 << lane
            case "lanemask_gt":
                return 0xFFFFFFFF & ~((2 << lane) - 1)
            case "lanemask_ge":
                return 0xFFFFFFFF & ~((1 << lane) - 1)
            case "dynamic_smem_size":
                return self.launch.dynamic_shared
            case "total_smem_size":
                return self.kernel.shared_bytes + self.launch.dynamic_shared
        raise UnknownInstruction(f"{self.kernel.label(self.pc)}: the interpreter has no register {name}")

    def address_of(self, space: str, name: str, offset: int) -> int:
        return self.launch.variables[name] if space == "global" else offset

    def parameter(self, name: str, offset: int, dtype: np.dtype) -> np.generic:
        if offset:
            raise UnknownInstruction(f"{self.kernel.label(self.pc)}: a parameter with parts")
        return self.launch.parameters[name].astype(f"u{dtype.itemsize}").view(dtype)

    def access(
        self, space: str, address: np.ndarray, lanes: Lanes, width: int, store: bool, atomic: bool, load: bool = False
    ) -> tuple[Memory, np.ndarray]:
        """Check and count an access. Returns its memory, and the index of its first byte in every lane."""
        address = np.broadcast_to(address, self.number_of(lanes))
        ids = self.ids[lanes]
        if not space:
            space, address = self._generic(address, ids)
        try:
            memory, index = self._locate(space, address, ids)
            memory.check(index, width, ALLOCATED if store and not load else INITIALISED)
            if space != "local":
                shadow = self.shared_shadow if space == "shared" else self.launch.shadow
                shadow.access(index, width, self.number[lanes], self.clock[lanes], store, atomic)
        except Fault as fault:
            where = self.launch.describe(space, int(address[fault.at]), self.kernel)
            self.fail(fault.error, ids[fault.at], f"address {where}: {fault.problem}")
        key = (space, "atomic" if load else "store" if store else "load", 8 * width)
        traffic = self.report.traffic.setdefault(key, Traffic())
        traffic.requests += _distinct_warps(ids)
        traffic.nbytes += width * ids.size
        if not load and space == "global":
            traffic.sectors += max(1, width // SECTOR) * sectors(index, ids >> 5)
        elif not load and space == "shared":
            traffic.conflicts += bank_conflicts(address, ids, width)
        return memory, index

    def _generic(self, address: np.ndarray, ids: np.ndarray) -> tuple[str, np.ndarray]:
        space = next((s for s in ("local", "shared") if WINDOWS[s] <= address[0] < WINDOWS[s] + (1 << 32)), "global")
        inside = address - WINDOWS[space]
        if space != "global" and (inside >> 32).any():
            self.fail(UnknownInstruction, ids[0], "lanes of a generic access are in different spaces")
        return space, inside

    def _locate(self, space: str, address: np.ndarray, ids: np.ndarray) -> tuple[Memory, np.ndarray]:
        """The memory of a space, and indices in it; each block or thread has its own part of it."""
        if space in ("global", "const"):
            return self.launch.memory, address - BASE
        size, part = (self.shared_size, ids // self.padded) if space == "shared" else (self.kernel.local_bytes, ids)
        if (bad := (address < 0) | (address >= size)).any():
            raise Fault(OutOfBounds, int(bad.argmax()), f"outside of the {space} memory")
        return (self.shared if space == "shared" else self.local), part * size + address

    def fail(self, error: type[PTXError], lane: int, problem: str) -> None:
        """Raise an error that names kernel, line, thread and block."""
        thread = _coordinates(int(self.thread[lane]), self.launch.block)
        block = _coordinates(int(self.block[lane]), self.launch.grid)
        raise error(f"{self.kernel.label(self.pc)}\n  thread {thread} of block {block}: {problem}")


def _register(kind: str, lanes: int) -> np.ndarray:
    dtype = np.bool_ if kind == "pred" else np.dtype(f"u{int(kind[1:]) // 8}")
    return np.zeros(lanes, dtype)


def _bits(flags: np.ndarray) -> np.ndarray:
    """For each warp, a mask of the lanes whose flag is set."""
    return np.packbits(flags.reshape(-1, 32), axis=1, bitorder="little").view(np.uint32).ravel().astype(np.int64)


def _distinct_warps(ids: np.ndarray) -> int:
    return 1 + int(np.count_nonzero(np.diff(ids >> 5)))


def _coordinates(index: np.ndarray | int, shape: tuple[int, int, int]) -> tuple:
    """x, y and z of a thread in its block, or of a block in its grid."""
    return index % shape[0], index // shape[0] % shape[1], index // (shape[0] * shape[1])
