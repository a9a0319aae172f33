"""BatchNorm in training over (N, C, S): statistics, output and gradients; and the running statistics.

With S = 1 the loops of `norm_rows` run, otherwise those of `norm_planes`. Statistics are sums of x − shift in float64;
the shift is the channel's first element. So they are accurate at any mean, and the variance of a constant channel is 0.
Gradients far from 0 are shifted likewise: Σ x̂ is 0, so the shift only changes the gradient of the bias, where it is
added again.
"""

from typing import Any

import numpy as np

from tinygrad_bn_kernels import kernel
from tinygrad_bn_kernels.cpu.arrays import Array, compiled
from tinygrad_bn_kernels.cpu.jit import njit
from tinygrad_bn_kernels.cpu.memory import empty_like
from tinygrad_bn_kernels.cpu.norm_planes import planes_backward, planes_forward
from tinygrad_bn_kernels.cpu.norm_rows import rows_backward, rows_forward
from tinygrad_bn_kernels.cpu.norm_terms import are_sound, is_ordinary
from tinygrad_bn_kernels.cpu.threads import split

Vector = Array | None  # (C,); a weight of None is 1, a bias of None is 0


# ---- state -----------------------------------------------------------------------------------------------


@njit(allocates=False)
def _track(running_mean, running_var, mean, var, momentum, unbias, new_mean, new_var):
    finite = True
    for c in range(mean.size):
        new_mean[c] = (1 - momentum) * running_mean[c] + momentum * mean[c]
        new_var[c] = (1 - momentum) * running_var[c] + momentum * (var[c] * unbias)
        finite &= np.isfinite(new_mean[c]) & np.isfinite(new_var[c])
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


def takes(x: Array) -> bool:
    """Whether a kernel computes this; otherwise the composition does, or raises an error."""
    return x.dtype.kind == "f" and x.ndim > 1


def _forward(x: Array, weight: Vector, bias: Vector, eps: float, relu: bool) -> Any:
    if not takes(x) or 0 < x.size == x.shape[1]:  # one value per channel is an error
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
        good = rows_forward(xs, *affine, eps, relu, ys, mean, var)
    else:
        split(planes_forward, channels, x.size, xs, *affine, eps, relu, ys, mean, var)
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
            good, sound = rows_backward(*arguments)
        else:
            split(planes_backward, channels, x.size, *arguments)
            good = is_ordinary(affine[0], mean, var, eps)
            sound = are_sound(gweight, gbias, var, eps, x.size / channels, source.itemsize)
        lost = not sound and not np.isnan(mean).any() and np.isfinite(g).all()
        if not good or lost:
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
    old = compiled(running_mean), compiled(running_var)
    batch = compiled(mean, np.float64), compiled(var, np.float64)
    new_mean, new_var = np.empty_like(running_mean), np.empty_like(running_var)
    finite = _track(*old, *batch, float(momentum), float(unbias), new_mean, new_var)
    counted = np.array(tracked.item() + 1, tracked.dtype)  # NumPy's sum of a 0-d array takes three times as long
    return new_mean, new_var, counted, finite
