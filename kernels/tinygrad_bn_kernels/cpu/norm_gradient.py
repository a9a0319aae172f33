"""The gradients of BatchNorm as ops, and their own gradients: what a Hessian-vector product computes.

With h = x̂, s = 1/√(var + eps) and means over the values of a channel, the gradient of x is w s (g − ḡ − h · mean(g h)).
For a cotangent v of it, let dv = v − v̄, dg = g − ḡ, p = mean(v h), q = mean(g h) and a = mean(dv dg) − p q. Then

    ∂g = w s (dv − p h),    ∂w = n s a,    ∂x = −w s² (q dv + p dg + (a − 2 p q) h).
"""

from typing import Any

import numpy as np

from tinygrad_bn_kernels import kernel
from tinygrad_bn_kernels.cpu.arrays import Array, compiled
from tinygrad_bn_kernels.cpu.jit import SUMS, njit
from tinygrad_bn_kernels.cpu.memory import empty_like
from tinygrad_bn_kernels.cpu.norm import (
    Vector,
    affine_or_default,
    batch_norm_training,
    batch_norm_training_vjp,
    by_channel,
    takes,
)
from tinygrad_bn_kernels.cpu.norm_planes import plane_statistics
from tinygrad_bn_kernels.cpu.norm_terms import is_ordinary
from tinygrad_bn_kernels.cpu.reduce import wide_mean_and_var
from tinygrad_bn_kernels.cpu.threads import split


@njit(allocates=False, fastmath=SUMS)
def _gradients_of_gradient(v, g, x, weight, eps, gg, gx, gweight, means, variances, start, stop):
    """∂g, ∂x and ∂w of the channels from start to stop of arrays (N, C, S), computed in float64."""
    n = x.shape[0] * x.shape[2]
    for c in range(start, stop):
        mean, var = plane_statistics(x, c)
        means[c], variances[c] = mean, var
        s = 1 / np.sqrt(var + eps)
        v_mean = 0.0
        g_mean = 0.0
        for i in range(x.shape[0]):
            vs, gs = v[i, c], g[i, c]
            for j in range(vs.size):
                v_mean += np.float64(vs[j])
                g_mean += np.float64(gs[j])
        v_mean /= n
        g_mean /= n
        p = 0.0
        q = 0.0
        a = 0.0
        for i in range(x.shape[0]):
            vs, gs, xs = v[i, c], g[i, c], x[i, c]
            for j in range(vs.size):
                dv, dg, h = vs[j] - v_mean, gs[j] - g_mean, (xs[j] - mean) * s
                p += dv * h
                q += dg * h
                a += dv * dg
        p /= n
        q /= n
        a = a / n - p * q
        gweight[c] = n * s * a
        by_g = s * weight[c]
        by_x = -by_g * s
        for i in range(x.shape[0]):
            vs, gs, xs, to_g, to_x = v[i, c], g[i, c], x[i, c], gg[i, c], gx[i, c]
            for j in range(vs.size):
                dv, dg, h = vs[j] - v_mean, gs[j] - g_mean, (xs[j] - mean) * s
                to_g[j] = by_g * (dv - p * h)
                to_x[j] = by_x * (q * dv + p * dg + (a - 2 * p * q) * h)


def _of_training(g: Array, x: Array, weight: Vector, needs: list[bool], eps: float) -> Any:
    """The gradients of x, weight and bias in `batch_norm_training`, by the statistics of x."""
    if not takes(x) or g.dtype != x.dtype or g.shape != x.shape or x.size <= x.shape[1]:
        return NotImplemented
    statistics = wide_mean_and_var(x, (0, *range(2, x.ndim)))
    if statistics is NotImplemented:
        return NotImplemented
    mean, var = statistics
    return batch_norm_training_vjp(g, None, x, weight, None, needs=needs, eps=eps, mean=mean, var=var)


@kernel("batch_norm_gradient", "cpu")
def batch_norm_gradient(g: Array, x: Array, weight: Vector, *, eps: float) -> Any:
    """The gradient of x (N, C, ...) in `batch_norm_training`, in x's shape and dtype."""
    found = _of_training(g, x, weight, [True, False, False], eps)
    return found if found is NotImplemented else found[0].astype(x.dtype, copy=False)


@kernel("batch_norm_gradient.vjp", "cpu")
def batch_norm_gradient_vjp(
    v: Array, y: Array, g: Array, x: Array, weight: Vector, *, needs: list[bool], eps: float
) -> Any:
    """Gradients of g, x and weight."""
    if not takes(x) or not v.shape == g.shape == x.shape or not v.dtype == g.dtype == x.dtype:
        return NotImplemented
    source = compiled(x)
    scale, _ = affine_or_default(source, weight, None)
    gweight, mean, var = (np.empty(x.shape[1]) for _ in range(3))
    arrays = [by_channel(compiled(array, source.dtype)) for array in (v, g, source)]
    if rows := arrays[0].ndim == 2:  # a channel's values have to lie side by side
        arrays = [np.ascontiguousarray(array.T)[None] for array in arrays]
    out = [empty_like(arrays[0]) for _ in range(2)]
    split(_gradients_of_gradient, x.shape[1], x.size, *arrays, scale, float(eps), *out, gweight, mean, var)
    if not is_ordinary(scale, mean, var, float(eps)) or not np.isfinite(gweight).all():
        return NotImplemented
    gg, gx = ((array[0].T if rows else array).reshape(x.shape) for array in out)
    return gg, gx, None if weight is None or not needs[2] else gweight.astype(weight.dtype)


@kernel("batch_norm_weight_gradient", "cpu")
def batch_norm_weight_gradient(g: Array, x: Array, *, eps: float) -> Any:
    """The gradient (C,) of the weight in `batch_norm_training`, in x's dtype."""
    found = _of_training(g, x, np.ones(x.shape[1:2]), [False, True, False], eps)
    return found if found is NotImplemented else found[1].astype(x.dtype)


@kernel("batch_norm_weight_gradient.vjp", "cpu")
def batch_norm_weight_gradient_vjp(v: Array, y: Array, g: Array, x: Array, *, needs: list[bool], eps: float) -> Any:
    """Gradients of g and x: v x̂, and the gradient of x in BatchNorm with the weight v."""
    by_g = batch_norm_training(x, v, None, eps=eps) if needs[0] else (None,)
    by_x = batch_norm_gradient(g, x, v, eps=eps) if needs[1] else None
    return NotImplemented if by_g is NotImplemented or by_x is NotImplemented else (by_g[0], by_x)
