"""Large matrix products by NVIDIA's cuBLAS, through CuPy if it is installed, in our memory and on our stream.

CuPy would copy the matrices of a batch that are transposed in memory, so our own program computes those products.
float32 products are computed in float32; CuPy uses TF32 only if `CUPY_TF32=1` is set. The tests use a stand-in for
CuPy: this code has not run with a real one.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from tinygrad_bn_kernels.cuda.array import DeviceArray
from tinygrad_bn_kernels.cuda.driver import Device
from tinygrad_bn_kernels.cuda.launch import driver
from tinygrad_bn_kernels.cuda.streams import current_stream

# The fewest multiplications for which CuPy is called: 256 cubed.
LARGE = 1 << 24


@cache
def _cupy() -> Any:
    """CuPy, or None if it is not installed or finds no cuBLAS."""
    try:
        import cupy

        with cupy.cuda.Device(0):
            cupy.cuda.device.get_cublas_handle()
    except (ImportError, RuntimeError):
        return None
    return cupy


def multiply(a: DeviceArray, b: DeviceArray, bias: DeviceArray | None, out: DeviceArray, depth: int, how: str) -> bool:
    """Write the product plus `bias` to out (count, rows, columns) and return True; or do nothing and return False.

    `how` is that of `linear.product`.
    """
    count, rows, columns = out.shape
    if out.size * depth < LARGE or out.dtype.kind != "f" or not isinstance(driver(), Device):
        return False
    if count > 1 and "t" in how:
        return False
    cupy = _cupy()
    if cupy is None:
        return False

    def shared(x: DeviceArray, shape: tuple[int, int], transposed: bool = False) -> Any:
        """A CuPy array in the memory of x."""
        memory = cupy.cuda.UnownedMemory(x.pointer, x.nbytes, x)
        stored = shape[::-1] if transposed else shape
        batch = () if count == 1 else (x.size // (shape[0] * shape[1]),)
        view = cupy.ndarray((*batch, *stored), x.dtype, cupy.cuda.MemoryPointer(memory, 0))
        return view.swapaxes(-1, -2) if transposed else view

    with cupy.cuda.Device(0), cupy.cuda.ExternalStream(current_stream()):
        left, right = shared(a, (rows, depth), how[0] == "t"), shared(b, (depth, columns), how[1] == "t")
        to = shared(out, (rows, columns))
        cupy.matmul(left, right, out=to)
        if bias is not None:
            cupy.add(to, shared(bias, (1, columns)), out=to)
    return True
