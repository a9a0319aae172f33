"""The GPU of this machine, through the driver's own interface (package `cuda-bindings`)."""

from __future__ import annotations

import ctypes
import struct
import threading
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

STREAM = 0  # the default one, which other libraries work on too: so what they and we do comes in order

# How a number is laid out in 8 bytes, for `struct`.
_SLOTS: dict[type, str] = {
    int: "Q", np.uint64: "Q", np.int64: "q", np.float64: "d", np.float32: "f4x", np.uint32: "I4x", np.int32: "i4x",
    np.uint8: "B7x", np.bool_: "?7x",
}  # fmt: skip


def _bindings() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise RuntimeError('device "cuda" needs cuda-bindings: pip install "tinygrad-bn[cuda]"') from error
    return driver


def _checked(answer: Any) -> Any:
    """What a call of the driver gave. Raises RuntimeError with the driver's words, MemoryError where there is none."""
    code, *values = answer
    if int(code) != 0:
        api = _bindings()
        if code == api.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise MemoryError("the memory of the CUDA device is full")
        name = api.cuGetErrorName(code)[1]
        raise RuntimeError(f"CUDA: {name.decode() if isinstance(name, bytes) else code}")
    return values[0] if len(values) == 1 else values


def _linked(ptx: str, cc: tuple[int, int]) -> bytes:
    """Machine code of a program, which a driver takes also from a newer compiler of the same major version."""
    from cuda.core import Linker, LinkerOptions, ObjectCode

    options = LinkerOptions(arch=f"sm_{cc[0]}{cc[1]}")
    return bytes(Linker(ObjectCode.from_ptx(ptx.encode()), options=options).link("cubin").code)


class Device:
    """The first device, its memory, and programs that run on it."""

    def __init__(self) -> None:
        self._api = api = _bindings()
        try:
            _checked(api.cuInit(0))
            if not _checked(api.cuDeviceGetCount()):
                raise RuntimeError("CUDA: no device")
        except (RuntimeError, ImportError, OSError) as error:
            raise RuntimeError(f'there is no device "cuda" here ({error}); tensors live on "cpu"') from error
        device = _checked(api.cuDeviceGet(0))
        context = _checked(api.cuDevicePrimaryCtxRetain(device))
        _checked(api.cuCtxSetCurrent(context))
        self.name = _checked(api.cuDeviceGetName(256, device)).split(b"\0")[0].decode()
        attribute = api.CUdevice_attribute
        major, minor, self.processors = (
            int(_checked(api.cuDeviceGetAttribute(which, device)))
            for which in (
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
                attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
            )
        )
        self.cc = major, minor
        # Freed memory stays in the driver's pool, to be given out again without asking the system.
        pool = _checked(api.cuDeviceGetDefaultMemPool(device))
        keep = api.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD
        _checked(api.cuMemPoolSetAttribute(pool, keep, api.cuuint64_t(2**64 - 1)))
        self._functions: dict[str, tuple[Any, struct.Struct]] = {}
        self._context, self._thread = context, threading.local()

    @property
    def _driver(self) -> Any:
        """The driver, with the device as the current one of this thread."""
        if not hasattr(self._thread, "entered"):
            _checked(self._api.cuCtxSetCurrent(self._context))
            self._thread.entered = True
        return self._api

    def alloc(self, nbytes: int) -> int:
        """The address of new memory, aligned to 256 bytes. Raises MemoryError where there is none."""
        return int(_checked(self._driver.cuMemAllocAsync(max(nbytes, 1), STREAM)))

    def free(self, pointer: int) -> None:
        """Give memory back, once all that was launched before is done."""
        with suppress(Exception):  # at the end of the process there may be no context
            self._driver.cuMemFreeAsync(pointer, STREAM)

    def write(self, pointer: int, array: Array) -> None:
        """Copy a contiguous array to the device."""
        _checked(self._driver.cuMemcpyHtoD(pointer, array.ctypes.data, array.nbytes))

    def read(self, pointer: int, nbytes: int) -> Array:
        """Bytes of the device, as uint8; waits for what was launched before."""
        out = np.empty(nbytes, np.uint8)
        _checked(self._driver.cuMemcpyDtoH(out.ctypes.data, pointer, nbytes))
        return out

    def copy(self, to: int, source: int, nbytes: int) -> None:
        """Copy from one place of the device to another."""
        _checked(self._driver.cuMemcpyDtoDAsync(to, source, nbytes, STREAM))

    def _load(self, ptx: str, name: str, args: list[Any]) -> tuple[Any, struct.Struct]:
        """The program on the device, and how its arguments lie in slots of 8 bytes."""
        answer = self._driver.cuModuleLoadData(ptx.encode() + b"\0")
        if answer[0] == self._api.CUresult.CUDA_ERROR_UNSUPPORTED_PTX_VERSION:  # the compiler is newer than the driver
            answer = self._driver.cuModuleLoadData(_linked(ptx, self.cc))
        module = _checked(answer)
        function = _checked(self._driver.cuModuleGetFunction(module, name.encode()))
        found = function, struct.Struct("<" + "".join(_SLOTS[type(a)] for a in args))
        self._functions[ptx] = found
        return found

    def launch(self, ptx: str, name: str, grid: tuple[int, ...], block: tuple[int, ...], args: list[Any]) -> None:
        """Run a program; `args` are NumPy scalars, or integers of 64 bits, one for each parameter of the entry."""
        function, layout = self._functions.get(ptx) or self._load(ptx, name, args)
        # The driver wants the address of each argument.
        held = ctypes.create_string_buffer(layout.pack(*args))
        start = ctypes.addressof(held)
        addresses = np.arange(start, start + layout.size, 8, dtype=np.uint64)
        sizes = [*grid, *(1,) * (3 - len(grid)), *block, *(1,) * (3 - len(block))]
        _checked(self._driver.cuLaunchKernel(function, *sizes, 0, STREAM, addresses.ctypes.data, 0))

    def synchronize(self) -> None:
        """Wait for all that was launched."""
        _checked(self._driver.cuCtxSynchronize())
