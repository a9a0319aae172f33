"""The NVIDIA GPU, where there is one: `tensor.to("cuda")`, `model.to("cuda")`, `fit(..., device="cuda")`.

Importing this touches no driver. The kernels come with `pip install "tinygrad-bn[cuda]"`; they are for float32 and
float64 (not float16), and launches are asynchronous: reading a value waits for what it depends on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from tinygrad_bn import backend
from tinygrad_bn.sample import REAL, elementwise
from tinygrad_bn.tensor import Operand, Tensor, primitive

__all__ = ["from_dlpack", "info", "is_available", "stream", "synchronize", "to"]

_INSTALL = 'device "cuda" needs the package numba-cuda: pip install "tinygrad-bn[cuda]"'


def arrays() -> Any:
    """The module of device arrays, if there is a device. Raises RuntimeError saying what is missing."""
    from tinygrad_bn_kernels.cuda import launch

    if launch.installed() is None:
        if find_spec("numba_cuda") is None:
            raise RuntimeError(_INSTALL)
        launch.driver()
    from tinygrad_bn_kernels.cuda import array

    return array


def is_available() -> bool:
    """Whether tensors can be moved to "cuda": the package is installed and there is a device."""
    try:
        arrays()
    except (MemoryError, RuntimeError):
        return False
    return True


def info() -> dict[str, Any]:
    """What is known of the device: `available`, and then its name, compute capability and more, or the `reason`."""
    try:
        arrays()
    except (MemoryError, RuntimeError) as error:
        return {"available": False, "reason": str(error)}
    from tinygrad_bn_kernels.cuda import launch

    device = launch.driver()
    return {
        "available": True,
        "name": getattr(device, "name", type(device).__name__),
        "compute_capability": device.cc,
        "multiprocessors": device.processors,
    }


def from_dlpack(other: Any) -> Tensor:
    """A tensor that shares its memory with an array of CuPy, PyTorch or JAX on the same GPU.

    It is the one way in which a tensor does not own its data: what others write there changes it under a graph. The way
    back is their own `from_dlpack(t.data)`.

    Raises:
        RuntimeError: there is no device.
        TypeError: the array is not on it, or not C-contiguous.
    """
    arrays()
    from tinygrad_bn_kernels.cuda.dlpack import borrow

    return Tensor._of(borrow(other))


@contextmanager
def stream(handle: int) -> Iterator[None]:
    """In this block, in this thread, all work goes to the stream with this handle of the driver's.

    Such as `torch.cuda.current_stream().cuda_stream`, or `cupy.cuda.get_current_stream().ptr`; 0 is the default
    stream, which all work goes to otherwise. The stream has to outlive the block. What is asked in the block comes
    after what was asked before it, and what comes after waits for it. Threads that share arrays and work on different
    streams have to wait for each other, as with `synchronize`. Raises RuntimeError where there is no device.
    """
    arrays()
    from tinygrad_bn_kernels.cuda import launch

    with launch.on_stream(int(handle)):
        yield


def synchronize() -> None:
    """Wait until the device has done all that was asked of it. Raises RuntimeError where there is none."""
    arrays()
    from tinygrad_bn_kernels.cuda import launch

    launch.driver().synchronize()


@primitive(
    lambda g, y, x, *, device: to(g, device=backend.device_of(x)),  # type: ignore[has-type]
    formula="y = x on another device;  ∂x = g on x's device",
    sample=elementwise(REAL, device="cpu"),
)
def to(x: Operand, *, device: str) -> Operand:
    """The same values on the device "cpu" or "cuda".

    Raises RuntimeError if there is no such device, saying what is missing, and TypeError for a dtype that the device
    does not take, such as float16 on cuda.
    """
    return backend.move(x, device)
