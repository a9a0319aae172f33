"""Numba's CUDA target as programs use it, and the only module that imports it (package `numba-cuda`).

Programs are plain functions of `cuda` and types such as `float32`. The successor `numba-cuda-mlir` compiles them too:
to switch, change this file. Nothing here opens a driver or a device.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import cuda as _cuda
from numba import types as _types
from numba.extending import intrinsic as _intrinsic

__all__ = [
    "compile_ptx", "cuda", "device", "float32", "float64", "int32", "int64", "load4", "store4", "uint32", "uint64",
]  # fmt: skip

cuda: Any = _cuda
types: Any = _types
intrinsic: Any = _intrinsic
float32, float64, int32, int64, uint32, uint64 = (
    getattr(types, name) for name in ("float32", "float64", "int32", "int64", "uint32", "uint64")
)

TYPES: dict[str, Any] = {
    "b1": types.boolean, "u1": types.uint8, "i4": int32, "i8": int64, "u4": uint32, "u8": uint64,
    "f4": float32, "f8": float64,
}  # fmt: skip


def device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function that programs call."""
    compiled: Callable[..., Any] = cuda.jit(device=True)(function)
    return compiled


def argument(kind: str) -> Any:
    """The Numba type of a type code: "f4" is a float32, "f4*" a C-contiguous array of one axis."""
    return types.Array(TYPES[kind[:-1]], 1, "C") if kind.endswith("*") else TYPES[kind]


def compile_ptx(function: Callable[..., Any], signature: tuple[str, ...], cc: tuple[int, int]) -> str:
    """The PTX of a program for these argument types and compute capability `cc`."""
    ptx, _ = cuda.compile_ptx(function, types.void(*map(argument, signature)), cc=cc)
    return str(ptx)


# Numba knows only the alignment of one element, so it never merges adjacent loads. These use 128-bit accesses: one for
# four elements of float32, two for float64.


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    first = builder.gep(data, [builder.zext(index, ir.IntType(64))])
    return builder.bitcast(first, ir.VectorType(data.type.pointee, 4).as_pointer())


@intrinsic
def load4(typingctx, array, index):
    """array[index], …, array[index + 3]: floats, aligned to 16 bytes; index is a multiple of 4."""

    def codegen(context, builder, signature, args):
        vector = builder.load(_pointer(context, builder, signature.args[0], *args), align=16)
        parts = [builder.extract_element(vector, ir.Constant(ir.IntType(32), k)) for k in range(4)]
        return context.make_tuple(builder, signature.return_type, parts)

    return types.UniTuple(array.dtype, 4)(array, uint32), codegen


@intrinsic
def store4(typingctx, array, index, values):
    """array[index], …, array[index + 3] = values, under the same conditions."""

    def codegen(context, builder, signature, args):
        vector: Any = ir.Constant(ir.VectorType(args[2].type.element, 4), ir.Undefined)
        for k in range(4):
            part = builder.extract_value(args[2], k)
            vector = builder.insert_element(vector, part, ir.Constant(ir.IntType(32), k))
        builder.store(vector, _pointer(context, builder, signature.args[0], *args[:2]), align=16)
        return context.get_dummy_value()

    return types.void(array, uint32, types.UniTuple(array.dtype, 4)), codegen
