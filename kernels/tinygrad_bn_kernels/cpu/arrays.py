"""Arrays as compiled loops take them: one layout for each dtype, so that each loop compiles once for it."""

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[Any]


class _Writable:
    """The memory of a read-only `x` declared writable: a loop is compiled again for read-only arrays."""

    def __init__(self, x: Array) -> None:
        self.x = x  # keeps the memory alive
        self.__array_interface__ = {**x.__array_interface__, "data": (x.__array_interface__["data"][0], False)}


def compiled(x: Array, dtype: DTypeLike | None = None) -> Array:
    """`x` for a loop that reads it: C-contiguous, of a writable type, in native `dtype`; a copy only if necessary.

    By default float32 and float64 keep their dtype, and half precision becomes float32.
    """
    own = x.dtype
    if dtype is None:
        dtype = (own if own.isnative else own.newbyteorder()) if own.char in "fd" else np.result_type(x, np.float32)
    if x.flags.carray and own == dtype:
        return x  # the usual case
    if own != dtype and own.kind not in "fiub":
        raise TypeError(f"kernels take real numbers; got an array of dtype {own}")
    if own != dtype or not (x.flags.c_contiguous and x.flags.aligned):
        return np.array(x, dtype, order="C")
    return x if x.flags.writeable else np.asarray(_Writable(x))


def expect_one_shape(first: Array, *others: Array) -> None:
    """Raise ValueError unless all have the same shape: a loop would access memory out of bounds."""
    if any(other.shape != first.shape for other in others):
        raise ValueError(f"expected arrays of one shape; got {', '.join(str(a.shape) for a in (first, *others))}")
