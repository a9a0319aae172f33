"""Arrays as compiled loops want them: one signature for each precision, so one compilation."""

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[Any]


class _Writable:
    """The memory of `x`, as if it could be written to: a loop that only reads has one signature, without a copy."""

    def __init__(self, x: Array) -> None:
        self.x = x  # which keeps the memory
        self.__array_interface__ = {**x.__array_interface__, "data": (x.__array_interface__["data"][0], False)}


def compiled(x: Array, dtype: DTypeLike | None = None) -> Array:
    """`x` to be read by a loop: C-contiguous, writable as to its type, and in native `dtype`; copied if need be.

    By default it keeps its own precision, but half becomes single.
    """
    if dtype is None:
        dtype = np.dtype(x.dtype.char) if x.dtype.char in "fd" else np.result_type(x, np.float32)
    if x.flags.carray and x.dtype == dtype:
        return x  # as nearly always, after one look at all of the flags
    if x.dtype != dtype or not (x.flags.c_contiguous and x.flags.aligned):
        return np.array(x, dtype, order="C")
    return x if x.flags.writeable else np.asarray(_Writable(x))


def expect_one_shape(first: Array, *others: Array) -> None:
    """Raise ValueError unless all have the same shape: a loop would read, or write, beyond the shortest."""
    if any(other.shape != first.shape for other in others):
        raise ValueError(f"arrays have to be of one shape; got {', '.join(str(a.shape) for a in (first, *others))}")
