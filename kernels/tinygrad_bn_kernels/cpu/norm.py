"""BatchNorm in training over (N, C, S): statistics, output and gradients.

With S = 1 (`_rows_…`) a loop works on chunks of rows. Otherwise (`_planes_…`) it works on whole channels, and reads a
channel again while it is in cache. Statistics are sums of x − shift in float64; the shift is the channel's first
element. So they are accurate at any mean, and the variance of a constant channel is 0. Gradients far from 0 are shifted
likewise: Σ x̂ is 0, so the shift only changes the gradient of the bias, where it is added again.
"""

from numbers import Real
from typing import Any

import numpy as np

from tinygrad_bn_kernels import kernel
from tinygrad_bn_kernels.cpu import threads
from tinygrad_bn_kernels.cpu.arrays import Array, compiled
from tinygrad_bn_kernels.cpu.jit import SUMS, inlined, njit
from tinygrad_bn_kernels.cpu.memory import empty_like
from tinygrad_bn_kernels.cpu.moments import moments
from tinygrad_bn_kernels.cpu.norm_terms import (
    are_finite,
    common_shift,
    four_terms,
    gradient,
    is_bad_shift,
    is_ordinary,
    lower_bound,
    normalizer,
    relu_gradient,
    term,
)
from tinygrad_bn_kernels.cpu.threads import split

Vector = Array | None  # (C,); a weight of None is 1, a bias of None is 0

# Rows of a chunk. Each chunk has its own sums, so results do not depend on the number of threads.
CHUNK = 256

# Gradients of a channel that are sampled to choose a shift. With three samples, one channel in a hundred gets a useless
# shift by chance, and all sums are computed twice.
PROBES = 8


# ---- planes: (N, C, S) ----------------------------------------------------------------------------------


@inlined(fastmath=SUMS)
def plane_statistics(x, c):
    """Mean and biased variance of channel c."""
    n, _, size = x.shape
    mean = np.float64(x[0, c, 0] if np.isfinite(x[0, c, 0]) else 0)  # an infinite shift would make the mean NaN
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
    n, _, size = x.shape
    lowest = lower_bound(x, relu)
    m, ivar, r = normalizer(x, mean, var, eps)
    a, b = x.dtype.type(ivar * weight), x.dtype.type(r * weight + bias)
    for i in range(n):
        source, target = x[i, c], y[i, c]
        for j in range(size):
            v = (source[j] - m) * a + b
            target[j] = lowest if v < lowest else v


@njit(fastmath=SUMS)
def _planes_forward(x, weight, bias, eps, relu, y, mean, var, start, stop):
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


@njit(fastmath=SUMS)
def _planes_backward(g, x, weight, bias, mean, var, eps, relu, gx, gweight, gbias, start, stop):
    for c in range(start, stop):
        _plane_backward(g, x, c, weight, bias, mean, var, eps, relu, gx, gweight, gbias)


# ---- rows: (N, C) ---------------------------------------------------------------------------------------
# Four rows at a time: the sums of a column are loaded and stored once for four elements. The values of a column lie in
# the rows of one small array k: with an array for each, LLVM needs too many overlap checks and does not vectorise.


@njit()
def clear(sums):
    for j in range(sums.shape[1]):
        sums[0, j] = sums[1, j] = 0.0


@inlined(fastmath=SUMS)
def _first_row_shift(x, shift):
    """The first row, and 0 where it is not finite."""
    for j in range(shift.size):
        shift[j] = np.float64(x[0, j]) if np.isfinite(x[0, j]) else 0.0


