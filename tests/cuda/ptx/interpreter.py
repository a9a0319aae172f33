"""A CUDA device in NumPy: launches execute PTX, and memory detects every misuse.

    device = Device()
    address = device.alloc(x.nbytes)
    device.write(address, x)
    report = device.launch(ptx, grid=4, block=128, args=[*array_argument(address, x.shape, x.dtype)])
    device.read(address, x.shape, x.dtype)

Accesses that are out of bounds, misaligned or read uninitialised memory, data races, divergent barriers and shuffles
from inactive lanes raise a `PTXError` that names the kernel, the line of its PTX and the thread. The interpreter does
not show time, reorderings that the memory model allows, the exact bits of `.approx` instructions, the order of float
atomics, or bugs of ptxas and the driver.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from tests.cuda.ptx.arithmetic import DTYPES
from tests.cuda.ptx.machine import BASE, DivergentBarrier, Machine, Report, Traffic
from tests.cuda.ptx.memory import ALLOCATED, DataRace, Memory, Misaligned, OutOfBounds, Shadow, Uninitialised
from tests.cuda.ptx.opcodes import InactiveLane, warp_mask
from tests.cuda.ptx.parse import Kernel, PTXError, UnknownInstruction, Variable, demangle, parse

__all__ = [
    "DataRace",
    "Device",
    "DivergentBarrier",
    "InactiveLane",
    "Misaligned",
    "OutOfBounds",
    "PTXError",
    "Report",
    "Traffic",
    "Uninitialised",
    "UnknownInstruction",
    "array_argument",
]

ALIGNMENT = 256  # of allocations, and the size of the guard zone behind each
QUARANTINE = 1 << 25  # freed bytes that are not reused, to detect use after free
LANES = 1 << 14  # executed at a time: more overflow the caches, fewer make NumPy's overhead dominate
SHARED_LIMIT = 48 << 10  # bytes of shared memory that a block can use on every device
Watch = Callable[[Machine, int, np.ndarray], None]


def array_argument(address: int, shape: Sequence[int], dtype: np.dtype | type | str) -> list[int]:
    """The parameters of a numba-cuda kernel for a C-contiguous array.

    They are meminfo, parent, number of elements, itemsize, address, shape, strides in bytes.
    """
    itemsize = np.dtype(dtype).itemsize
    strides = [itemsize * int(np.prod(shape[k + 1 :], dtype=int)) for k in range(len(shape))]
    return [0, 0, int(np.prod(shape, dtype=int)), itemsize, address, *(int(n) for n in shape), *strides]


class Device:
    """Global memory, and launches of kernels on it.

    Finalizers of arrays call `free` at any moment, also in the middle of another method: loops over what `free` changes
    are loops over copies.
    """

    def __init__(self, nbytes: int = 1 << 20):
        self.memory = Memory(nbytes)
        self.sizes: dict[int, int] = {}  # of allocations, by address
        self.freed: dict[int, int] = {}  # sizes of freed allocations that were not reused
        self.quarantine: deque[int] = deque()
        self.end = BASE + ALIGNMENT
        self.variables: dict[str, int] = {}
        self.last: Launch | None = None  # the latest launch

    def alloc(self, nbytes: int) -> int:
        """The address of new memory, which must be written before it is read."""
        room = _room(nbytes)
        idle = tuple(self.quarantine)
        if sum(_room(self.freed[a]) for a in idle) > QUARANTINE:
            address = next((a for a in idle if _room(self.freed[a]) == room), None)
            if address is not None:
                self.quarantine.remove(address)
                del self.freed[address]
                return self._place(address, nbytes)
        address, self.end = self.end, self.end + room
        while self.end - BASE > self.memory.data.size:
            bigger = Memory(2 * self.memory.data.size)
            bigger.data[: self.memory.data.size] = self.memory.data
            bigger.state[: self.memory.data.size] = self.memory.state
            self.memory = bigger
        return self._place(address, nbytes)

    def _place(self, address: int, nbytes: int) -> int:
        self.sizes[address] = nbytes
        self.memory.state[address - BASE : address - BASE + nbytes] = ALLOCATED
        return address

    def free(self, address: int) -> None:
        """Free an allocation; later accesses are errors."""
        if address not in self.sizes:
            again = " a second time" if address in self.freed else ""
            raise PTXError(f"address {self.describe(address)} is freed{again}, but no allocation begins there")
        nbytes = self.sizes.pop(address)
        self.freed[address] = nbytes
        self.quarantine.append(address)
        self.memory.state[address - BASE : address - BASE + nbytes] = 0
        self.memory.data[address - BASE : address - BASE + nbytes] = 0xFF

    def write(self, address: int, values: np.ndarray) -> None:
        """Copy an array to the device."""
        raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        first = self._inside(address, raw.size)
        self.memory.store(np.arange(first, first + raw.size), raw)

    def read(self, address: int, shape: Sequence[int], dtype: np.dtype | type | str) -> np.ndarray:
        """Copy from the device; bytes that were never written are 0xFF."""
        dtype = np.dtype(dtype)
        nbytes = int(np.prod(shape, dtype=int)) * dtype.itemsize
        first = self._inside(address, nbytes)
        return self.memory.data[first : first + nbytes].copy().view(dtype).reshape(shape)

    def _inside(self, address: int, nbytes: int) -> int:
        first = address - BASE
        if first < 0 or not (self.memory.state[first : first + nbytes] & ALLOCATED).all():
            raise OutOfBounds(f"a copy of {nbytes} bytes at address {self.describe(address)}")
        return first

    def describe(self, address: int) -> str:
        """An address, and the allocation at or before it."""
        allocated, freed = self.sizes.copy(), self.freed.copy()
        known = [(a, n, "the") for a, n in allocated.items()] + [(a, n, "the freed") for a, n in freed.items()]
        start, nbytes, which = max((k for k in known if k[0] <= address), default=(0, 0, ""))
        if not which:
            return f"0x{address:x}, before every allocation,"
        return f"0x{address:x}, byte {address - start} of {which} allocation of {nbytes} bytes at 0x{start:x}"

    def launch(
        self,
        ptx: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        args: Sequence[object],
        dynamic_shared: int = 0,
        name: str | None = None,
        watch: Watch | None = None,
    ) -> Report:
        """Execute a kernel of a PTX module on a grid of blocks of threads.

        args are scalars in the order of the kernel's parameters, arrays expanded by `array_argument`. name is required
        if the module has several kernels. watch is called before every instruction with the machine, the number of the
        instruction and the lanes that execute it.
        """
        kernels = parse(ptx)
        if name is None and len(kernels) != 1:
            raise PTXError(f"the module has the kernels {sorted(kernels)}: name one")
        kernel = next(iter(kernels.values())) if name is None else kernels[name]
        for variable in kernel.variables:
            if variable.name not in self.variables:
                self._load_variable(variable)
        self.last = Launch(self, kernel, _triple(grid), _triple(block), args, dynamic_shared, watch)
        return self.last.run()

    def _load_variable(self, variable: Variable) -> None:
        address = self.variables[variable.name] = self.alloc(variable.nbytes)
        dtype = DTYPES[variable.type]
        values = [int(v.rstrip("U"), 0) & ((1 << 8 * dtype.itemsize) - 1) for v in variable.data]
        self.write(address, np.array(values + [0] * (variable.length - len(values)), f"u{dtype.itemsize}"))


@dataclass
class Launch:
    """One kernel on one grid."""

    device: Device
    kernel: Kernel
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    args: Sequence[object]
    dynamic_shared: int
    watch: Watch | None
    report: Report = field(default_factory=Report)

    def __post_init__(self) -> None:
        kernel, threads = self.kernel, int(np.prod(self.block))
        if not 0 < threads <= 1024 or min(self.grid) < 1 or max(self.grid[1:]) > 65535:
            raise PTXError(
                f"kernel {demangle(kernel.name)}: a grid of {self.grid} blocks of {self.block} threads is impossible"
            )
        if kernel.shared_bytes + self.dynamic_shared > SHARED_LIMIT:
            raise PTXError(
                f"kernel {demangle(kernel.name)}: {kernel.shared_bytes} + {self.dynamic_shared} bytes of shared memory "
                f"are more than the {SHARED_LIMIT} that a block may have"
            )
        if len(self.args) != len(kernel.parameters):
            raise PTXError(
                f"kernel {demangle(kernel.name)}: {len(self.args)} arguments for {len(kernel.parameters)} parameters"
            )
        self.parameters = {
            name: _parameter(value, kind) for (name, kind), value in zip(kernel.parameters, self.args, strict=True)
        }
        self.memory, self.variables = self.device.memory, self.device.variables
        self.shift = (max(32, threads) - 1).bit_length()
        self.granules = {space: _granule(kernel, space) for space in ("global", "shared")}
        self.shadow = Shadow(self.device.end - BASE, self.granules["global"], self.shift)
        self.masks = {pc: m for pc, i in enumerate(kernel.instructions) if (m := warp_mask(i)) is not None}

    def run(self) -> Report:
        blocks, padded = int(np.prod(self.grid)), -(-int(np.prod(self.block)) // 32) * 32
        at_once = max(1, LANES // padded)
        for first in range(0, blocks, at_once):
            Machine(self, first, min(at_once, blocks - first)).run()
        return self.report

    def touched(self) -> dict[int, tuple[int, int]]:
        """Numbers of distinct bytes read and written, for each allocation by address."""
        found = {}
        for address, nbytes in self.device.sizes.copy().items():
            part = slice((address - BASE) // self.shadow.granule, (address - BASE + nbytes) // self.shadow.granule)
            counts = (np.count_nonzero(who[part]) for who in (self.shadow.reader, self.shadow.writer))
            read, written = (self.shadow.granule * int(n) for n in counts)
            if read or written:
                found[address] = read, written
        return found

    def describe(self, space: str, address: int, kernel: Kernel) -> str:
        """An address, and the allocation or variable at or before it."""
        if space in ("global", "const"):
            return self.device.describe(address)
        if space == "shared":
            regions = [(o, n, name) for name, (o, n) in kernel.shared.items()]
            regions += [(kernel.dynamic, self.dynamic_shared, "dynamic")] if self.dynamic_shared else []
            start, nbytes, name = max((r for r in regions if r[0] <= address), default=(0, 0, "no"))
            return f"{address - start} of {name} shared memory ({nbytes} bytes)"
        return f"{address} of {space} memory"


def _room(nbytes: int) -> int:
    """The bytes of an allocation with its guard zone."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT + ALIGNMENT


def _triple(n: int | Sequence[int]) -> tuple[int, int, int]:
    return (*((int(n),) if np.isscalar(n) else (int(k) for k in n)), 1, 1, 1)[:3]


def _parameter(value: object, kind: str) -> np.generic:
    """An argument as the bits of the parameter's type."""
    dtype = DTYPES[kind]
    if isinstance(value, np.generic) and value.dtype.itemsize == dtype.itemsize and value.dtype != bool:
        return value.view(f"u{dtype.itemsize}")
    if dtype.kind == "f":
        return dtype.type(value).view(f"u{dtype.itemsize}")
    return np.dtype(f"u{dtype.itemsize}").type(int(value) & ((1 << 8 * dtype.itemsize) - 1))


def _granule(kernel: Kernel, space: str) -> int:
    """Bytes of the smallest access to a space: the resolution of the race detector."""
    widths = [16]
    for i in kernel.instructions:
        if i.opcode in ("ld", "st", "atom", "red", "ldu") and {space} & set(i.modifiers) | {space} - set(i.modifiers):
            vector = next((int(m[1]) for m in i.modifiers if m in ("v2", "v4", "v8")), 1)
            widths.append(vector * DTYPES[i.type].itemsize)
    return min(widths)
