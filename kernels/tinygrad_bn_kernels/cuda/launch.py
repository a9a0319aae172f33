"""Compiling programs to PTX, and launching them on a device.

A *program* is a function that every thread of a grid runs. The device gets its PTX: the GPU through `driver.py`, or the
interpreter of the tests. Both run the same PTX.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from tinygrad_bn_kernels.cuda.driver import Device, Driver

# Type codes of scalar arguments, as in signatures.
NUMBERS: dict[type, str] = {
    t: np.dtype(t).str[1:]
    for t in (np.bool_, np.uint8, np.int32, np.int64, np.uint32, np.uint64, np.float32, np.float64)
}

Signature = tuple[str, ...]

# Arrays have fewer elements than this: indices then fit in 32 bits, which take half the registers of 64.
LARGEST = 1 << 31


# ---- programs --------------------------------------------------------------------------------------------

PROGRAMS: dict[str, Program] = {}


@dataclass(eq=False)
class Program:
    """A function that every thread of a grid runs, and the limits that the tests check.

    `build(T)` returns the function for the type T of the first argument. Constants in it are written `T(0)`: a bare
    literal would make the arithmetic float64.
    """

    name: str
    build: Callable[[Any], Callable[..., None]]
    signatures: tuple[Signature, ...]  # that the tests compile
    block: tuple[int, ...]  # threads of a block
    registers: int = 40  # limit for a thread: in float32 passed to the assembler, in float64 half as many again
    shared: int = 0  # bytes of shared memory, in float32
    shuffles: int = 0  # warp shuffle instructions
    vector: bool = False  # whether it uses 128-bit accesses
    _compiled: dict[tuple[Signature, tuple[int, int]], tuple[str, str]] = field(default_factory=dict)

    def ptx(self, signature: Signature, cc: tuple[int, int]) -> str:
        """The PTX for these argument types and this compute capability."""
        return self.compiled(signature, cc)[0]

    def compiled(self, signature: Signature, cc: tuple[int, int]) -> tuple[str, str]:
        """The PTX, and the name of its entry."""
        found = self._compiled.get((signature, cc))
        if found is None:
            ptx = _cached_ptx(self, signature, cc)
            entry = re.search(r"\.entry\s+([\w$]+)", ptx)
            assert entry is not None
            found = self._compiled[signature, cc] = ptx, entry[1]
        return found


def program(
    name: str,
    *signatures: str,
    block: int | tuple[int, ...] = 256,
    registers: int = 40,
    shared: int = 0,
    shuffles: int = 0,
    vector: bool = False,
) -> Callable[[Callable[[Any], Callable[..., None]]], Program]:
    """Register the decorated function, `build` of `Program`, under `name`.

    A signature such as `"f4* f4* u4"` is two arrays of float32 and a uint32.
    """

    def register(build: Callable[[Any], Callable[..., None]]) -> Program:
        assert name not in PROGRAMS, name
        split = tuple(tuple(s.split()) for s in signatures)
        threads = (block,) if isinstance(block, int) else block
        PROGRAMS[name] = Program(name, build, split, threads, registers, shared, shuffles, vector)
        return PROGRAMS[name]

    return register


@cache
def _cache_folder() -> Path | None:
    """The folder that keeps PTX between runs, named by a hash of all sources here; None if it cannot be written."""
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    try:
        versions = metadata.version("numba-cuda") + metadata.version("numba")
    except metadata.PackageNotFoundError:
        return None
    base = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME")
    try:
        root = Path(base or Path.home() / (".cache" if os.name == "posix" else "AppData/Local"))
        folder = root / "tinygrad_bn" / ("ptx-" + hashlib.sha256(sources + versions.encode()).hexdigest()[:16])
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: no home directory
        return None
    return folder


def _checksum(ptx: str) -> str:
    return hashlib.sha256(ptx.encode()).hexdigest()


def _cached_ptx(program: Program, signature: Signature, cc: tuple[int, int]) -> str:
    from tinygrad_bn_kernels.cuda import shim

    folder = _cache_folder()
    file_name = "_".join((program.name, *signature, f"sm{cc[0]}{cc[1]}")).replace("*", "s")
    path = folder / f"{file_name}.ptx" if folder else None
    if path and path.exists():
        checksum, _, cached = path.read_text(errors="replace").partition("\n")
        if checksum == _checksum(cached):
            return cached
    ptx = shim.compile_ptx(program.build(shim.TYPES[signature[0].removesuffix("*")]), signature, cc)
    if not any(kind.startswith("f8") for kind in signature):  # a float64 takes two registers
        before, entry, rest = ptx.partition(".entry")
        ptx = before + entry + re.sub(r"\)\s*\{", f")\n.maxnreg {program.registers}\n{{", rest, count=1)
    if path:
        temporary = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        with suppress(OSError):  # on a full disk the next process compiles again
            temporary.write_text(f"{_checksum(ptx)}\n{ptx}")
            temporary.replace(path)  # atomic: another process may be reading
    return ptx


# ---- the device ------------------------------------------------------------------------------------------

_driver: Driver | None = None
_process: int | None = None  # the process that opened the device


def installed() -> Driver | None:
    """The device, if it is already open."""
    return _driver


def driver() -> Driver:
    """The device that programs run on, opened on first use. Raises RuntimeError with the reason if there is none."""
    global _driver
    global _process
    if _driver is None:
        _driver, _process = Device(), os.getpid()
    elif _process not in (None, os.getpid()):
        raise RuntimeError("CUDA cannot be used after a fork; start processes by spawning them")
    return _driver


@contextmanager
def using(device: Driver) -> Iterator[Driver]:
    """In this block programs run on `device`; do not use its arrays outside."""
    global _driver
    before, _driver = _driver, device
    try:
        yield device
    finally:
        _driver = before


# ---- launching -------------------------------------------------------------------------------------------


def blocks(work: int, each: int = 256) -> int:
    """The number of blocks for `work` items, `each` items a block; at most 8 for each multiprocessor.

    A program loops over the remaining items in steps of the whole grid, which bounds the cost of starting blocks.
    """
    return max(1, min(-(-work // each), 8 * driver().processors))


def launch(program: Program, grid: int | tuple[int, ...], *args: Any, block: tuple[int, ...] | None = None) -> None:
    """Launch a program. Arguments are device arrays and NumPy scalars; their types select the compiled code.

    `block` overrides the shape of the program's block, with the same number of threads.
    """
    device = driver()
    kinds, flat = [], []
    for a in args:
        kind = NUMBERS.get(type(a))
        if kind is not None:
            kinds.append(kind)
            flat.append(a)
        else:
            kinds.append(a.kind)
            flat += a.parameters
    ptx, name = program.compiled(tuple(kinds), device.cc)
    if not isinstance(grid, int) and max(grid[1:], default=1) > 65535:
        raise ValueError(f"{program.name}: a grid of {grid} blocks exceeds the limit of 65,535 in y and z")
    device.launch(ptx, name, (grid,) if isinstance(grid, int) else grid, block or program.block, flat)


def u4(*numbers: int) -> Sequence[np.uint32]:
    """Numbers as uint32 arguments. Negative ones wrap around, and so do sums with indices in a program."""
    return [np.uint32(n & 0xFFFFFFFF) for n in numbers]