@inlined(fastmath=SUMS)
def _rows_sums(x, shift, sums, start, stop):
    """Σ (x − shift) and Σ (x − shift)² of each column of the chunks [start, stop), into sums (chunks, 2, C)."""
    for t in range(start, stop):
        clear(sums[t])
        i, last = t * CHUNK, min((t + 1) * CHUNK, x.shape[0])
        while i + 4 <= last:
            r0, r1, r2, r3 = x[i], x[i + 1], x[i + 2], x[i + 3]
            for j in range(shift.size):
                d0, d1, d2, d3 = r0[j] - shift[j], r1[j] - shift[j], r2[j] - shift[j], r3[j] - shift[j]
                sums[t, 0, j] += (d0 + d1) + (d2 + d3)
                sums[t, 1, j] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)
            i += 4
        while i < last:
            row = x[i]
            for j in range(shift.size):
                d = row[j] - shift[j]
                sums[t, 0, j] += d
                sums[t, 1, j] += d * d
            i += 1


@inlined(fastmath=SUMS)
def _rows_statistics(sums, n, shift, mean, var):
    """Mean and variance from the chunks' sums; False if a shift was too far from its mean. Shifts become the means."""
    good = True
    for j in range(shift.size):
        s1 = 0.0
        s2 = 0.0
        for t in range(sums.shape[0]):
            s1 += sums[t, 0, j]
            s2 += sums[t, 1, j]
        mean[j], var[j], far = moments(shift[j], s1, s2, n)
        shift[j] = mean[j] if np.isfinite(mean[j]) else 0.0
        good = good and not far
    return good


@inlined(fastmath=SUMS)
def rows_constants(x, weight, bias, mean, var, eps):
    """k (7, C): m, a and b with y = (x − m) · a + b, ivar, and space for the shift of g, p and q."""
    k = np.empty((7, mean.size), x.dtype)
    for j in range(mean.size):
        m, ivar, r = normalizer(x, mean[j], var[j], eps)
        k[0, j], k[1, j], k[2, j], k[3, j] = m, ivar * weight[j], r * weight[j] + bias[j], ivar
    return k


@inlined(fastmath={"contract"})
def _gradient_shift(g, x, relu, k):
    """Choose the shift of g for each column, into k[4]."""
    for j in range(k.shape[1]):
        low = high = relu_gradient(g[0, j], x[0, j] - k[0, j], k[1, j], k[2, j], relu)
        for t in range(1, PROBES):
            i = t * (len(g) - 1) // (PROBES - 1)
            v = relu_gradient(g[i, j], x[i, j] - k[0, j], k[1, j], k[2, j], relu)
            low, high = min(low, v), max(high, v)
        k[4, j] = common_shift(low, high)


@inlined(fastmath=SUMS)
def rows_normalize(x, k, relu, y, start, stop):
    lowest = lower_bound(x, relu)
    for i in range(start * CHUNK, min(stop * CHUNK, x.shape[0])):
        row, out = x[i], y[i]
        for j in range(row.size):
            v = (row[j] - k[0, j]) * k[1, j] + k[2, j]
            out[j] = lowest if v < lowest else v


