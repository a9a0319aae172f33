"""The arithmetic of one element of BatchNorm, for the loops over planes and over rows, and its limits."""

import numpy as np

from tinygrad_bn_kernels.cpu.jit import SUMS, inlined, njit
from tinygrad_bn_kernels.cpu.moments import is_finite

# Gradients of a channel that are sampled to choose a shift. With three samples, one channel in a hundred gets a useless
# shift by chance, and all sums are computed twice.
PROBES = 8


@inlined()
def is_ordinary_channel(w, mean, ivar, itemsize):
    """`is_ordinary` for one channel. All terms are computed, as a branch would keep LLVM from vectorising."""
    low, high, far = (1e-18, 1e18, 1e30) if itemsize == 4 else (1e-150, 1e150, 1e290)
    fits = (low < ivar) & (ivar < high) & (abs(mean) < far)
    return ((w == 0) | ((low < abs(w)) & (abs(w) < high))) & (~is_finite(mean) | fits)


@njit(allocates=False)
def is_ordinary(weight, mean, var, eps):
    """Whether the loops are right for x, of weight's dtype. If not, as with numbers near 1e38, a kernel has to decline.

    The weights and 1/√(var + eps) have to lie between the limits of what the loops can multiply in the dtype. Means
    have to be below 1e30 in float32 and 1e290 in float64, since x minus a larger one may overflow. Infinite or NaN
    elements of x make all results NaN, in the loops as in the composition.
    """
    good = True
    for w in weight.flat:
        good &= is_ordinary_channel(w, 0.0, 1.0, weight.itemsize)
    for i in range(var.size):
        good &= is_ordinary_channel(0.0, mean[i], 1 / np.sqrt(var[i] + eps), weight.itemsize)
    return good


@inlined()
def has_digits(p, deviation, itemsize):
    """Whether p of `gradient` and the deviation of x̂ are 0 or normal numbers: others have few digits."""
    tiny = 1.1754944e-38 if itemsize == 4 else 2.2250738585072014e-308
    return ((p == 0) | ~(abs(p) < tiny)) & ((deviation == 0) | ~(deviation < 1e8 * tiny))


@njit(allocates=False)
def are_sound(gweight, gbias, var, eps, n, itemsize):
    """Whether all gradients of vectors are finite, and nothing that they were computed from lacks digits."""
    good = True
    for c in range(gweight.size):
        ivar = 1 / np.sqrt(var[c] + eps)
        deviation = np.sqrt(var[c]) * ivar
        good &= is_finite(gweight[c]) & is_finite(gbias[c]) & has_digits(ivar * gweight[c] / n, deviation, itemsize)
    return good


@inlined()
def lower_bound(x, relu):
    """The smallest output: 0 with a ReLU, else −∞. So one compiled loop serves both."""
    return x.dtype.type(0) if relu else x.dtype.type(-np.inf)


@inlined(fastmath=SUMS)
def normalizer(x, mean, var, eps):
    """m in x's dtype, ivar and r in float64, with x̂ = (x − m) · ivar + r: r corrects the rounding of m."""
    m, ivar = x.dtype.type(mean), 1 / np.sqrt(var + eps)
    return m, ivar, (m - mean) * ivar


@inlined()
def common_shift(low, high):
    """A shift for gradients from `low` to `high`: low if they are close together and far from 0, else (or if NaN) 0."""
    return low if abs(low + high) > 8 * (high - low) else type(low)(0)


@inlined()
def is_bad_shift(shift, total, n):
    """Whether the mean of n shifted gradients, of this total, is more than half the shift."""
    return shift != 0 and abs(total) > n * abs(np.float64(shift)) / 2


# No reassociation below: the shift has to be subtracted from each term, not from the sum.


@inlined(fastmath={"contract"})
def relu_gradient(g, u, a, b, relu):
    """g, but 0 where a ReLU's output is 0; u · a + b is its input, computed as in the forward pass. At NaN it is g."""
    return type(g)(0) if relu and u * a + b <= type(g)(0) else g


@inlined(fastmath={"contract"})
def term(g, x, m, a, b, ivar, shift, relu):
    """d = g − shift, with g behind the ReLU; and d (x − m) · ivar."""
    u = x - m
    d = relu_gradient(g, u, a, b, relu) - shift
    return d, d * (u * ivar)


@inlined(fastmath={"contract"})
def four_terms(g0, g1, g2, g3, x0, x1, x2, x3, m, a, b, ivar, shift, relu):
    """The sums of four `term`s in float64. Adding four in x's dtype rounds less than the result does."""
    d0, h0 = term(g0, x0, m, a, b, ivar, shift, relu)
    d1, h1 = term(g1, x1, m, a, b, ivar, shift, relu)
    d2, h2 = term(g2, x2, m, a, b, ivar, shift, relu)
    d3, h3 = term(g3, x3, m, a, b, ivar, shift, relu)
    return np.float64((d0 + d1) + (d2 + d3)), np.float64((h0 + h1) + (h2 + h3))


@inlined(fastmath={"contract"})
def gradient(g, x, m, a, b, shift, p, q, relu):
    """a · (d − mean d − x̂ · mean(d x̂)), with both means in p and q."""
    u = x - m
    return a * (relu_gradient(g, u, a, b, relu) - shift - (u * p + q))
