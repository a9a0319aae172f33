"""The arithmetic of one element of BatchNorm, forwards and backwards, for loops over planes and over rows."""

import numpy as np

from tinygrad_bn_kernels.cpu.jit import SUMS, njit


@njit()
def floor_of(x, relu):
    """What the output is not below: one loop then serves with and without a ReLU, at half the compilation."""
    return x.dtype.type(0) if relu else x.dtype.type(-np.inf)


@njit(fastmath=SUMS)
def rounded(x, mean, var, eps):
    """m in x's dtype and ivar and r in float64, of which x̂ = (x − m) · ivar + r: r is what rounding took from m."""
    m, ivar = x.dtype.type(mean), 1 / np.sqrt(var + eps)
    return m, ivar, (m - mean) * ivar


@njit()
def in_common(low, high):
    """The lowest of some gradients, if they lie close together and far from 0; otherwise, and if not finite, 0."""
    return low if abs(low + high) > 8 * (high - low) else type(low)(0)


@njit()
def too_far(shift, total, n):
    """Whether n gradients less the shift, of this sum, are on average half of it: it had little in common with them."""
    return shift != 0 and abs(total) > n * abs(np.float64(shift)) / 2


# The next four are not to be reassociated: a shift that is taken from a sum instead of its terms has no use any more.


@njit(fastmath={"contract"})
def passed(g, u, a, b, relu):
    """g, but 0 behind a ReLU that gave 0: u · a + b is the output, computed as the forward pass did."""
    return g if not relu or u * a + b > type(g)(0) else type(g)(0)


@njit(fastmath={"contract"})
def term(g, x, m, a, b, ivar, shift, relu):
    """d = g − shift, where g is what a ReLU passed; and d (x − m) · ivar."""
    u = x - m
    d = passed(g, u, a, b, relu) - shift
    return d, d * (u * ivar)


@njit(fastmath={"contract"})
def four_terms(g0, g1, g2, g3, x0, x1, x2, x3, m, a, b, ivar, shift, relu):
    """The sums of four such, in their own precision, which rounds by less than the gradients will be; in float64."""
    d0, h0 = term(g0, x0, m, a, b, ivar, shift, relu)
    d1, h1 = term(g1, x1, m, a, b, ivar, shift, relu)
    d2, h2 = term(g2, x2, m, a, b, ivar, shift, relu)
    d3, h3 = term(g3, x3, m, a, b, ivar, shift, relu)
    return np.float64((d0 + d1) + (d2 + d3)), np.float64((h0 + h1) + (h2 + h3))


@njit(fastmath={"contract"})
def gradient(g, x, m, a, b, shift, p, q, relu):
    """a · (d − mean d − x̂ · mean(d x̂)), where the two means are in p and q."""
    u = x - m
    return a * (passed(g, u, a, b, relu) - shift - (u * p + q))
