"""Softmax, joining and flattening, activations, dropout."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tinygrad_bn import more_ops
from tinygrad_bn.arguments import expect_floats
from tinygrad_bn.functional.statistics import largest
from tinygrad_bn.more_ops import erf, expm1, sigmoid
from tinygrad_bn.ops import astype, exp, log, reshape, sub, sum, where
from tinygrad_bn.random import generator, philox
from tinygrad_bn.sample import REAL
from tinygrad_bn.tensor import Operand, Tensor, primitive

# ---- softmax --------------------------------------------------------------------------------------------


def log_softmax(x: Operand, axis: int = -1) -> Tensor:
    """Logarithm of `softmax`, without overflow or underflow."""
    if x.dtype == np.float16:  # which may not hold the sum
        return astype(log_softmax(astype(x, dtype=np.float32), axis), dtype=np.float16)
    shifted = x - largest(x, axis)  # before the logarithm: x − logsumexp(x) would be rounded at the size of x
    return sub(shifted, log(sum(exp(shifted), axis=axis, keepdims=True)))


def softmax(x: Operand, axis: int = -1) -> Tensor:
    """eˣ / Σ eˣ over `axis`."""
    return exp(log_softmax(x, axis))


# ---- shapes ---------------------------------------------------------------------------------------------


def concatenate(tensors: Sequence[Operand], axis: int = 0) -> Tensor:
    """Join tensors along an axis that they have."""
    return more_ops.concatenate(*tensors, axis=axis)


def stack(tensors: Sequence[Operand], axis: int = 0) -> Tensor:
    """Join tensors of one shape along a new axis."""
    return more_ops.stack(*tensors, axis=axis)


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


# ---- dropout --------------------------------------------------------------------------------------------


@primitive(
    lambda g, y, x, *, p, key: dropout_by_key(g, p=p, key=key),  # type: ignore[has-type]
    formula="y = x / (1 − p) where random(key) ≥ p, else 0;  ∂x = g, dropped and scaled in the same places",
    sample=lambda d: ((d.array(REAL, d.shape()),), {"p": d.choice([0.0, 0.4, 1.0]), "key": d.integer(0, 1000)}),
)
def dropout_by_key(x: Operand, *, p: float, key: int) -> Operand:
    """Zero each element with probability `p`, the same ones for the same key, and scale the others by 1 / (1 − p).

    Element i takes word i of the counter-based generator `random.philox`, so no mask has to be stored.
    """
    kept = philox(key, x.size).reshape(x.shape) >= np.uint64(round(p * 2**32))
    return np.where(kept, x * (1 / (1 - p) if p < 1 else 0.0), 0).astype(x.dtype)


def dropout(x: Operand, p: float = 0.5, training: bool = True, rng: np.random.Generator | None = None) -> Operand:
    """In training, zero each element with probability `p` and scale the others by 1 / (1 − p).

    One key for all elements is drawn from `rng`, or else from the package's generator (see `manual_seed`).

    Raises:
        ValueError: `p` is not in [0, 1].
        TypeError: x is not floating-point.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"dropout probability has to be in [0, 1]; got {p}")
    expect_floats(x, "dropout")
    if not training or p == 0:
        return x
    return dropout_by_key(x, p=p, key=int(generator(rng).integers(2**63)))
