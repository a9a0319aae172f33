"""Compiling programs and launching them: which grid, which arguments, and the driver that does it.

A *program* is a function that every thread of a grid runs. It is compiled to PTX here, and the PTX is what the driver
gets: on a machine with a GPU that of `driver.py`, in the tests an interpreter, so that both run the same artefact.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

# The types of numbers that are arguments, as signatures have them.
NUMBERS: dict[type, str] = {
    t: np.dtype(t).str[1:]
    for t in (np.bool_, np.uint8, np.int32, np.int64, np.uint32, np.uint64, np.float32, np.float64)
}

Array = NDArray[Any]
Signature = tuple[str, ...]

# Arrays have fewer elements than this, so that an index fits in 32 bits: those of 64 cost twice the registers.
LARGEST = 1 << 31


class Driver(Protocol):
    """What is needed of a device."""

    cc: tuple[int, int]  # compute capability
    processors: int  # how many multiprocessors it has

    def alloc(self, nbytes: int) -> int: ...
    def free(self, pointer: int) -> None: ...
    def write(self, pointer: int, array: Array) -> None: ...
    def read(self, pointer: int, nbytes: int) -> Any: ...
    def copy(self, to: int, source: int, nbytes: int) -> None: ...
    def order(self, first: int, then: int) -> None: ...
    def launch(self, ptx: str, name: str, grid: tuple[int, ...], block: tuple[int, ...], args: list[Any]) -> None: ...
    def synchronize(self) -> None: ...


# ---- programs --------------------------------------------------------------------------------------------

PROGRAMS: dict[str, Program] = {}


@dataclass(eq=False)
class Program:
    """A function that every thread of a grid runs, and what the tests hold it to.

    `build(kind)` gives the function for arrays of that type, which is the first argument's: constants in it are written
    `kind(0)`, as a bare literal would be a float64.
    """

    name: str
    build: Callable[[Any], Callable[..., None]]
    signatures: tuple[Signature, ...]  # for which the tests compile it
    block: tuple[int, ...]  # threads of a block that it is launched with
    registers: int = 40  # of a thread, at most: in float32 the assembler is told so; in float64 half as many again
    shared: int = 0  # bytes of shared memory, in float32
    shuffles: int = 0  # warp shuffles in its code
    vector: bool = False  # whether it moves 128 bits at a time
    _compiled: dict[tuple[Signature, tuple[int, int]], tuple[str, str]] = field(default_factory=dict)

    def ptx(self, signature: Signature, cc: tuple[int, int]) -> str:
        """Its PTX for these types of arguments and this compute capability."""
        return self.compiled(signature, cc)[0]

    def compiled(self, signature: Signature, cc: tuple[int, int]) -> tuple[str, str]:
        """Its PTX, and the name of the entry in it."""
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
    """Register the decorated function, `kind -> program`, under `name`; see `Program`.

    A signature is written `"f4* f4* u4"`: two arrays of float32 and a uint32.
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
    """Where PTX is kept between runs, under a name that all sources here give; None where nothing can be written."""
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
    except (OSError, RuntimeError):  # also: there is no home
        return None
    return folder


def _cached_ptx(program: Program, signature: Signature, cc: tuple[int, int]) -> str:
    from tinygrad_bn_kernels.cuda import shim

    folder = _cache_folder()
    words = "_".join((program.name, *signature, f"sm{cc[0]}{cc[1]}")).replace("*", "s")
    path = folder / f"{words}.ptx" if folder else None
    if path and path.exists() and ".entry" in (kept := path.read_text()):
        return kept
    ptx = shim.compile_ptx(program.build(shim.TYPES[signature[0].removesuffix("*")]), signature, cc)
    if not any(kind.startswith("f8") for kind in signature):  # whose numbers take two registers each
        before, entry, rest = ptx.partition(".entry")
        ptx = before + entry + re.sub(r"\)\s*\{", f")\n.maxnreg {program.registers}\n{{", rest, count=1)
    if path:
        temporary = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        with suppress(OSError):  # a full disk costs a compilation in the next process, and no more
            temporary.write_text(ptx)
            temporary.replace(path)  # at once: another process may be reading
    return ptx


# ---- the driver ------------------------------------------------------------------------------------------

_driver: Driver | None = None
_process: int | None = None  # that the driver was started in


def installed() -> Driver | None:
    """The device, if one is in use already."""
    return _driver


def driver() -> Driver:
    """The device that everything runs on. Raises RuntimeError, with the reason, where there is none."""
    global _driver
    global _process
    if _driver is None:
        from tinygrad_bn_kernels.cuda.driver import Device

        _driver, _process = Device(), os.getpid()
    elif _process not in (None, os.getpid()):
        raise RuntimeError("CUDA cannot be used after a fork; start processes by spawning them")
    return _driver


@contextmanager
def using(device: Driver) -> Iterator[Driver]:
    """In this block programs run on `device`; the arrays that are made here are not to be used outside."""
    global _driver
    before, _driver = _driver, device
    try:
        yield device
    finally:
        _driver = before


# ---- streams ---------------------------------------------------------------------------------------------

_stream: ContextVar[int] = ContextVar("stream", default=0)


def current_stream() -> int:
    """The handle of the stream that this thread works on: 0, the default one, unless `on_stream` says otherwise."""
    return _stream.get()


def order(first: int, then: int) -> None:
    """Let the stream `then` wait for what the stream `first` was asked until now."""
    if first != then:
        driver().order(first, then)


@contextmanager
def on_stream(handle: int) -> Iterator[None]:
    """In this block all is asked of this stream.

    It comes after what was asked before the block, and what is asked after the block waits for it. So the order is the
    program's whatever the streams, and memory that is freed in one of them can be given out in another.
    """
    before = current_stream()
    order(before, handle)
    token = _stream.set(handle)
    try:
        yield
    finally:
        try:
            order(handle, before)  # still on this stream: what is freed by then may be in use there
        finally:
            _stream.reset(token)


# ---- launching -------------------------------------------------------------------------------------------


def blocks(work: int, each: int = 256) -> int:
    """How many blocks for `work` items, `each` items a block: enough to fill the device a few times, no more.

    A program walks what is left in steps of the whole grid, so that the cost of starting blocks is bounded.
    """
    return max(1, min(-(-work // each), 8 * driver().processors))


def launch(program: Program, grid: int | tuple[int, ...], *args: Any, block: tuple[int, ...] | None = None) -> None:
    """Run a program. Arguments are device arrays and NumPy scalars, whose types choose the compiled code.

    `block` is another shape of the program's own, of as many threads.
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
        raise ValueError(f"{program.name}: a grid of {grid} blocks is more than a launch can have")
    device.launch(ptx, name, (grid,) if isinstance(grid, int) else grid, block or program.block, flat)


def u4(*numbers: int) -> Sequence[np.uint32]:
    """Numbers as arguments of 32 bits; negative ones wrap around, and so do sums of them with indices."""
    return [np.uint32(n & 0xFFFFFFFF) for n in numbers]
