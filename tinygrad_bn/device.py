"""Names of devices, where an array lives, and the only place that looks kernels up."""

from typing import Any

from tinygrad_bn_kernels import Kernel, lookup
from tinygrad_bn_kernels import disabled as kernels_disabled

__all__ = ["device_of", "find_kernel", "kernel_or", "kernels_disabled"]


def device_of(array: object) -> str:
    """The name of the device that holds `array`; NumPy's arrays and Python's numbers live on "cpu"."""
    return "cpu"


def find_kernel(name: str, device: str) -> Kernel | None:
    """The kernel called `name` ("mul", "mul.vjp") on `device`, or None: then the NumPy reference runs."""
    return lookup(name, device)


def kernel_or(reference: Kernel, name: str, *arrays: Any, **options: Any) -> Any:
    """What the kernel `name` gives for these arrays, or `reference` where there is none or it declines.

    For updates of state, which are not ops: those of optimisers and of running statistics. Arrays in a foreign byte
    order are the reference's.
    """
    found = lookup(name, device_of(arrays[0])) if all(a.dtype.isnative for a in arrays) else None
    result = NotImplemented if found is None else found(*arrays, **options)
    return reference(*arrays, **options) if result is NotImplemented else result
