"""DLPack: sharing device arrays with CuPy, PyTorch and JAX, in both directions and without a copy.

The structures are those of dlpack.h, version 0, which every library accepts.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
from typing import Any

import numpy as np

from tinygrad_bn_kernels.cuda.launch import driver
from tinygrad_bn_kernels.cuda.streams import current_stream
from tinygrad_bn_kernels.cuda.strides import contiguous

CUDA = 2  # kDLCUDA
CODES = {"i": 0, "u": 1, "f": 2, "b": 6}
UNUSED, USED = b"dltensor", b"used_dltensor"  # names of a capsule, before and after it is consumed


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

_exports: dict[int, Any] = {}  # keeps exported arrays alive until the consumer calls the deleter
_count = itertools.count(1)


def _release(managed: Any) -> None:
    *_held, stream, _capsule = _exports.pop(managed.contents.context)  # kept alive until this returns
    if stream != current_stream():  # the consumer's work on its stream may still use the memory
        driver().synchronize()


_deleter = _Deleter(_release)


def _release_unclaimed() -> None:
    """Release arrays whose capsule was dropped without being consumed.

    A destructor of the capsule would do this at once. But if it is written in Python and runs while an exception
    propagates, such as the consumer's refusal, that exception is lost.
    """
    for number in list(_exports):
        export = _exports.get(number)
        # The capsule has two references here: in `export`, and as the argument of getrefcount.
        if export and sys.getrefcount(export[-1]) == 2 and _python.PyCapsule_IsValid(export[-1], UNUSED):
            _exports.pop(number, None)  # another thread may have removed it


def export_capsule(array: Any, stream: int) -> Any:
    """A capsule of a device array, which stays alive until the consumer, working on `stream`, releases it."""
    shape = (ctypes.c_int64 * max(array.ndim, 1))(*array.shape)
    strides = (ctypes.c_int64 * max(array.ndim, 1))(*contiguous(array.shape))
    code, bits = CODES[array.dtype.kind], 8 * array.dtype.itemsize
    tensor = _Tensor(array.pointer, CUDA, 0, array.ndim, code, bits, 1, shape, strides, 0)
    number = next(_count)
    managed = _Managed(tensor, number, _deleter)
    capsule = _python.PyCapsule_New(ctypes.addressof(managed), UNUSED, None)
    _release_unclaimed()
    _exports[number] = managed, array, shape, strides, stream, capsule
    return capsule


class _ImportedMemory:
    """Memory of another library, released with its last array."""

    def __init__(self, managed: Any) -> None:
        self._managed, self.stream = managed, current_stream()

    def __del__(self) -> None:
        if (self.stream, current_stream()) != (0, 0):  # only the default stream is likely to be the owner's too
            driver().synchronize()
        if deleter := self._managed.contents.deleter:
            deleter(self._managed)


def import_array(other: Any) -> tuple[tuple[int, ...], np.dtype[Any], Any, int]:
    """Shape, dtype, owner of the memory and address of another library's array.

    Raises TypeError if it is not on this device, or not C-contiguous.
    """
    if tuple(other.__dlpack_device__()) != (CUDA, 0):
        raise TypeError(f"a {type(other).__name__} on DLPack device {other.__dlpack_device__()} is not on cuda:0")
    capsule = other.__dlpack__(stream=current_stream() or 1)
    get, rename = _python.PyCapsule_GetPointer, _python.PyCapsule_SetName
    get.argtypes, get.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_void_p
    rename.argtypes = (ctypes.py_object, ctypes.c_char_p)
    managed = ctypes.cast(get(capsule, UNUSED), ctypes.POINTER(_Managed))
    rename(capsule, USED)
    memory, tensor = _ImportedMemory(managed), managed.contents.tensor
    shape = tuple(tensor.shape[: tensor.ndim]) if tensor.ndim else ()
    steps = contiguous(shape) if not tensor.strides or not tensor.ndim else tuple(tensor.strides[: tensor.ndim])
    if any(s != c and n != 1 for s, c, n in zip(steps, contiguous(shape), shape, strict=True)):
        raise TypeError(f"an array of shape {shape} and strides {steps} is not C-contiguous; copy it first")
    letter = next((k for k, code in CODES.items() if code == tensor.code), "V")
    dtype = np.dtype(bool) if letter == "b" else np.dtype(f"{letter}{tensor.bits // 8}")
    return shape, dtype, memory, (tensor.data or 0) + tensor.byte_offset