@njit(fastmath=SUMS)
def _rows_forward_serial(x, weight, bias, eps, relu, y, mean, var):
    """`_rows_forward` on one thread, in one compiled call."""
    chunks = -(-len(x) // CHUNK)
    shift, sums = np.empty(mean.size), np.empty((chunks, 2, mean.size))
    _first_row_shift(x, shift)
    for _ in range(2):
        _rows_sums(x, shift, sums, 0, chunks)
        if _rows_statistics(sums, len(x), shift, mean, var):
            break
    rows_normalize(x, rows_constants(x, weight, bias, mean, var, eps), relu, y, 0, chunks)
    return is_ordinary(weight, mean, var, eps)


def _rows_forward(x: Array, weight: Array, bias: Array, eps: float, relu: bool, *out: Array) -> bool:
    """Output, mean and variance, into `out`. Whether they are right: see `is_ordinary`."""
    if x.size < threads.PARALLEL_FROM:
        return bool(_rows_forward_serial(x, weight, bias, eps, relu, *out))
    y, mean, var = out
    n, channels = x.shape
    chunks = -(-n // CHUNK)
    shift, sums = np.empty(channels), np.empty((chunks, 2, channels))
    _first_row_shift(x, shift)
    for _ in range(2):
        split(_rows_sums, chunks, x.size, x, shift, sums)
        if _rows_statistics(sums, n, shift, mean, var):
            break
    split(rows_normalize, chunks, x.size, x, rows_constants(x, weight, bias, mean, var, eps), relu, y)
    return bool(is_ordinary(weight, mean, var, eps))


@inlined(fastmath=SUMS)
def _rows_gradient_sums(g, x, k, relu, sums, start, stop):
    """Σ d and Σ d (x − m) · ivar of each column of the chunks [start, stop), into sums (chunks, 2, C)."""
    for t in range(start, stop):
        clear(sums[t])
        i, last = t * CHUNK, min((t + 1) * CHUNK, x.shape[0])
        while i + 4 <= last:
            g0, g1, g2, g3 = g[i], g[i + 1], g[i + 2], g[i + 3]
            x0, x1, x2, x3 = x[i], x[i + 1], x[i + 2], x[i + 3]
            for j in range(k.shape[1]):
                m, a, b, ivar, shift = k[0, j], k[1, j], k[2, j], k[3, j], k[4, j]
                d, h = four_terms(
                    g0[j], g1[j], g2[j], g3[j], x0[j], x1[j], x2[j], x3[j], m, a, b, ivar, shift, relu
                )  # fmt: skip
                sums[t, 0, j] += d
                sums[t, 1, j] += h
            i += 4
        while i < last:
            g0, x0 = g[i], x[i]
            for j in range(k.shape[1]):
                d, h = term(g0[j], x0[j], k[0, j], k[1, j], k[2, j], k[3, j], k[4, j], relu)
                sums[t, 0, j] += np.float64(d)
                sums[t, 1, j] += np.float64(h)
            i += 1


@inlined(fastmath=SUMS)
def _rows_gradients(sums, n, k, mean, var, eps, gweight, gbias):
    """Gradients of weight and bias from the chunks' sums; p and q into k. False if a shift was bad; it becomes 0."""
    good = True
    for j in range(gweight.size):
        s1 = 0.0
        s2 = 0.0
        for t in range(sums.shape[0]):
            s1 += sums[t, 0, j]
            s2 += sums[t, 1, j]
        _, ivar, r = normalizer(k, mean[j], var[j], eps)
        s2 += r * s1
        gbias[j], gweight[j] = s1 + n * np.float64(k[4, j]), s2
        k[5, j], k[6, j] = ivar * s2 / n, r * s2 / n + s1 / n
        if is_bad_shift(k[4, j], s1, n):
            k[4, j], good = 0.0, False
    return good


@inlined(fastmath=SUMS)
def _rows_gradient(g, x, k, relu, gx, start, stop):
    for i in range(start * CHUNK, min(stop * CHUNK, x.shape[0])):
        gs, row, out = g[i], x[i], gx[i]
        for j in range(row.size):
            out[j] = gradient(gs[j], row[j], k[0, j], k[1, j], k[2, j], k[4, j], k[5, j], k[6, j], relu)


@njit(fastmath=SUMS)
def _rows_backward_serial(g, x, weight, bias, mean, var, eps, relu, gx, gweight, gbias):
    """`_rows_backward` on one thread, in one compiled call."""
    chunks = -(-len(x) // CHUNK)
    sums = np.empty((chunks, 2, mean.size))
    k = rows_constants(x, weight, bias, mean, var, eps)
    _gradient_shift(g, x, relu, k)
    for _ in range(2):
        _rows_gradient_sums(g, x, k, relu, sums, 0, chunks)
        if _rows_gradients(sums, len(x), k, mean, var, eps, gweight, gbias):
            break
    if gx.size:
        _rows_gradient(g, x, k, relu, gx, 0, chunks)
    return is_ordinary(weight, mean, var, eps), are_finite(gweight, gbias)


def _rows_backward(
    g: Array, x: Array, weight: Array, bias: Array, mean: Array, var: Array, eps: float, relu: bool, *out: Array
) -> tuple[bool, bool]:
    """Gradients of x, weight and bias, into `out`. Whether they are right (see `is_ordinary`), and finite."""
    gx, gweight, gbias = out
    if x.size < threads.PARALLEL_FROM:
        return _rows_backward_serial(g, x, weight, bias, mean, var, eps, relu, *out)
    chunks = -(-len(x) // CHUNK)
    sums = np.empty((chunks, 2, x.shape[1]))
    k = rows_constants(x, weight, bias, mean, var, eps)
    _gradient_shift(g, x, relu, k)
    for _ in range(2):
        split(_rows_gradient_sums, chunks, x.size, g, x, k, relu, sums)
        if _rows_gradients(sums, len(x), k, mean, var, eps, gweight, gbias):
            break
    if gx.size:
        split(_rows_gradient, chunks, x.size, g, x, k, relu, gx)
    return is_ordinary(weight, mean, var, eps), are_finite(gweight, gbias)


# ---- state -----------------------------------------------------------------------------------------------


@njit()
def _track(running_mean, running_var, mean, var, momentum, unbias, new_mean, new_var):
    finite = True
    for c in range(mean.size):
        new_mean[c] = (1 - momentum) * running_mean[c] + momentum * mean[c]
        new_var[c] = (1 - momentum) * running_var[c] + momentum * (var[c] * unbias)
        finite = finite and np.isfinite(new_mean[c]) and np.isfinite(new_var[c])
    return finite


# ---- kernels --------------------------------------------------------------------------------------------


def by_channel(x: Array) -> Array:
    """x as (N, C, S), or as (N, C) if S is 1."""
    if x.ndim == 2:
        return x
    return x.reshape(x.shape[:2]) if x.size == x.shape[0] * x.shape[1] else x.reshape(*x.shape[:2], -1)


def expect_channels(x: Array, *vectors: Array) -> None:
    """Raise ValueError unless each vector is (C,): the loops would read out of bounds."""
    shape = x.shape[1:2]
    for v in vectors:
        if v.shape != shape:
            raise ValueError(f"expected vectors of shape {shape} for x {x.shape}; got {v.shape}")


def affine_or_default(x: Array, weight: Vector, bias: Vector) -> tuple[Array, Array]:
    """weight and bias (C,) in x's dtype; None is 1 and 0."""
    shape, dtype = x.shape[1:2], x.dtype
    weight = np.ones(shape, dtype) if weight is None else compiled(weight, dtype)
    bias = np.zeros(shape, dtype) if bias is None else compiled(bias, dtype)
    if weight.shape != shape or bias.shape != shape:
        expect_channels(x, weight, bias)
    return weight, bias


def takes(x: Array, eps: float) -> bool:
    """Whether a kernel computes this; otherwise the composition does, or raises an error."""
    return x.dtype.kind == "f" and x.ndim > 1 and isinstance(eps, Real) and eps >= 0


def _forward(x: Array, weight: Vector, bias: Vector, eps: float, relu: bool) -> Any:
    if not takes(x, eps) or 0 < x.size == x.shape[1]:  # one value per channel is an error
        return NotImplemented
    source, channels = compiled(x), x.shape[1]
    affine = affine_or_default(source, weight, bias)
    y = empty_like(source)
    if not x.size:
        return y.astype(x.dtype, copy=False), np.full(channels, np.nan), np.full(channels, np.nan)
    mean, var = np.empty(channels), np.empty(channels)
    eps = float(eps)  # another type would compile the loops again
    xs, ys = by_channel(source), by_channel(y)
    if xs.ndim == 2:
        good = _rows_forward(xs, *affine, eps, relu, ys, mean, var)
    else:
        split(_planes_forward, channels, x.size, xs, *affine, eps, relu, ys, mean, var)
        good = is_ordinary(affine[0], mean, var, eps)
    if not good:
        return NotImplemented
    return y.astype(x.dtype, copy=False), mean, var


def _backward(
    g: Array,
    y: Array,
    x: Array,
    weight: Vector,
    bias: Vector,
    *,
    needs: list[bool],
    eps: float,
    mean: Array,
    var: Array,
    relu: bool,
) -> Any:
    """Gradients of x, weight and bias, from the saved statistics."""
    source, channels = compiled(x), x.shape[1]
    affine = affine_or_default(source, weight, bias)
    gx = empty_like(source) if needs[0] else None
    gweight, gbias = np.zeros(channels), np.zeros(channels)
    if x.size:
        eps = float(eps)
        gs, xs = by_channel(compiled(g, source.dtype)), by_channel(source)
        out = np.empty((0,) * xs.ndim, source.dtype) if gx is None else by_channel(gx)
        arguments = gs, xs, *affine, mean, var, eps, relu, out, gweight, gbias
        if xs.ndim == 2:
            good, finite = _rows_backward(*arguments)
        else:
            split(_planes_backward, channels, x.size, *arguments)
            good, finite = is_ordinary(affine[0], mean, var, eps), are_finite(gweight, gbias)
        overflowed = not finite and not np.isnan(mean).any() and np.isfinite(g).all()  # a sum of four, in x's dtype
        if not good or overflowed:
            return NotImplemented
    by_weight = None if weight is None or not needs[1] else gweight.astype(weight.dtype)
    return gx, by_weight, None if bias is None or not needs[2] else gbias.astype(bias.dtype)


@kernel("batch_norm_training", "cpu")
def batch_norm_training(x: Array, weight: Vector, bias: Vector, *, eps: float) -> Any:
    """x (N, C, ...), weight and bias (C,) or None: the output, and mean and biased variance in float64 (C,)."""
    return _forward(x, weight, bias, eps, False)


@kernel("batch_norm_relu", "cpu")
def batch_norm_relu(x: Array, weight: Vector, bias: Vector, *, eps: float) -> Any:
    """`batch_norm_training` with the ReLU of its output."""
    return _forward(x, weight, bias, eps, True)


@kernel("batch_norm_training.vjp", "cpu")
def batch_norm_training_vjp(*arrays: Any, **options: Any) -> Any:
    """Gradients of x, weight and bias: see `_backward` for the arguments."""
    return _backward(*arrays, **options, relu=False)


@kernel("batch_norm_relu.vjp", "cpu")
def batch_norm_relu_vjp(*arrays: Any, **options: Any) -> Any:
    """`batch_norm_training.vjp` behind a ReLU. Recomputing the sign of the output is cheaper than reading y."""
    return _backward(*arrays, **options, relu=True)


@kernel("running_statistics", "cpu")
def running_statistics(
    running_mean: Array, running_var: Array, tracked: Array, mean: Array, var: Array, *, momentum: float, unbias: float
) -> Any:
    """New (C,) mean and variance, (1 − momentum) · running + momentum · batch; tracked + 1; whether all are finite.

    The batch's variance is multiplied by `unbias`.
    """
    if not running_mean.shape == running_var.shape == mean.shape == var.shape:
        raise ValueError(
            f"running statistics have shapes {running_mean.shape} and {running_var.shape}, the batch's {mean.shape}"
        )
    if running_mean.dtype.char not in "fd" or running_var.dtype.char not in "fd":
        return NotImplemented
    new_mean, new_var = np.empty_like(running_mean), np.empty_like(running_var)
    old, numbers = (compiled(running_mean), compiled(running_var)), (float(momentum), float(unbias))
    return (
        new_mean,
        new_var,
        np.asarray(tracked + 1),
        _track(*old, compiled(mean), compiled(var), *numbers, new_mean, new_var),
    )
