"""The programs for cuda that the project ships: compiled, and run by the interpreter in place of a GPU."""

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
Edit = Callable[[str, str], str]  # of a program's name and its PTX


@cache
def programs() -> dict[str, Any]:
    """Every declared program, by name."""
    from tinygrad_bn_kernels import cuda

    for module in iter_modules(cuda.__path__, "tinygrad_bn_kernels.cuda."):
        import_module(module.name)
    return dict(cuda.launch.PROGRAMS)


@cache
def ptx_for(program: Any, cc: tuple[int, int], kind: str = "f4") -> str:
    """A program's PTX for its first signature, with float64 for float32 if `kind` is "f8".

    For sm_80 and sm_90 it is that for sm_75, but for the target's name.
    """
    generation = (7, 5) if cc < (10, 0) else (10, 0)
    signature = tuple(word.replace("f4", kind) for word in program.signatures[0])
    with offline(generation):
        ptx = program.ptx(signature, generation)
    return re.sub(r"\.target sm_\d+", f".target sm_{cc[0]}{cc[1]}", ptx)


class Interpreted(Device):
    """The interpreter as the driver that programs are launched with. `launches` tells which ran, and what they did."""

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
        pass  # all is done at once

    def synchronize(self) -> None:
        pass

    def _program(self, ptx: str) -> str:
        if ptx not in self._names:
            for program in programs().values():
                self._names |= {text: program.name for text, _ in program._compiled.values()}
        return self._names[ptx]


@contextmanager
def interpreted(device: Interpreted | None = None):
    """In this block what is launched runs on the device that is given, or on a new one."""
    from tinygrad_bn_kernels.cuda import launch

    with offline(Interpreted.cc), launch.using(device or Interpreted()) as used:
        yield used


def run(name: str, *operands: Any, **params: Any) -> Any:
    """What the kernel `name` of cuda gives for NumPy arrays and numbers, as NumPy arrays."""
    from tinygrad_bn_kernels import lookup

    return to_host(lookup(name, "cuda")(*map(to_device, operands), **{k: to_device(v) for k, v in params.items()}))


def to_device(value: Any) -> Any:
    """A NumPy array on the device; anything else as it is."""
    from tinygrad_bn_kernels.cuda.array import DeviceArray

    return DeviceArray.from_numpy(value) if isinstance(value, np.ndarray) else value


def to_host(value: Any) -> Any:
    """Arrays of the device, also in tuples, as NumPy arrays."""
    if isinstance(value, tuple | list):
        return tuple(map(to_host, value))
    return value.numpy() if hasattr(value, "numpy") else value


def computed(name: str, *operands: Any) -> np.ndarray:
    """An elementwise function on the device."""
    from tinygrad_bn_kernels.cuda import maps

    result = bool if name in maps.TRUTH else np.float32
    return to_host(maps.run(name, *map(to_device, operands), dtype=np.dtype(np.float32), result=result))


def unaligned(x: np.ndarray) -> Any:
    """An array of the device whose address is no multiple of 16 bytes."""
    held = to_device(np.concatenate([x[:1], x]))
    return held.view(x.shape, 1)


def numbers(shape: Any, kind: str = "plain", seed: int = 0) -> np.ndarray:
    """float32: N(0, 1); the same around 1000; or with special values in a quarter of the places."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape).astype(np.float32)
    if kind == "offset":
        return x + np.float32(1e3)
    if kind == "special":
        return np.where(rng.random(shape) < 0.25, rng.choice(SPECIAL, shape), x).astype(np.float32)
    return x
