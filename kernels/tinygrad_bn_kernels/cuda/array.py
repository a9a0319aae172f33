"""The array in device memory: a buffer, a shape, a dtype; always C-contiguous."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from tinygrad_bn_kernels.cuda import launch

Array = NDArray[Any]
Shape = tuple[int, ...]

DTYPES = ("bool", "uint8", "int32", "int64", "float32", "float64")
KINDS = {np.dtype(name): np.dtype(name).str[1:] + "*" for name in DTYPES}  # as signatures of programs have them


class Buffer:
    """Device memory that is freed with its last array.

    There is no allocator of our own: the driver's stream-ordered pool (`cuMemAllocAsync`) caches what is freed and
    gives it out again in the order of the stream, without waiting for the device. Only where it was made on another
    stream than the one that it is freed on, perhaps by another thread, or is used on one that is not known, is the
    device waited for.
    """

    __slots__ = ("_driver", "nbytes", "pointer", "stream")

    def __init__(self, nbytes: int) -> None:
        driver = launch.driver()
        self.nbytes, self.pointer = nbytes, driver.alloc(nbytes)
        self._driver, self.stream = driver, launch.current_stream()

    def __del__(self) -> None:
        with suppress(Exception):  # there was no memory; or at the end of the process there is no context
            if self.stream != launch.current_stream():
                self._driver.synchronize()
            self._driver.free(self.pointer)


class DeviceArray:
    """An array on the GPU. Arithmetic between arrays, and with Python's numbers, has NumPy's rules.

    Nothing is copied to or from the host unless asked for: `numpy()`, `item()` and `from_numpy`. `reshape` and slices
    of the first axis are views; other indexing copies.
    """

    __slots__ = ("__weakref__", "base", "buffer", "dtype", "kind", "pointer", "shape", "size")

    device = "cuda"
    __array_ufunc__ = None  # NumPy leaves `number * array` to the operators here

    def __init__(self, shape: Shape, dtype: DTypeLike, buffer: Any = None, pointer: int | None = None) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.size = math.prod(shape)
        kind = KINDS.get(self.dtype)
        if kind is None:
            raise TypeError(f"arrays on cuda are of {', '.join(DTYPES)}; not of {self.dtype}")
        if self.size >= launch.LARGEST:
            raise ValueError(f"an array on cuda has fewer than 2^31 elements; {shape} has {self.size}")
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
        """A copy, as a NumPy array; waits for the device."""
        out = np.empty(self.shape, self.dtype)
        if self.size:
            data = launch.driver().read(self.pointer, self.nbytes)
            out.reshape(-1).view(np.uint8)[:] = np.frombuffer(data, np.uint8)
        return out

    def item(self) -> Any:
        """The one element, as a Python number; waits for the device."""
        return self.numpy().item()

    def __float__(self) -> float:
        return float(self.item())

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> Array:
        raise TypeError("an array on cuda is no NumPy array: copy it with .numpy(), or move the tensor with .to('cpu')")

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        self.buffer.stream = None  # theirs is not known, and they do not say when they have done: freeing has to wait
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.pointer if self.size else 0, False),
            "strides": None,
            "stream": launch.current_stream() or 1,  # 1 is the default one there
            "version": 3,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """For CuPy, PyTorch and JAX, which then use the same memory; by the standard for arrays in Python.

        Args:
            stream: theirs, which then waits for ours; None or 1 for the default one, −1 not to wait.
            max_version: the newest version of the structure that they know. It is 0 here, as all know that.
            dl_device: (2, 0), where the array is, or (1, 0) for a copy in the host's memory.
            copy: True for memory of its own.

        Raises BufferError for another device, or one that would take a copy where none is allowed, and ValueError for
        stream 0, which the standard leaves out as it may be two streams.
        """
        from tinygrad_bn_kernels.cuda.dlpack import lend

        if dl_device == (1, 0) and copy is not False:
            return self.numpy().__dlpack__()
        if dl_device not in (None, self.__dlpack_device__()):
            raise BufferError(f"an array on cuda:0 cannot be shared with DLPack device {dl_device}")
        if stream == 0:
            raise ValueError("stream 0 is ambiguous: the default one is 1, and that of the thread 2")
        theirs = 0 if stream in (None, 1) else stream
        lent = self.copy() if copy else self
        if theirs != -1:
            launch.order(launch.current_stream(), theirs)
        return lend(lent, theirs)

    # ---- what it is -------------------------------------------------------------------------------------

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def number(self, value: float) -> Any:
        """A number as an argument of a program, in this array's type."""
        scalar: Any = self.dtype.type
        return scalar(value)

    @property
    def parameters(self) -> tuple[int, ...]:
        """As Numba passes an array: two pointers of its own, size, item size, data, shape and strides."""
        item = self.dtype.itemsize
        return 0, 0, self.size, item, self.pointer, self.size, item

    @property
    def aligned(self) -> bool:
        """Whether it begins where 128 bits can be moved at a time."""
        return self.pointer % 16 == 0

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of an array without axes")
        return self.shape[0]

    def __repr__(self) -> str:
        return f"DeviceArray({np.array2string(self.numpy(), separator=', ', threshold=20)}, dtype={self.dtype})"

    __hash__ = object.__hash__

    # ---- views and copies -------------------------------------------------------------------------------

    def view(self, shape: Shape, start: int = 0) -> DeviceArray:
        """The elements from `start` on, in another shape, in the same memory."""
        out = DeviceArray(shape, self.dtype, self.buffer, self.pointer + start * self.dtype.itemsize)
        out.base = self if self.base is None else self.base
        return out

    def reshape(self, *shape: Any) -> DeviceArray:
        """The same elements in another shape; one -1 stands for what is left."""
        given: Any = shape[0] if len(shape) == 1 and not isinstance(shape[0], int | np.integer) else shape
        wanted: Shape = tuple(int(n) for n in given)
        known = -int(np.prod(wanted, dtype=np.int64))
        if wanted.count(-1) == 1 and known and self.size % known == 0:
            wanted = tuple(self.size // known if n == -1 else n for n in wanted)
        if math.prod(wanted) != self.size or min(wanted, default=0) < 0:
            raise ValueError(f"cannot reshape an array of shape {self.shape} into {tuple(given)}")
        return self.view(wanted)

    def copy(self) -> DeviceArray:
        """A copy on the device."""
        out = DeviceArray(self.shape, self.dtype)
        if self.size:
            launch.driver().copy(out.pointer, self.pointer, self.nbytes)
        return out

    def __deepcopy__(self, memo: Any) -> DeviceArray:
        return self.copy()

    def __reduce__(self) -> Any:
        return DeviceArray.from_numpy, (self.numpy(),)  # in a pickle, by way of the host

    def astype(self, dtype: DTypeLike, copy: bool = True) -> DeviceArray:
        """Converted to `dtype`."""
        return _maps().astype(self, dtype=dtype) if copy or np.dtype(dtype) != self.dtype else self

    def __getitem__(self, index: Any) -> DeviceArray:
        return _layout().getitem(self, index=index)

    def __setitem__(self, index: Any, value: Any) -> None:
        if index is not Ellipsis:
            raise TypeError("arrays on cuda are assigned to as a whole: array[...] = values")
        value = value if isinstance(value, DeviceArray) else full(self.shape, value, self.dtype)
        if value.shape != self.shape:
            raise ValueError(f"values of shape {value.shape} for an array of shape {self.shape}")
        if self.size:
            launch.driver().copy(self.pointer, value.astype(self.dtype, copy=False).pointer, self.nbytes)

    # ---- arithmetic -------------------------------------------------------------------------------------

    def __add__(self, other: Any) -> DeviceArray:
        return _maps().add(self, other)

    def __sub__(self, other: Any) -> DeviceArray:
        return _maps().sub(self, other)

    def __mul__(self, other: Any) -> DeviceArray:
        return _maps().mul(self, other)

    def __truediv__(self, other: Any) -> DeviceArray:
        return _maps().div(self, other)

    def __pow__(self, other: Any) -> DeviceArray:
        return _maps().pow(self, other)

    def __matmul__(self, other: Any) -> DeviceArray:
        return _linear().matmul(self, other)

    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(self, other: Any) -> DeviceArray:
        return _maps().sub(other, self)

    def __rtruediv__(self, other: Any) -> DeviceArray:
        return _maps().div(other, self)

    def __rpow__(self, other: Any) -> DeviceArray:
        return _maps().pow(other, self)

    def __iadd__(self, other: Any) -> DeviceArray:
        self[...] = self + other
        return self

    def __neg__(self) -> DeviceArray:
        return _maps().neg(self)

    def __eq__(self, other: object) -> DeviceArray:  # type: ignore[override]
        return _maps().equal(self, other)

    def __ne__(self, other: object) -> DeviceArray:  # type: ignore[override]
        return _maps().not_equal(self, other)

    def __lt__(self, other: Any) -> DeviceArray:
        return _maps().less(self, other)

    def __le__(self, other: Any) -> DeviceArray:
        return _maps().less_equal(self, other)

    def __gt__(self, other: Any) -> DeviceArray:
        return _maps().less(other, self)

    def __ge__(self, other: Any) -> DeviceArray:
        return _maps().less_equal(other, self)


def wide(*arrays: DeviceArray) -> bool:
    """Whether 128 bits of all these can be moved at a time: all float32 or all float64, and aligned."""
    return arrays[0].dtype.kind == "f" and all(a.aligned and a.kind == arrays[0].kind for a in arrays)


def full(shape: Shape, value: float, dtype: DTypeLike) -> DeviceArray:
    """An array full of one value."""
    return _maps().fill(DeviceArray(shape, dtype), value)


def _maps() -> Any:
    from tinygrad_bn_kernels.cuda import maps

    return maps


def _layout() -> Any:
    from tinygrad_bn_kernels.cuda import layout

    return layout


def _linear() -> Any:
    from tinygrad_bn_kernels.cuda import linear

    return linear
