"""The GPU of this machine, through the CUDA driver API (package `cuda-bindings`)."""

from __future__ import annotations

import ctypes
import struct
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tinygrad_bn_kernels.cuda.streams import current_stream

Array = NDArray[Any]

# `struct` formats of kernel arguments, each padded to 8 bytes.
_FORMATS: dict[type, str] = {
    int: "Q", np.uint64: "Q", np.int64: "q", np.float64: "d", np.float32: "f4x", np.uint32: "I4x", np.int32: "i4x",
    np.uint8: "B7x", np.bool_: "?7x",
}  # fmt: skip


class Driver(Protocol):
    """A device: the GPU (`Device`), or the interpreter of the tests."""

    cc: tuple[int, int]  # compute capability
    processors: int  # number of multiprocessors

    def alloc(self, nbytes: int) -> int: ...
    def free(self, pointer: int) -> None: ...
    def write(self, pointer: int, array: Array) -> None: ...
    def read(self, pointer: int, nbytes: int) -> Any: ...
    def copy(self, to: int, source: int, nbytes: int) -> None: ...
    def order(self, first: int, then: int) -> None: ...
    def launch(self, ptx: str, name: str, grid: tuple[int, ...], block: tuple[int, ...], args: list[Any]) -> None: ...
    def synchronize(self) -> None: ...


def _bindings() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise RuntimeError('device "cuda" needs cuda-bindings: pip install "tinygrad-bn[cuda]"') from error
    return driver


def _checked(result: Any) -> Any:
    """The values of a driver call. Raises RuntimeError with the driver's error name, MemoryError if memory is full."""
    code, *values = result
    if int(code) != 0:
        api = _bindings()
        if code == api.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise MemoryError("the memory of the CUDA device is full")
        name = api.cuGetErrorName(code)[1]
        raise RuntimeError(f"CUDA: {name.decode() if isinstance(name, bytes) else code}")
    return values[0] if len(values) == 1 else values


def _initialise(api: Any) -> Any:
    try:
        return api.cuInit(0)
    except (RuntimeError, ImportError, OSError) as error:  # cuda-bindings did not find libcuda
        raise RuntimeError("no NVIDIA driver was found (libcuda)") from error


def _linked(ptx: str, cc: tuple[int, int]) -> bytes:
    """Machine code from PTX. A driver accepts it from a newer compiler of the same major version too."""
    from cuda.core import Linker, LinkerOptions, ObjectCode

    options = LinkerOptions(arch=f"sm_{cc[0]}{cc[1]}")
    return bytes(Linker(ObjectCode.from_ptx(ptx.encode()), options=options).link("cubin").code)


class Device:
    """The first GPU: its memory, and launches. All work is submitted to the current stream."""

    def __init__(self) -> None:
        self._api = api = _bindings()
        try:
            _checked(_initialise(api))
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
        # Never return freed memory from the driver's pool to the system: reusing it is cheaper.
        pool = _checked(api.cuDeviceGetDefaultMemPool(device))
        threshold = api.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD
        _checked(api.cuMemPoolSetAttribute(pool, threshold, api.cuuint64_t(2**64 - 1)))
        self._functions: dict[str, tuple[Any, struct.Struct]] = {}

    def _call(self, function: str, *args: Any) -> Any:
        """Call the driver with the device's primary context current, which PyTorch and CuPy use too.

        If another library has made another context current, it is restored after the call.
        """
        api, call = self._api, getattr(self._api, function)
        current = int(_checked(api.cuCtxGetCurrent()))
        if current == int(self._context):
            return call(*args)
        _checked(api.cuCtxPushCurrent(self._context))
        try:
            return call(*args)
        finally:
            if current:  # a thread that had no context keeps this one
                _checked(api.cuCtxPopCurrent())

    def _do(self, function: str, *args: Any) -> Any:
        return _checked(self._call(function, *args))

    def alloc(self, nbytes: int) -> int:
        """The address of new memory, aligned to 256 bytes. Raises MemoryError if memory is full."""
        return int(self._do("cuMemAllocAsync", max(nbytes, 1), current_stream()))

    def free(self, pointer: int) -> None:
        """Free memory, in the order of the current stream."""
        self._do("cuMemFreeAsync", pointer, current_stream())

    def write(self, pointer: int, array: Array) -> None:
        """Copy a contiguous array to the device; returns when the copy is done."""
        self._do("cuMemcpyHtoDAsync", pointer, array.ctypes.data, array.nbytes, current_stream())
        self._do("cuStreamSynchronize", current_stream())

    def read(self, pointer: int, nbytes: int) -> Array:
        """Copy bytes from the device, as uint8; waits for the current stream."""
        out = np.empty(nbytes, np.uint8)
        self._do("cuMemcpyDtoHAsync", out.ctypes.data, pointer, nbytes, current_stream())
        self._do("cuStreamSynchronize", current_stream())
        return out

    def copy(self, to: int, source: int, nbytes: int) -> None:
        """Copy within the device."""
        self._do("cuMemcpyDtoDAsync", to, source, nbytes, current_stream())

    def order(self, first: int, then: int) -> None:
        """Make stream `then` wait for all work submitted to stream `first` so far."""
        if first == then:
            return
        event = self._do("cuEventCreate", self._api.CUevent_flags.CU_EVENT_DISABLE_TIMING)
        self._do("cuEventRecord", event, first)
        self._do("cuStreamWaitEvent", then, event, 0)
        self._do("cuEventDestroy", event)

    def _load(self, ptx: str, name: str, args: list[Any]) -> tuple[Any, struct.Struct]:
        """Load a program; its function, and the layout of its arguments."""
        result = self._call("cuModuleLoadData", ptx.encode() + b"\0")
        if result[0] == self._api.CUresult.CUDA_ERROR_UNSUPPORTED_PTX_VERSION:  # the compiler is newer than the driver
            result = self._call("cuModuleLoadData", _linked(ptx, self.cc))
        function = self._do("cuModuleGetFunction", _checked(result), name.encode())
        loaded = function, struct.Struct("<" + "".join(_FORMATS[type(a)] for a in args))
        self._functions[ptx] = loaded
        return loaded

    def launch(self, ptx: str, name: str, grid: tuple[int, ...], block: tuple[int, ...], args: list[Any]) -> None:
        """Launch a program; `args` are NumPy scalars, or 64-bit integers, one for each parameter of the entry."""
        function, layout = self._functions.get(ptx) or self._load(ptx, name, args)
        # cuLaunchKernel takes the address of each argument.
        values = ctypes.create_string_buffer(layout.pack(*args))
        start = ctypes.addressof(values)
        addresses = np.arange(start, start + layout.size, 8, dtype=np.uint64)
        sizes = [*grid, *(1,) * (3 - len(grid)), *block, *(1,) * (3 - len(block))]
        self._do("cuLaunchKernel", function, *sizes, 0, current_stream(), addresses.ctypes.data, 0)

    def synchronize(self) -> None:
        """Wait for all submitted work."""
        self._do("cuCtxSynchronize")
