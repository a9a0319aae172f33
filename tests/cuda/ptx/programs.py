"""The CUDA programs of the project: compiled, and run by the interpreter instead of a GPU."""

import re
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import numpy as np

from tests.cuda.ptx.compile import offline
from tests.cuda.ptx.interpreter import Device, Report

SPECIAL = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, -1.0, 1.0], np.float32)
Edit = Callable[[str, str], str]  # (name of a program, its PTX) to PTX


@cache
def programs() -> dict[str, Any]:
    """Every program, by name."""
    from tinygrad_bn_kernels import cuda

    for module in iter_modules(cuda.__path__, "tinygrad_bn_kernels.cuda."):
        import_module(module.name)
    return dict(cuda.launch.PROGRAMS)


@cache
def ptx_for(program: Any, cc: tuple[int, int], kind: str = "f4") -> str:
    """A program's PTX for its first signature; `kind` "f8" replaces float32 by float64.

    sm_80 and sm_90 have the PTX of sm_75 with another target.
    """
    generation = (7, 5) if cc < (10, 0) else (10, 0)
    signature = tuple(word.replace("f4", kind) for word in program.signatures[0])
    with offline(generation):
        ptx = program.ptx(signature, generation)
    return re.sub(r"\.target sm_\d+", f".target sm_{cc[0]}{cc[1]}", ptx)


class Interpreted(Device):
    """The interpreter as a driver. `launches` has the name and the report of each launch."""

    cc, processors, name = (7, 5), 2, "PTX interpreter"

    def __init__(self, edit: Edit | None = None):
        super().__init__()
        self.edit = edit
        self.launches: list[tuple[str, Report]] = []
        self._names: dict[str, str] = {}  # of programs, by their PTX

    def read(self, pointer: int, nbytes: int) -> np.ndarray:  # type: ignore[override]
        return super().read(pointer, (nbytes,), np.uint8)

    def copy(self, to: int, source: int, nbytes: int) -> None:
        self.write(to, self.read(source, nbytes))

    def launch(self, ptx: str, name: str, grid: Any, block: Any, args: list[Any]) -> None:  # type: ignore[override]
        program = self._program(ptx)
        text = ptx if self.edit is None else self.edit(program, ptx)
        self.launches.append((program, super().launch(text, grid, block, args, name=name)))

    def order(self, first: int, then: int) -> None:
        pass  # launches are synchronous

    def synchronize(self) -> None:
        pass

    def _program(self, ptx: str) -> str:
        if ptx not in self._names:
            for program in programs().values():
                self._names |= {text: program.name for text, _ in program._compiled.values()}
        return self._names[ptx]


@contextmanager
def interpreted(device: Interpreted | None = None):
    """In this block programs run on `device`, or on a new interpreter."""
    from tinygrad_bn_kernels.cuda import launch

    with offline(Interpreted.cc), launch.using(device or Interpreted()) as used:
        yield used


def run(name: str, *operands: Any, **params: Any) -> Any:
    """Run the CUDA kernel `name` on NumPy arrays and numbers; the results are NumPy arrays."""
    from tinygrad_bn_kernels import lookup

    return to_host(lookup(name, "cuda")(*map(to_device, operands), **{k: to_device(v) for k, v in params.items()}))


def to_device(value: Any) -> Any:
    """A NumPy array as a device array; other values unchanged."""
    from tinygrad_bn_kernels.cuda.array import DeviceArray

    return DeviceArray.from_numpy(value) if isinstance(value, np.ndarray) else value


def to_host(value: Any) -> Any:
    """Device arrays, also in tuples, as NumPy arrays."""
    if isinstance(value, tuple | list):
        return tuple(map(to_host, value))
    return value.numpy() if hasattr(value, "numpy") else value


def computed(name: str, *operands: Any) -> np.ndarray:
    """Apply an elementwise function on the device."""
    from tinygrad_bn_kernels.cuda import maps, scalars

    result = bool if name in scalars.TRUTH else np.float32
    return to_host(maps.run(name, *map(to_device, operands), dtype=np.dtype(np.float32), result=result))


def unaligned(x: np.ndarray) -> Any:
    """A device array whose address is not a multiple of 16 bytes."""
    held = to_device(np.concatenate([x[:1], x]))
    return held.view(x.shape, 1)


def numbers(shape: Any, kind: str = "plain", seed: int = 0) -> np.ndarray:
    """Random float32: N(0, 1), N(1000, 1) for "offset", or a quarter special values for "special"."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape).astype(np.float32)
    if kind == "offset":
        return x + np.float32(1e3)
    if kind == "special":
        return np.where(rng.random(shape) < 0.25, rng.choice(SPECIAL, shape), x).astype(np.float32)
    return x
