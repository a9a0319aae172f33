"""DLPack: device arrays that are shared with CuPy, PyTorch and JAX, in both directions and without a copy.

The structures are those of dlpack.h, version 0, which every library still takes.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
from typing import Any

import numpy as np

from tinygrad_bn_kernels.cuda.array import DeviceArray
from tinygrad_bn_kernels.cuda.launch import current_stream, driver
from tinygrad_bn_kernels.cuda.strides import contiguous

CUDA = 2  # kDLCUDA
CODES = {"i": 0, "u": 1, "f": 2, "b": 6}
NEW, USED = b"dltensor", b"used_dltensor"


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    pass


_Deleter: Any = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))
_Managed._fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))

_python: Any = ctypes.pythonapi
_python.PyCapsule_New.restype = ctypes.py_object
_python.PyCapsule_New.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_python.PyCapsule_IsValid.argtypes = (ctypes.py_object, ctypes.c_char_p)

_lent: dict[int, Any] = {}  # what others use, until they say that they have done with it
_count = itertools.count(1)


def _give_back(managed: Any) -> None:
    *_held, stream, _capsule = _lent.pop(managed.contents.context)  # held until this returns
    if stream != current_stream():  # what was asked there may still use the memory
        driver().synchronize()


_done = _Deleter(_give_back)


def _take_back() -> None:
    """What was lent in capsules that nobody took, and nobody can any more.

    A destructor of the capsule would do it at once; but one in Python that runs while an exception is on its way, as
    the consumer's refusal, loses that exception.
    """
    for number in list(_lent):
        held = _lent.get(number)
        # Two references to a capsule are ours: that in `held`, and the argument here.
        if held and sys.getrefcount(held[-1]) == 2 and _python.PyCapsule_IsValid(held[-1], NEW):
            _lent.pop(number, None)  # unless another thread has done it


def lend(array: DeviceArray, stream: int) -> Any:
    """A capsule of `array`, which stays alive until whoever takes it, to work on `stream`, has done with it."""
    shape = (ctypes.c_int64 * max(array.ndim, 1))(*array.shape)
    strides = (ctypes.c_int64 * max(array.ndim, 1))(*contiguous(array.shape))
    kind, bits = CODES[array.dtype.kind], 8 * array.dtype.itemsize
    tensor = _Tensor(array.pointer, CUDA, 0, array.ndim, kind, bits, 1, shape, strides, 0)
    number = next(_count)
    managed = _Managed(tensor, number, _done)
    capsule = _python.PyCapsule_New(ctypes.addressof(managed), NEW, None)
    _take_back()
    _lent[number] = managed, array, shape, strides, stream, capsule
    return capsule


class _Borrowed:
    """The memory of another library, given back with its last array."""

    def __init__(self, managed: Any) -> None:
        self._managed, self.stream = managed, current_stream()

    def __del__(self) -> None:
        if (self.stream, current_stream()) != (0, 0):  # only the default one is likely to be theirs too
            driver().synchronize()
        if deleter := self._managed.contents.deleter:
            deleter(self._managed)


def borrow(other: Any) -> Any:
    """An array of another library, in the same memory.

    Raises TypeError if it is not on this device, not C-contiguous, or of a dtype that is not known here.
    """
    if tuple(other.__dlpack_device__()) != (CUDA, 0):
        raise TypeError(f"a {type(other).__name__} on DLPack device {other.__dlpack_device__()} is not on cuda:0")
    capsule = other.__dlpack__(stream=current_stream() or 1)
    get, rename = _python.PyCapsule_GetPointer, _python.PyCapsule_SetName
    get.argtypes, get.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_void_p
    rename.argtypes = (ctypes.py_object, ctypes.c_char_p)
    managed = ctypes.cast(get(capsule, NEW), ctypes.POINTER(_Managed))
    rename(capsule, USED)
    buffer, tensor = _Borrowed(managed), managed.contents.tensor
    shape = tuple(tensor.shape[: tensor.ndim]) if tensor.ndim else ()
    steps = contiguous(shape) if not tensor.strides or not tensor.ndim else tuple(tensor.strides[: tensor.ndim])
    if any(s != c and n != 1 for s, c, n in zip(steps, contiguous(shape), shape, strict=True)):
        raise TypeError(f"an array of shape {shape} and strides {steps} is not C-contiguous; copy it first")
    letter = next((k for k, code in CODES.items() if code == tensor.code), "V")
    dtype = np.dtype(bool) if letter == "b" else np.dtype(f"{letter}{tensor.bits // 8}")
    return DeviceArray(shape, dtype, buffer, (tensor.data or 0) + tensor.byte_offset)
