"""Names of devices, where an array lives, and the only place that looks kernels up."""

from tinygrad_bn_kernels import Kernel, lookup
from tinygrad_bn_kernels import disabled as kernels_disabled

__all__ = ["device_of", "find_kernel", "kernels_disabled"]


def device_of(array: object) -> str:
    """The name of the device that holds `array`; NumPy's arrays and Python's numbers live on "cpu"."""
    return "cpu"


def find_kernel(name: str, device: str) -> Kernel | None:
    """The kernel called `name` ("mul", "mul.vjp") on `device`, or None: then the NumPy reference runs."""
    return lookup(name, device)
