"""Mean and variance from the sums of x − shift and of its square: for loops, which compile it, and for arrays."""

from typing import Any

import numpy as np

# A shift that is further from the mean than this many deviations has cost digits.
FAR = 16.0


def moments(shift: Any, s1: Any, s2: Any, n: int) -> tuple[Any, Any, Any]:
    """Mean and biased variance from Σ (x − shift) and Σ (x − shift)², and whether to sum again, with it as shift."""
    off = s1 / n
    var = np.maximum(s2 / n - off * off, 0.0)
    return shift + off, var, off * off > FAR * FAR * var
