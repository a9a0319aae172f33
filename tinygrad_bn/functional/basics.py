"""Statistics, the softmax family, shapes, activations, and the functions of layers without statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tinygrad_bn import ops
from tinygrad_bn.autograd import Operand
from tinygrad_bn.ops import astype, erf, exp, expm1, log, matmul, reshape, sigmoid, sqrt, sub, sum, transpose, where
from tinygrad_bn.random import generator
from tinygrad_bn.tensor import Axis, Tensor

# ---- statistics -----------------------------------------------------------------------------------------


def values(x: Operand) -> Any:
    """The array of a tensor: a constant to every gradient."""
    return x._data if isinstance(x, Tensor) else np.asarray(x)


def count(x: Operand, axis: Axis) -> int:
    """How many elements of `x` a reduction over `axis` combines."""
    if axis is None:
        return int(x.size)
    return math.prod(x.shape[i] for i in np.atleast_1d(axis))


def mean(x: Operand, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """Arithmetic mean over `axis` (an int, a tuple, or None for all)."""
    if x.dtype == np.float16:  # whose sum may be too large for it
        return astype(mean(astype(x, dtype=np.float32), axis, keepdims), dtype=np.float16)
    return sum(x, axis=axis, keepdims=keepdims) / count(x, axis)


def var(x: Operand, axis: Axis = None, keepdims: bool = False, correction: float = 0) -> Tensor:
    """Variance over `axis`: Σ(x − mean)² / (n − correction).

    As in NumPy and the array API the default is the biased estimate; PyTorch's default is `correction=1`.
    """
    if x.dtype == np.float16:
        return astype(var(astype(x, dtype=np.float32), axis, keepdims, correction), dtype=np.float16)
    xmu = x - mean(x, axis, keepdims=True)
    return sum(xmu * xmu, axis=axis, keepdims=keepdims) / (count(x, axis) - correction)


def std(x: Operand, axis: Axis = None, keepdims: bool = False, correction: float = 0) -> Tensor:
    """Square root of `var`. Its gradient is taken as 0 where the variance is 0 (as in PyTorch)."""
    variance = var(x, axis, keepdims, correction)
    positive = variance > 0
    return where(positive, sqrt(where(positive, variance, 1.0)), 0.0)


def logsumexp(x: Operand, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """log Σ eˣ over `axis`, without overflow.

    The largest element, subtracted and added again, is a constant to the gradient; for any constant the formula
    is the same function of x, so derivatives of every order are right.
    """
    largest = _largest(x, axis)
    y = log(sum(exp(x - largest), axis=axis, keepdims=True)) + largest
    return y if keepdims else reshape(y, shape=np.sum(values(x), axis=axis).shape)


def _largest(x: Operand, axis: Axis) -> Any:
    """The largest element over `axis`, as an array; 0 where that is not finite."""
    largest = np.max(values(x), axis=axis, keepdims=True, initial=-np.inf)
    return np.where(np.isfinite(largest), largest, 0).astype(x.dtype)


def log_softmax(x: Operand, axis: int = -1) -> Tensor:
    """Logarithm of `softmax`, without overflow or underflow."""
    shifted = x - _largest(x, axis)  # before the logarithm: x − logsumexp(x) would be rounded at the size of x
    return sub(shifted, log(sum(exp(shifted), axis=axis, keepdims=True)))


def softmax(x: Operand, axis: int = -1) -> Tensor:
    """eˣ / Σ eˣ over `axis`."""
    return exp(log_softmax(x, axis))


# ---- shapes ---------------------------------------------------------------------------------------------


def concatenate(tensors: Sequence[Operand], axis: int = 0) -> Tensor:
    """Join tensors along an axis that they have."""
    return ops.concatenate(*tensors, axis=axis)


def stack(tensors: Sequence[Operand], axis: int = 0) -> Tensor:
    """Join tensors of one shape along a new axis."""
    return ops.stack(*tensors, axis=axis)


def flatten(x: Operand, start_axis: int = 1) -> Tensor:
    """Merge the axes from `start_axis` on into one: (N, C, H, W) to (N, C·H·W)."""
    return reshape(x, shape=(*x.shape[:start_axis], math.prod(x.shape[start_axis:])))


# ---- activations ----------------------------------------------------------------------------------------


def leaky_relu(x: Operand, negative_slope: float = 0.01) -> Tensor:
    """x where x > 0, negative_slope · x elsewhere."""
    return where(x > 0, x, x * negative_slope)


def elu(x: Operand, alpha: float = 1.0) -> Tensor:
    """x where x > 0, alpha · (eˣ − 1) elsewhere."""
    positive = x > 0
    return where(positive, x, alpha * expm1(where(positive, 0.0, x)))  # no overflow in the branch not taken


def silu(x: Operand) -> Tensor:
    """x · sigmoid(x), also called swish."""
    return sigmoid(x) * x


def gelu(x: Operand) -> Tensor:
    """x · Φ(x), with the normal distribution function Φ itself (no tanh approximation)."""
    return (erf(x * math.sqrt(0.5)) + 1) * x * 0.5


# ---- layers' functions ----------------------------------------------------------------------------------


def linear(x: Operand, weight: Operand, bias: Operand | None = None) -> Tensor:
    """x Wᵀ + b: x (..., in), weight (out, in), bias (out,) or None; gives (..., out)."""
    return matmul(x, transpose(weight)) if bias is None else ops.linear(x, weight, bias)


def dropout(x: Operand, p: float = 0.5, training: bool = True, rng: np.random.Generator | None = None) -> Operand:
    """In training, zero each element with probability `p` and scale the others by 1 / (1 − p).

    Draws from `rng`, or else from the package's generator (see `manual_seed`).

    Raises:
        ValueError: `p` is not in [0, 1].
    """
    if not 0 <= p <= 1:
        raise ValueError(f"dropout probability has to be in [0, 1]; got {p}")
    if not training or p == 0:
        return x
    kept = (rng or generator()).random(x.shape, dtype=np.float32) >= p
    return x * kept.astype(x.dtype) * (1 / (1 - p) if p < 1 else 0.0)
