"""Mean and variance from sums of x − shift and (x − shift)²."""

import numpy as np

from tinygrad_bn_kernels.cpu.jit import SUMS, inlined

# A shift further from the mean than this many standard deviations loses digits.
FAR = 16.0


@inlined()
def is_finite(x):
    """Whether x is a number, and not infinite. `np.isfinite` computes x − x, which fast arithmetic may take for 0."""
    return abs(x) < np.inf


@inlined(fastmath=SUMS)
def moments(shift, s1, s2, n):
    """Mean and biased variance from Σ (x − shift) and Σ (x − shift)²; and whether the shift is too far off."""
    off = s1 / n
    square = s2 / n
    overflows = np.isinf(square) and is_finite(off)  # finite data, whose squares are not: then ∞ − ∞ would be NaN
    var = square if overflows else np.maximum(square - off * off, 0.0)
    return shift + off, var, off * off > FAR * FAR * var
