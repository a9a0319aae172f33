"""Loops of BatchNorm over planes: x (N, C, S). They work on whole channels, and read one again while it is in cache.

See `norm`.
"""

import numpy as np

from tinygrad_bn_kernels.cpu.jit import SUMS, inlined, njit
from tinygrad_bn_kernels.cpu.moments import is_finite, moments
from tinygrad_bn_kernels.cpu.norm_terms import (
    PROBES,
    common_shift,
    four_terms,
    gradient,
    is_bad_shift,
    lower_bound,
    normalizer,
    relu_gradient,
    term,
)


@inlined(fastmath=SUMS)
def plane_statistics(x, c):
    """Mean and biased variance of channel c."""
    n, _, size = x.shape
    mean = np.float64(x[0, c, 0] if is_finite(x[0, c, 0]) else 0)  # an infinite shift would make the mean NaN
    var = 0.0
    for _ in range(2):
        s1 = 0.0
        s2 = 0.0
        for i in range(n):
            plane = x[i, c]
            for j in range(size):
                d = plane[j] - mean
                s1 += d
                s2 += d * d
        mean, var, far = moments(mean, s1, s2, n * size)
        if not far:
            break
    return mean, var


@inlined(fastmath=SUMS)
def plane_normalize(x, c, mean, var, weight, bias, eps, relu, y):
    """The output of channel c, into y (N, C, S)."""
    n, _, size = x.shape
    lowest = lower_bound(x, relu)
    m, ivar, r = normalizer(x, mean, var, eps)
    a, b = x.dtype.type(ivar * weight), x.dtype.type(r * weight + bias)
    for i in range(n):
        source, target = x[i, c], y[i, c]
        for j in range(size):
            v = (source[j] - m) * a + b
            target[j] = lowest if v < lowest else v


@njit(allocates=False, fastmath=SUMS)
def planes_forward(x, weight, bias, eps, relu, y, mean, var, start, stop):
    """The output of channels from start to stop, into y (N, C, S); their mean and biased variance, into (C,)."""
    for c in range(start, stop):
        mean[c], var[c] = plane_statistics(x, c)
        plane_normalize(x, c, mean[c], var[c], weight[c], bias[c], eps, relu, y)


@inlined(fastmath=SUMS)
def _plane_gradient_sums(g, x, c, m, a, b, ivar, shift, relu):
    """Σ d and Σ d (x − m) · ivar of channel c."""
    n, _, size = x.shape
    s1 = 0.0
    s2 = 0.0
    i = 0
    while i + 4 <= n:
        g0, g1, g2, g3 = g[i, c], g[i + 1, c], g[i + 2, c], g[i + 3, c]
        x0, x1, x2, x3 = x[i, c], x[i + 1, c], x[i + 2, c], x[i + 3, c]
        for j in range(size):
            d, h = four_terms(
                g0[j], g1[j], g2[j], g3[j], x0[j], x1[j], x2[j], x3[j], m, a, b, ivar, shift, relu
            )  # fmt: skip
            s1 += d
            s2 += h
        i += 4
    while i < n:
        g0, x0 = g[i, c], x[i, c]
        for j in range(size):
            d, h = term(g0[j], x0[j], m, a, b, ivar, shift, relu)
            s1 += np.float64(d)
            s2 += np.float64(h)
        i += 1
    return s1, s2


@inlined(fastmath=SUMS)
def _plane_backward(g, x, c, weight, bias, mean, var, eps, relu, gx, gweight, gbias):
    """gx = ivar w · (d − mean d − x̂ · mean(d x̂)), where d = g − shift. An empty gx is not computed."""
    n, _, size = x.shape
    cast = x.dtype.type
    m, ivar, r = normalizer(x, mean[c], var[c], eps)
    a, b = cast(ivar * weight[c]), cast(r * weight[c] + bias[c])
    low = high = relu_gradient(g[0, c, 0], x[0, c, 0] - m, a, b, relu)
    for t in range(1, PROBES):
        at = t * (n * size - 1) // (PROBES - 1)
        i, j = at // size, at % size
        v = relu_gradient(g[i, c, j], x[i, c, j] - m, a, b, relu)
        low, high = min(low, v), max(high, v)
    shift = common_shift(low, high)
    s1 = s2 = 0.0
    for _ in range(2):
        s1, s2 = _plane_gradient_sums(g, x, c, m, a, b, cast(ivar), shift, relu)
        if not is_bad_shift(shift, s1, n * size):
            break
        shift = cast(0)
    s2 += r * s1
    gbias[c], gweight[c] = s1 + n * size * np.float64(shift), s2
    slope = s2 / (n * size)
    p, q = cast(ivar * slope), cast(r * slope + s1 / (n * size))  # (x − m) · p + q = x̂ · mean(d x̂) + mean d
    for i in range(gx.shape[0]):
        gs, xs, out = g[i, c], x[i, c], gx[i, c]
        for j in range(size):
            out[j] = gradient(gs[j], xs[j], m, a, b, shift, p, q, relu)


@njit(allocates=False, fastmath=SUMS)
def planes_backward(g, x, weight, bias, mean, var, eps, relu, gx, gweight, gbias, start, stop):
    """The gradients of channels from start to stop, into gx (N, C, S), or (0, 0, 0) for none, and into (C,)."""
    for c in range(start, stop):
        _plane_backward(g, x, c, weight, bias, mean, var, eps, relu, gx, gweight, gbias)
