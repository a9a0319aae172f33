"""Mean and variance from the sums of x − shift and of its square."""

import numpy as np

from tinygrad_bn_kernels.cpu.jit import SUMS, njit

# A shift that is further from the mean than this many deviations has cost digits.
FAR = 16.0


@njit(fastmath=SUMS)
def moments(shift, s1, s2, n):
    """Mean and biased variance from Σ (x − shift) and Σ (x − shift)², and whether to sum again, with it as shift."""
    off = s1 / n
    var = np.maximum(s2 / n - off * off, 0.0)
    return shift + off, var, off * off > FAR * FAR * var
