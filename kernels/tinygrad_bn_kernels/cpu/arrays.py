"""Arrays as compiled loops want them: one signature for each precision, so one compilation."""

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[Any]


def compiled(x: Array, dtype: DTypeLike | None = None) -> Array:
    """`x` C-contiguous, writable as to its type, and in `dtype`: by default its own, but float32 for float16."""
    dtype = np.result_type(x, np.float32) if dtype is None else dtype
    return x if x.dtype == dtype and x.flags.carray else np.require(x, dtype, ["C", "W"])
