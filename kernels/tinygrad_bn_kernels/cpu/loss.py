"""Softmax cross-entropy, one row at a time: each row is read while it is in cache, and no (M, C) temporary is made."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinygrad_bn_kernels import kernel
from tinygrad_bn_kernels.cpu.arrays import compiled
from tinygrad_bn_kernels.cpu.jit import njit

Array = NDArray[Any]


@njit()
def _log_normalizer(row: Array) -> tuple[float, float]:
    """The largest logit, and the log of the sum of exp(logit - largest), in float64."""
    largest = row[0]
    for value in row:
        if value > largest:
            largest = value
    total = 0.0
    for value in row:
        total += np.exp(np.float64(value) - largest)
    return np.float64(largest), np.log(total)


@njit()
def _forward(x: Array, target: Array, weight: Array, smoothing: float, loss: Array) -> None:
    classes = x.shape[1]
    for i in range(x.shape[0]):
        largest, log_sum = _log_normalizer(x[i])
        t = target[i]
        total = -(1 - smoothing) * weight[t] * (x[i, t] - largest - log_sum)
        if smoothing > 0:
            for c in range(classes):
                total -= smoothing / classes * weight[c] * (x[i, c] - largest - log_sum)
        loss[i] = total


@njit()
def _backward(g: Array, x: Array, target: Array, weight: Array, smoothing: float, gx: Array, gweight: Array) -> None:
    classes = x.shape[1]
    spread = 0.0  # what label smoothing takes from the target and gives to all classes
    for c in range(classes):
        spread += smoothing / classes * weight[c]
    for i in range(x.shape[0]):
        largest, log_sum = _log_normalizer(x[i])
        t = target[i]
        mass = (1 - smoothing) * weight[t] + spread
        for c in range(classes):
            log_p = x[i, c] - largest - log_sum
            gx[i, c] = g[i] * (mass * np.exp(log_p) - smoothing / classes * weight[c])
            if smoothing > 0:  # 0 · log_p would be NaN for a class that is masked by −inf
                gweight[c] -= g[i] * smoothing / classes * log_p
        gx[i, t] -= g[i] * (1 - smoothing) * weight[t]
        gweight[t] -= g[i] * (1 - smoothing) * (x[i, t] - largest - log_sum)


def _prepared(x: Array, target: Array, weight: Array) -> tuple[Array, Array, Array]:
    """Checked, since the loops would read and write outside the arrays, and as the loops want them."""
    if target.shape != x.shape[:1] or weight.shape != x.shape[1:]:
        raise ValueError(f"logits {x.shape}, targets {target.shape} and weights {weight.shape} do not fit")
    if target.size and not 0 <= target.min() <= target.max() < x.shape[1]:
        raise IndexError(f"targets lie in {target.min()} to {target.max()}, classes in 0 to {x.shape[1] - 1}")
    x = compiled(x)
    return x, compiled(target, np.int64), compiled(weight, x.dtype)


@kernel("softmax_cross_entropy", "cpu")
def softmax_cross_entropy(x: Array, target: Array, weight: Array, *, smoothing: float) -> Array:
    """Loss of each row: x (M, C) logits, target (M,) class indices, weight (C,) of the classes; gives (M,)."""
    loss = np.empty(len(x), np.result_type(x, np.float32))
    _forward(*_prepared(x, target, weight), smoothing, loss)
    return loss.astype(x.dtype, copy=False)


@kernel("softmax_cross_entropy.vjp", "cpu")
def softmax_cross_entropy_vjp(
    g: Array, y: Array, x: Array, target: Array, weight: Array, *, smoothing: float
) -> tuple[Array, None, Array]:
    """Gradients of the rows' losses with respect to logits and class weights: g (M,) to (M, C) and (C,)."""
    x, target, weight = _prepared(x, target, weight)
    gx, gweight = np.empty_like(x), np.zeros_like(weight)
    _backward(compiled(g, x.dtype), x, target, weight, smoothing, gx, gweight)
    return gx, None, gweight
