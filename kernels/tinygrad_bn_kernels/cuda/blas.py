"""Large matrix products by NVIDIA's cuBLAS, through CuPy where that is installed, in our memory and on our stream.

A batch of matrices that lie transposed CuPy would copy first: those products stay our own. In float32 it is float32:
CuPy computes in TF32 only where the environment says so (`CUPY_TF32=1`). The tests have a stand-in for CuPy; with a
real one this has not run yet.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from tinygrad_bn_kernels.cuda.array import DeviceArray
from tinygrad_bn_kernels.cuda.driver import Device
from tinygrad_bn_kernels.cuda.launch import current_stream, driver

# Multiplications from which a product is worth the call of CuPy: 256 cubed.
LARGE = 1 << 24


@cache
def _cupy() -> Any:
    """CuPy, or None where there is none, or no cuBLAS that it can load."""
    try:
        import cupy

        with cupy.cuda.Device(0):
            cupy.cuda.device.get_cublas_handle()
    except (ImportError, RuntimeError):
        return None
    return cupy


def multiply(a: DeviceArray, b: DeviceArray, bias: DeviceArray | None, out: DeviceArray, depth: int, how: str) -> bool:
    """Write the product, plus `bias`, to out (count, rows, columns) and say so; or do nothing. See `linear.product`."""
    count, rows, columns = out.shape
    if out.size * depth < LARGE or out.dtype.kind != "f" or not isinstance(driver(), Device):
        return False
    if count > 1 and "t" in how:
        return False
    cupy = _cupy()
    if cupy is None:
        return False

    def shared(x: DeviceArray, shape: tuple[int, int], transposed: bool = False) -> Any:
        memory = cupy.cuda.UnownedMemory(x.pointer, x.nbytes, x)
        stored = shape[::-1] if transposed else shape
        batch = () if count == 1 else (x.size // (shape[0] * shape[1]),)
        theirs = cupy.ndarray((*batch, *stored), x.dtype, cupy.cuda.MemoryPointer(memory, 0))
        return theirs.swapaxes(-1, -2) if transposed else theirs

    with cupy.cuda.Device(0), cupy.cuda.ExternalStream(current_stream()):
        left, right = shared(a, (rows, depth), how[0] == "t"), shared(b, (depth, columns), how[1] == "t")
        to = shared(out, (rows, columns))
        cupy.matmul(left, right, out=to)
        if bias is not None:
            cupy.add(to, shared(bias, (1, columns)), out=to)
    return True
