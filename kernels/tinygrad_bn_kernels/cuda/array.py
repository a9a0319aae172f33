"""The array in device memory: a buffer, a shape, a dtype; always C-contiguous."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from tinygrad_bn_kernels import lookup
from tinygrad_bn_kernels.cuda import dlpack, launch
from tinygrad_bn_kernels.cuda.streams import current_stream

Array = NDArray[Any]
Shape = tuple[int, ...]

DTYPES = ("bool", "uint8", "int32", "int64", "float32", "float64")
KINDS = {np.dtype(name): np.dtype(name).str[1:] + "*" for name in DTYPES}  # type codes of arrays in signatures


class Buffer:
    """Device memory, freed with its last array.

    The driver's stream-ordered pool (`cuMemAllocAsync`) caches freed memory and reuses it in stream order, without
    waiting for the device. Freeing waits for the device only if the buffer was allocated on another stream, or is used
    on a stream that is not known.
    """

    __slots__ = ("_driver", "nbytes", "pointer", "stream")

    def __init__(self, nbytes: int) -> None:
        driver = launch.driver()
        self.nbytes, self.pointer = nbytes, driver.alloc(nbytes)
        self._driver, self.stream = driver, current_stream()

    def __del__(self) -> None:
        with suppress(Exception):  # the allocation failed, or the context is gone at exit
            if self.stream != current_stream():
                self._driver.synchronize()
            self._driver.free(self.pointer)


def _run(name: str, *operands: Any, **params: Any) -> Any:
    """Run the kernel `name`. The table of kernels imports its module: modules of kernels import this one."""
    kernel = lookup(name, "cuda")
    assert kernel is not None, name
    return kernel(*operands, **params)


def _operator(name: str) -> Any:
    return lambda *operands: _run(name, *operands)


def _reflected(name: str) -> Any:
    return lambda self, other: _run(name, other, self)


class DeviceArray:
    """An array on the GPU. Arithmetic between arrays, and with Python numbers, follows NumPy's rules.

    Data move between host and device only in `numpy()`, `item()` and `from_numpy`. `reshape` and slices of the first
    axis are views; other indexing copies.
    """

    __slots__ = ("__weakref__", "base", "buffer", "dtype", "kind", "pointer", "shape", "size")

    device = "cuda"
    __array_ufunc__ = None  # NumPy then leaves `number * array` to the operators here

    def __init__(self, shape: Shape, dtype: DTypeLike, buffer: Any = None, pointer: int | None = None) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.size = math.prod(shape)
        kind = KINDS.get(self.dtype)
        if kind is None:
            raise TypeError(f"an array on cuda cannot have dtype {self.dtype}; it can have {', '.join(DTYPES)}")
        if self.size >= launch.LARGEST:
            raise ValueError(f"an array on cuda must have fewer than 2^31 elements; shape {shape} has {self.size}")
        self.kind = kind
        self.base: DeviceArray | None = None
        self.buffer = Buffer(self.nbytes) if buffer is None else buffer
        self.pointer: int = self.buffer.pointer if pointer is None else pointer

    # ---- to and from the host ---------------------------------------------------------------------------

    @classmethod
    def from_numpy(cls, array: Array) -> DeviceArray:
        """A copy of a NumPy array."""
        out = cls(array.shape, array.dtype)
        if out.size:
            launch.driver().write(out.pointer, np.ascontiguousarray(array))
        return out

    def numpy(self) -> Array:
        """A copy as a NumPy array; waits for the device."""
        out = np.empty(self.shape, self.dtype)
        if self.size:
            data = launch.driver().read(self.pointer, self.nbytes)
            out.reshape(-1).view(np.uint8)[:] = np.frombuffer(data, np.uint8)
        return out

    def item(self) -> Any:
        """The only element, as a Python number; waits for the device."""
        return self.numpy().item()

    def __float__(self) -> float:
        return float(self.item())

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> Array:
        raise TypeError(
            "an array on cuda is not converted to NumPy implicitly: copy it with .numpy(), or move the tensor with "
            ".to('cpu')"
        )

    # ---- sharing memory with other libraries ------------------------------------------------------------

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        self.buffer.stream = None  # the consumer's stream is not known, nor when it is done: freeing must wait
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.pointer if self.size else 0, False),
            "strides": None,
            "stream": current_stream() or 1,  # the interface's number for the default stream is 1
            "version": 3,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, 0

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """Share the memory with CuPy, PyTorch or JAX, as the Python array API standard defines it.

        Args:
            stream: the consumer's stream, which will wait for ours; None or 1 is the default stream, −1 does not wait.
            max_version: ignored: version 0 is exported, which all consumers accept.
            dl_device: (2, 0), the array's own device, or (1, 0) for a copy on the host.
            copy: True for a copy.

        Raises BufferError for another device, or for the host with `copy=False`, and ValueError for stream 0, which
        the standard forbids as ambiguous.
        """
        if dl_device == (1, 0) and copy is not False:
            return self.numpy().__dlpack__()
        if dl_device not in (None, self.__dlpack_device__()):
            raise BufferError(f"an array on cuda:0 cannot be shared with DLPack device {dl_device}")
        if stream == 0:
            raise ValueError("stream 0 is ambiguous: the default one is 1, and that of the thread 2")
        consumer = 0 if stream in (None, 1) else stream
        exported = self.copy() if copy else self
        if consumer != -1:
            launch.driver().order(current_stream(), consumer)
        return dlpack.export_capsule(exported, consumer)

    @classmethod
    def from_dlpack(cls, other: Any) -> DeviceArray:
        """An array that shares the memory of another library's array.

        Raises TypeError if that is not on this device, is not C-contiguous, or has an unsupported dtype.
        """
        return cls(*dlpack.import_array(other))

    # ---- properties -------------------------------------------------------------------------------------

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def number(self, value: float) -> Any:
        """A number as a program's argument, in this array's dtype."""
        scalar: Any = self.dtype.type
        return scalar(value)

    @property
    def parameters(self) -> tuple[int, ...]:
        """Parameters that a program has for this array: meminfo, parent, size, itemsize, data, shape, strides.

        Programs see every array as one flat axis.
        """
        item = self.dtype.itemsize
        return 0, 0, self.size, item, self.pointer, self.size, item

    @property
    def aligned(self) -> bool:
        """Whether the first element is aligned for 128-bit accesses."""
        return self.pointer % 16 == 0

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of an array without axes")
        return self.shape[0]

    def __repr__(self) -> str:
        return f"DeviceArray({np.array2string(self.numpy(), separator=', ', threshold=20)}, dtype={self.dtype})"

    # ---- views and copies -------------------------------------------------------------------------------

    def view(self, shape: Shape, start: int = 0) -> DeviceArray:
        """A view of `shape` in the same memory, from element `start` on."""
        out = DeviceArray(shape, self.dtype, self.buffer, self.pointer + start * self.dtype.itemsize)
        out.base = self if self.base is None else self.base
        return out

    def reshape(self, *shape: Any) -> DeviceArray:
        """A view with another shape; one length may be -1, which is then inferred."""
        given: Any = shape[0] if len(shape) == 1 and not isinstance(shape[0], int | np.integer) else shape
        lengths: Shape = tuple(int(n) for n in given)
        known = -int(np.prod(lengths, dtype=np.int64))
        if lengths.count(-1) == 1 and known and self.size % known == 0:
            lengths = tuple(self.size // known if n == -1 else n for n in lengths)
        if math.prod(lengths) != self.size or min(lengths, default=0) < 0:
            raise ValueError(f"cannot reshape an array of shape {self.shape} into {tuple(given)}")
        return self.view(lengths)

    def copy(self) -> DeviceArray:
        """A copy on the device."""
        out = DeviceArray(self.shape, self.dtype)
        if self.size:
            launch.driver().copy(out.pointer, self.pointer, self.nbytes)
        return out

    def __deepcopy__(self, memo: Any) -> DeviceArray:
        return self.copy()

    def __reduce__(self) -> Any:
        return DeviceArray.from_numpy, (self.numpy(),)  # a pickle holds a copy on the host

    def astype(self, dtype: DTypeLike, copy: bool = True) -> Any:
        """Converted to `dtype`; with `copy=False` the array itself if it has that dtype."""
        return _run("astype", self, dtype=dtype) if copy or np.dtype(dtype) != self.dtype else self

    def __getitem__(self, index: Any) -> Any:
        return _run("getitem", self, index=index)

    def __setitem__(self, index: Any, value: Any) -> None:
        if index is not Ellipsis:
            raise TypeError("an array on cuda can only be assigned to as a whole: array[...] = values")
        value = value if isinstance(value, DeviceArray) else full(self.shape, value, self.dtype)
        if value.shape != self.shape:
            raise ValueError(f"values of shape {value.shape} for an array of shape {self.shape}")
        if self.size:
            launch.driver().copy(self.pointer, value.astype(self.dtype, copy=False).pointer, self.nbytes)

    # ---- arithmetic -------------------------------------------------------------------------------------

    __add__ = __radd__ = _operator("add")
    __mul__ = __rmul__ = _operator("mul")
    __sub__, __rsub__ = _operator("sub"), _reflected("sub")
    __truediv__, __rtruediv__ = _operator("div"), _reflected("div")
    __pow__, __rpow__ = _operator("pow"), _reflected("pow")
    __matmul__, __neg__ = _operator("matmul"), _operator("neg")

    def __iadd__(self, other: Any) -> DeviceArray:  # type: ignore[misc]
        self[...] = self + other
        return self

    __eq__, __ne__ = _operator("array.equal"), _operator("array.not_equal")
    __lt__, __gt__ = _operator("array.less"), _reflected("array.less")
    __le__, __ge__ = _operator("array.less_equal"), _reflected("array.less_equal")
    __hash__ = object.__hash__


def vectorizable(*arrays: DeviceArray) -> bool:
    """Whether a program can use 128-bit accesses: all arrays are aligned, and all float32 or all float64."""
    return arrays[0].dtype.kind == "f" and all(a.aligned and a.kind == arrays[0].kind for a in arrays)


def full(shape: Shape, value: float, dtype: DTypeLike) -> Any:
    """An array filled with `value`."""
    return _run("array.fill", DeviceArray(shape, dtype), value)
