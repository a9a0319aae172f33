"""The NVIDIA GPU: `tensor.to("cuda")`, `model.to("cuda")`, `fit(..., device="cuda")`.

Importing this module loads no driver. `pip install "tinygrad-bn[cuda]"` installs what the kernels need. They support
float32 and float64, not float16. Launches are asynchronous: reading a value waits for the work that produces it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tinygrad_bn import backend
from tinygrad_bn.sample import REAL, elementwise
from tinygrad_bn.tensor import Operand, Tensor, primitive

__all__ = ["from_dlpack", "info", "is_available", "stream", "synchronize", "to"]


def _driver() -> Any:
    """The open device. Raises RuntimeError that names the missing package or driver."""
    backend.device_arrays()
    from tinygrad_bn_kernels.cuda import launch

    return launch.driver()


def is_available() -> bool:
    """Whether tensors can be moved to "cuda": the package is installed and there is a device."""
    try:
        backend.device_arrays()
    except (MemoryError, RuntimeError):
        return False
    return True


def info() -> dict[str, Any]:
    """A description of the device: `available`, and its name, compute capability and more, or the `reason` if not."""
    try:
        device = _driver()
    except (MemoryError, RuntimeError) as error:
        return {"available": False, "reason": str(error)}
    return {
        "available": True,
        "name": getattr(device, "name", type(device).__name__),
        "compute_capability": device.cc,
        "multiprocessors": device.processors,
    }


def from_dlpack(other: Any) -> Tensor:
    """A tensor that shares memory with an array of CuPy, PyTorch or JAX on the same GPU.

    Writes to that array change the tensor, also in a recorded graph. To share a tensor with another library, call its
    `from_dlpack(t.data)`.

    Raises:
        RuntimeError: there is no device.
        TypeError: the array is not on the device, or not C-contiguous.
    """
    return Tensor._of(backend.device_arrays().DeviceArray.from_dlpack(other))


@contextmanager
def stream(handle: int) -> Iterator[None]:
    """Submit this thread's work in the block to the CUDA stream `handle`.

    A handle is `torch.cuda.current_stream().cuda_stream` or `cupy.cuda.get_current_stream().ptr`, for example; 0 is the
    default stream, which is used outside such blocks. The stream must outlive the block. It waits for the work
    submitted before the block, and work after the block waits for it. Threads that share arrays on different streams
    must synchronise themselves, for example with `synchronize`. Raises RuntimeError if there is no device.
    """
    driver = _driver()
    from tinygrad_bn_kernels.cuda.streams import on_stream

    with on_stream(int(handle), driver.order):
        yield


def synchronize() -> None:
    """Wait until the device has finished all submitted work. Raises RuntimeError if there is no device."""
    _driver().synchronize()


@primitive(
    lambda g, y, x, *, device: to(g, device=backend.device_of(x)),  # type: ignore[has-type]
    formula="y = x on another device;  ∂x = g on x's device",
    sample=elementwise(REAL, device="cpu"),
    exact=True,
)
def to(x: Operand, *, device: str) -> Operand:
    """The same values on the device "cpu" or "cuda".

    Raises RuntimeError if there is no such device, naming the missing package or driver, and TypeError for a dtype that
    the device does not take, such as float16 on cuda.
    """
    return backend.move(x, device)
