"""The GPU of this machine, through the driver's own interface (package `cuda-bindings`)."""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinygrad_bn_kernels.cuda.launch import current_stream

Array = NDArray[Any]

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


def _initialised(api: Any) -> Any:
    try:
        return api.cuInit(0)
    except (RuntimeError, ImportError, OSError) as error:  # of who looks for the library, in words about itself
        raise RuntimeError("no NVIDIA driver was found (libcuda)") from error


def _linked(ptx: str, cc: tuple[int, int]) -> bytes:
    """Machine code of a program, which a driver takes also from a newer compiler of the same major version."""
    from cuda.core import Linker, LinkerOptions, ObjectCode

    options = LinkerOptions(arch=f"sm_{cc[0]}{cc[1]}")
    return bytes(Linker(ObjectCode.from_ptx(ptx.encode()), options=options).link("cubin").code)


class Device:
    """The first device, its memory, and programs that run on it. All is done in the order of the current stream."""

    def __init__(self) -> None:
        self._api = api = _bindings()
        try:
            _checked(_initialised(api))
            if not _checked(api.cuDeviceGetCount()):
                raise RuntimeError("CUDA: no device")
        except RuntimeError as error:
            raise RuntimeError(f'there is no device "cuda" here: {error}; tensors live on "cpu"') from error
        device = _checked(api.cuDeviceGet(0))
        self._context = _checked(api.cuDevicePrimaryCtxRetain(device))
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

    def _answer(self, function: str, *args: Any) -> Any:
        """What the driver answers. The thread's context is the device's for the time of the call.

        It is the primary one, which PyTorch and CuPy use too; where they have chosen another device, that stays theirs.
        """
        api, ask = self._api, getattr(self._api, function)
        current = int(_checked(api.cuCtxGetCurrent()))
        if current == int(self._context):
            return ask(*args)
        _checked(api.cuCtxPushCurrent(self._context))
        try:
            return ask(*args)
        finally:
            if current:  # a thread without a context keeps this one
                _checked(api.cuCtxPopCurrent())

    def _do(self, function: str, *args: Any) -> Any:
        return _checked(self._answer(function, *args))

    def alloc(self, nbytes: int) -> int:
        """The address of new memory, aligned to 256 bytes. Raises MemoryError where there is none."""
        return int(self._do("cuMemAllocAsync", max(nbytes, 1), current_stream()))

    def free(self, pointer: int) -> None:
        """Give memory back, once all that was asked for before is done."""
        self._do("cuMemFreeAsync", pointer, current_stream())

    def write(self, pointer: int, array: Array) -> None:
        """Copy a contiguous array to the device, which has it when this returns."""
        self._do("cuMemcpyHtoDAsync", pointer, array.ctypes.data, array.nbytes, current_stream())
        self._do("cuStreamSynchronize", current_stream())

    def read(self, pointer: int, nbytes: int) -> Array:
        """Bytes of the device, as uint8; waits for what was launched before."""
        out = np.empty(nbytes, np.uint8)
        self._do("cuMemcpyDtoHAsync", out.ctypes.data, pointer, nbytes, current_stream())
        self._do("cuStreamSynchronize", current_stream())
        return out

    def copy(self, to: int, source: int, nbytes: int) -> None:
        """Copy from one place of the device to another."""
        self._do("cuMemcpyDtoDAsync", to, source, nbytes, current_stream())

    def order(self, first: int, then: int) -> None:
        """Let the stream `then` wait, with what it is asked from now on, for what `first` was asked until now."""
        event = self._do("cuEventCreate", self._api.CUevent_flags.CU_EVENT_DISABLE_TIMING)
        self._do("cuEventRecord", event, first)
        self._do("cuStreamWaitEvent", then, event, 0)
        self._do("cuEventDestroy", event)

    def _load(self, ptx: str, name: str, args: list[Any]) -> tuple[Any, struct.Struct]:
        """The program on the device, and how its arguments lie in slots of 8 bytes."""
        answer = self._answer("cuModuleLoadData", ptx.encode() + b"\0")
        if answer[0] == self._api.CUresult.CUDA_ERROR_UNSUPPORTED_PTX_VERSION:  # the compiler is newer than the driver
            answer = self._answer("cuModuleLoadData", _linked(ptx, self.cc))
        function = self._do("cuModuleGetFunction", _checked(answer), name.encode())
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
        self._do("cuLaunchKernel", function, *sizes, 0, current_stream(), addresses.ctypes.data, 0)

    def synchronize(self) -> None:
        """Wait for all that was launched."""
        self._do("cuCtxSynchronize")
