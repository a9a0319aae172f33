"""Names of devices, where an array lives, and the only place that looks kernels up.

On "cpu" an array is NumPy's; on "cuda" it is a `DeviceArray` of `tinygrad_bn_kernels.cuda`, which has the same
arithmetic. Nothing of CUDA is imported before an array is moved there.
"""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike
from tinygrad_bn_kernels import Kernel
from tinygrad_bn_kernels import disabled as kernels_disabled
from tinygrad_bn_kernels import lookup as find_kernel
from tinygrad_bn_kernels.cpu.memory import is_owner

__all__ = [
    "as_array", "beside", "device_of", "expect_one_device", "find_kernel", "full", "has_own_memory", "join",
    "kernel_or", "kernels_disabled", "move", "to_numpy",
]  # fmt: skip

DEVICES = ("cpu", "cuda")


def device_of(array: object) -> str:
    """The name of the device that holds `array`; NumPy's arrays and Python's numbers live on "cpu"."""
    if type(array) is np.ndarray:
        return "cpu"  # asked of every operand: the attribute takes twice as long
    device = getattr(array, "device", "cpu")
    return device if type(device) is str else "cpu"  # other libraries' arrays have objects there


def as_array(value: Any) -> Any:
    """An array of any device as it is; anything else as a NumPy array."""
    return value if type(value) is np.ndarray or device_of(value) != "cpu" else np.asarray(value)


def expect_one_device(operands: Collection[object]) -> None:
    """Raise TypeError if arrays live on different devices, naming them: nothing is copied between devices unasked."""
    if set(map(type, operands)) == {np.ndarray}:
        return  # as nearly always
    devices = {device_of(o) for o in operands if hasattr(o, "dtype")}
    if len(devices) > 1:
        raise TypeError(f"operands live on different devices, {' and '.join(sorted(devices))}; move one with .to()")


def move(array: Any, device: str) -> Any:
    """The array on `device`: itself if it is there, else a copy.

    Raises ValueError for a name that is none, TypeError for a dtype that a device does not take, and RuntimeError
    where there is no such device, saying what is missing.
    """
    if device not in DEVICES:
        one = '; "cuda" is one GPU, the first' if str(device).startswith("cuda") else ""
        raise ValueError(f"there is no device {device!r}; there are {' and '.join(map(repr, DEVICES))}{one}")
    if device_of(array) == device:
        return array
    return array.numpy() if device == "cpu" else _arrays().DeviceArray.from_numpy(np.asarray(array))


def to_numpy(array: Any) -> Any:
    """A copy as a NumPy array, from wherever it is."""
    return np.array(np.asarray(array)) if device_of(array) == "cpu" else array.numpy()  # also of a tensor


def beside(constant: Any, x: Any) -> Any:
    """A NumPy array, on the device of `x`."""
    return move(constant, device_of(x))


def has_own_memory(array: Any) -> bool:
    """Whether the memory of `array` is not another array's, which would change with it."""
    return is_owner(array) if type(array) is np.ndarray else array.base is None


def full(shape: tuple[int, ...], value: float, dtype: DTypeLike, device: str) -> Any:
    """An array full of one value, on `device`."""
    return np.full(shape, value, dtype) if device == "cpu" else _arrays().full(shape, value, dtype)


def join(arrays: Sequence[Any]) -> Any:
    """The elements of arrays of one device, one after the other, on one axis."""
    if device_of(arrays[0]) == "cpu":
        return np.concatenate(arrays, axis=None)
    return find_kernel("concatenate", "cuda")(*[a.reshape(-1) for a in arrays], axis=0)  # type: ignore[misc]


def _arrays() -> Any:
    from tinygrad_bn_kernels.cuda.available import device_arrays

    return device_arrays()


def kernel_or(reference: Kernel, name: str, *arrays: Any, **options: Any) -> Any:
    """What the kernel `name` gives for these arrays, or `reference` where there is none or it declines.

    For updates of state, which are not ops: those of optimisers and of running statistics. Arrays in a foreign byte
    order are the reference's. Raises TypeError if the arrays live on different devices.
    """
    expect_one_device(arrays)
    found = None if False in [a.dtype.isnative for a in arrays] else find_kernel(name, device_of(arrays[0]))
    result = NotImplemented if found is None else found(*arrays, **options)
    return reference(*arrays, **options) if result is NotImplemented else result
