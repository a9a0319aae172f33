"""State spaces: their bytes, the state of each byte, and a race detector."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.cuda.ptx.parse import PTXError

ALLOCATED, INITIALISED = 0x01, 0x02  # bits of a byte's state
SECTOR = 32  # bytes, the smallest transfer of global memory
BANKS = 32  # of 4 bytes, in shared memory
SAME_WARP, SAME_BLOCK, ANY_BLOCK = 1, 2, 3  # scopes: which threads the readers of a granule are in

Ints = np.ndarray


class OutOfBounds(PTXError):
    """An access outside of all allocations, or to freed memory."""


class Misaligned(PTXError):
    """An access whose address is not a multiple of its size."""


class Uninitialised(PTXError):
    """A read of memory that was never written."""


class DataRace(PTXError):
    """Two threads access the same memory, at least one writes, and no barrier orders them."""


@dataclass
class Fault(Exception):
    """An error in lane `at` of an access, numbered among its active lanes; the machine adds the location."""

    error: type[PTXError]
    at: int
    problem: str


class Memory:
    """The bytes of one state space.

    state has a byte for each byte of data: whether it is allocated, and whether it was written.
    """

    def __init__(self, nbytes: int, state: int = 0):
        size = -(-nbytes // 16) * 16
        self.data = np.full(size, 0xFF, np.uint8)  # NaN, or an index out of range
        self.state = np.full(size, state, np.uint8)

    def check(self, index: Ints, width: int, bit: int) -> None:
        """Raise unless every access of width bytes at index is aligned, and all its bytes have the state bit set."""
        if (bad := index % width != 0).any():
            raise Fault(Misaligned, int(bad.argmax()), f"not a multiple of the {width} bytes that it accesses")
        if (bad := (index < 0) | (index > self.state.size - width)).any():
            raise Fault(OutOfBounds, int(bad.argmax()), "outside of what was allocated")
        part = min(width, 8)
        required = int.from_bytes(bytes([bit]) * part, "little")
        states = self.state.view(f"u{part}")
        for k in range(width // part):
            if (bad := states[index // part + k] & required != required).any():
                at = int(bad.argmax())
                first = int(index[at])
                allocated = (self.state[first : first + width] & ALLOCATED).all()
                if allocated:
                    raise Fault(Uninitialised, at, "never written")
                raise Fault(OutOfBounds, at, "outside of what was allocated")

    def load(self, index: Ints, dtype: np.dtype) -> np.ndarray:
        return self.data.view(dtype)[index // dtype.itemsize]

    def store(self, index: Ints, values: np.ndarray) -> None:
        size = values.dtype.itemsize
        self.data.view(values.dtype)[index // size] = values
        self.state.view(f"u{size}")[index // size] = int.from_bytes(bytes([ALLOCATED | INITIALISED]) * size, "little")


class Shadow:
    """The race detector: the last writer and reader of each granule of a space.

    A thread has a number, (block << shift) + thread in the block, and a clock: the count of block barriers in the upper
    half, and of warp-wide synchronisations since the last barrier in the lower half. Two accesses of different threads
    are ordered only by a block barrier between them or, within a warp, by a `bar.warp.sync`. Lanes of a warp are not
    assumed to run in lockstep.
    """

    def __init__(self, nbytes: int, granule: int, shift: int):
        n = nbytes // granule + 1
        self.granule, self.shift = granule, shift
        self.writer, self.reader = np.zeros(n, np.int64), np.zeros(n, np.int64)  # 1 + thread; 0: none
        self.written, self.read = np.zeros(n, np.int64), np.zeros(n, np.int64)  # their clocks
        self.atomic = np.zeros(n, np.bool_)  # whether the last write was atomic
        self.scope = np.zeros(n, np.int8)  # scope of the readers; 0: one thread

    def access(self, index: Ints, width: int, thread: Ints, clock: Ints, store: bool, atomic: bool) -> None:
        """Record accesses of width bytes; raise if one races with an earlier or simultaneous one."""
        for granule in index // self.granule + np.arange(max(1, width // self.granule))[:, None]:
            if store:
                self._store(granule, thread, clock, atomic)
            else:
                self._load(granule, thread, clock, atomic)

    def _load(self, granule: Ints, thread: Ints, clock: Ints, atomic: bool) -> None:
        self._check_writer(granule, thread, clock, atomic, "reads what {} wrote")
        if not atomic:  # an atomic write does not race with a strong read
            self._record_readers(granule, thread, clock)

    def _store(self, granule: Ints, thread: Ints, clock: Ints, atomic: bool) -> None:
        self._check_writer(granule, thread, clock, atomic, "overwrites what {} wrote")
        self._check_readers(granule, thread, clock)
        self.writer[granule], self.written[granule] = thread + 1, clock
        self.atomic[granule] = atomic
        if not atomic:
            winner = self.writer[granule]  # differs from thread if two lanes write one granule at once
            self._raise(winner != thread + 1, winner, "overwrites what {} writes at the same time")

    def _check_writer(self, granule: Ints, thread: Ints, clock: Ints, atomic: bool, what: str) -> None:
        writer = self.writer[granule]
        if (foreign := (writer > 0) & (writer != thread + 1)).any():
            racing = foreign & (self._scope_of(writer, self.written[granule], thread, clock) > 0)
            if atomic:
                racing &= ~self.atomic[granule]
            self._raise(racing, writer, what)

    def _check_readers(self, granule: Ints, thread: Ints, clock: Ints) -> None:
        reader, scope = self.reader[granule], self.scope[granule]
        if ((reader > 0) & ((reader != thread + 1) | (scope > 0))).any():
            read = self.read[granule]
            near = self._scope_of(reader, read, thread, clock) > 0
            self._raise(near, reader, "overwrites what {} read")
            self._raise(
                self._unordered(reader, read, scope, thread, clock) > 0, reader, "overwrites what others and {} read"
            )

    def _unordered(self, reader: Ints, read: Ints, scope: np.ndarray, thread: Ints, clock: Ints) -> np.ndarray:
        """The scope of those readers that are not ordered before a thread."""
        current = ((reader - 1) >> self.shift == thread >> self.shift) & (read >> 32 == clock >> 32)
        counts = (scope == ANY_BLOCK) | (current & ((scope == SAME_BLOCK) | (read == clock)))
        return np.where(counts, scope, 0)

    def _record_readers(self, granule: Ints, thread: Ints, clock: Ints) -> None:
        reader = self.reader[granule]
        scope = None
        if reader.any():
            read, scope = self.read[granule], self.scope[granule]
            scope = self._unordered(reader, read, scope, thread, clock)
            scope = np.maximum(scope, self._scope_of(reader, read, thread, clock))
        self.reader[granule], self.read[granule] = thread + 1, clock
        winner = self.reader[granule]  # differs from thread if two lanes read one granule at once
        if (winner != thread + 1).any():
            together = self._scope_of(winner, self.read[granule], thread, clock)
            scope = together if scope is None else np.maximum(scope, together)
        if scope is not None:
            self.scope[granule] = 0
            for distance in (SAME_WARP, SAME_BLOCK, ANY_BLOCK):  # the widest is written last
                if (these := scope == distance).any():
                    self.scope[granule[these]] = distance

    def _scope_of(self, other: Ints, then: Ints, thread: Ints, clock: Ints) -> np.ndarray:
        """The scope of two unordered threads; 0 for one thread or ordered accesses. `other` is 1 + a thread."""
        known, other = other > 0, other - 1
        distance = np.where((clock == then) & (other != thread), SAME_WARP, 0)
        distance = np.where((other >> 5 != thread >> 5) & (clock >> 32 == then >> 32), SAME_BLOCK, distance)
        distance = np.where(other >> self.shift != thread >> self.shift, ANY_BLOCK, distance)
        return np.where(known, distance, 0)

    def _raise(self, racing: np.ndarray, other: Ints, what: str) -> None:
        if racing.any():
            at = int(racing.argmax())
            block, thread = divmod(int(other[at]) - 1, 1 << self.shift)
            raise Fault(DataRace, at, what.format(f"thread {thread} of block {block}") + ", no barrier between")


def sectors(index: Ints, warp: Ints) -> int:
    """The sum over warps of the 32-byte sectors that a request touches; no access crosses a sector."""
    return _distinct(warp * (1 << 40) + index // SECTOR).size


def bank_conflicts(index: Ints, lane: Ints, width: int) -> int:
    """The number of extra shared-memory cycles because lanes access different words of one bank.

    Accesses of 8 and 16 bytes a lane are processed by half and quarter warps.
    """
    words = max(1, width // 4)
    group = (lane >> 5) * words + (lane & 31) // (32 // words)
    word = index[:, None] // 4 + np.arange(words)
    bank = group[:, None] * BANKS + word % BANKS
    asked = _distinct((bank * (1 << 32) + word).ravel()) >> 32  # the bank of every distinct word
    starts = np.flatnonzero(np.diff(asked, prepend=-1))
    if starts.size == asked.size:
        return 0
    depth = np.diff(starts, append=asked.size)
    deepest = np.zeros(int(group.max()) + 1, np.int64)
    np.maximum.at(deepest, asked[starts] // BANKS, depth)
    return int((deepest[deepest > 0] - 1).sum())


def _distinct(keys: Ints) -> Ints:
    steps = np.diff(keys)
    if (steps < 0).any():
        keys = np.sort(keys)
        steps = np.diff(keys)
    return np.concatenate([keys[:1], keys[1:][steps > 0]])


def in_turns(index: Ints, apply: Callable[[np.ndarray], None]) -> None:
    """Call apply with groups of lanes: no address twice in a group, and lanes of one address in order."""
    left = np.arange(index.size)
    while left.size:
        _, first = np.unique(index[left], return_index=True)
        apply(left[first])
        left = np.delete(left, first)
