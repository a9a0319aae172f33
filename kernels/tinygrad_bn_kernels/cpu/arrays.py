"""Arrays as compiled loops want them: one signature for each precision, so one compilation."""

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[Any]


def compiled(x: Array, dtype: DTypeLike | None = None) -> Array:
    """`x` C-contiguous, writable as to its type, and in `dtype`: by default its own, but float32 for float16."""
    if dtype is None:
        dtype = x.dtype if x.dtype.char in "fd" else np.result_type(x, np.float32)
    return x if x.dtype == dtype and x.flags.carray else np.array(x, dtype, order="C")
