"""Softmax and its kin, with an exponential of our own: the compiler has no vector form of the C library's.

Cross-entropy takes one row at a time: it is read while it is in cache, and no (M, C) temporary is made.
"""

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, types
from numba.extending import intrinsic

from tinygrad_bn_kernels import kernel
from tinygrad_bn_kernels.cpu.arrays import Array, compiled
from tinygrad_bn_kernels.cpu.jit import SUMS, njit
from tinygrad_bn_kernels.cpu.memory import empty_like
from tinygrad_bn_kernels.cpu.threads import EXP_COST, split

if config.DISABLE_JIT:  # type: ignore[attr-defined]

    def _from_bits(bits):
        """The float64 that has these 64 bits."""
        return np.int64(bits).view(np.float64)

else:

    @intrinsic
    def _from_bits(typingctx, bits):
        """The float64 that has these 64 bits."""

        def codegen(context, builder, signature, args):
            return builder.bitcast(args[0], ir.DoubleType())

        return types.float64(types.int64), codegen


LOG2_E = 1 / math.log(2)
LN2_HIGH = 0.693147180369123816490  # its last 21 bits are 0, so that k · LN2_HIGH is exact (fdlibm's e_exp.c)
LN2_LOW = 1.90821492927058770002e-10


@njit(fastmath={"contract"})
def _exp(x):
    """eˣ in float64 to 2 units in the last place, but 0 for x below −707; NaN stays NaN.

    eˣ = 2ᵏ eʳ with |r| ≤ log(2) / 2, and eʳ by its Taylor polynomial of degree 13, whose rest is below 2⁻⁵³.
    """
    inside = x if x > -707.0 else -707.0  # so that k is an exponent of float64, for NaN as well
    inside = inside if inside < 709.782 else 709.782
    k = np.floor(inside * LOG2_E + 0.5)
    r = (inside - k * LN2_HIGH) - k * LN2_LOW
    p = 1 / 6227020800.0
    p = p * r + 1 / 479001600.0
    p = p * r + 1 / 39916800.0
    p = p * r + 1 / 3628800.0
    p = p * r + 1 / 362880.0
    p = p * r + 1 / 40320.0
    p = p * r + 1 / 5040.0
    p = p * r + 1 / 720.0
    p = p * r + 1 / 120.0
    p = p * r + 1 / 24.0
    p = p * r + 1 / 6.0
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    e = (p + p) * _from_bits((np.int64(k) + 1022) << 52)  # 2ᵏ alone overflows before eˣ does
    e = 0.0 if x <= -707.0 else np.inf if x > 709.782 else e
    return e if x == x else x


# ---- cross-entropy ---------------------------------------------------------------------------------------


@njit(fastmath=SUMS)
def _log_normalizer(row):
    """The largest logit, and the log of the sum of exp(logit − largest), in float64."""
    largest = row[0]
    for j in range(1, row.size):
        largest = row[j] if row[j] > largest else largest
    top = np.float64(largest)
    total = 0.0
    for j in range(row.size):
        total += _exp(np.float64(row[j]) - top)
    return top, np.log(total)


# What follows must not be reassociated: (x − largest) − log_sum keeps digits where x − (largest + log_sum) is rounded
# at the size of the logits.


@njit(fastmath={"contract"})
def _forward(x, target, weight, ignore_index, smoothing, loss, mass, normalizer, start, stop):
    """The loss of each row, the weight that its target has in the mean, and what the backward pass needs again."""
    classes = x.shape[1]
    for i in range(start, stop):
        t = target[i]
        if t == ignore_index:
            loss[i] = mass[i] = 0.0
            continue
        largest, log_sum = _log_normalizer(x[i])
        normalizer[i, 0], normalizer[i, 1] = largest, log_sum
        total = -(1 - smoothing) * weight[t] * ((np.float64(x[i, t]) - largest) - log_sum)
        if smoothing > 0:
            for c in range(classes):
                total -= smoothing / classes * weight[c] * ((np.float64(x[i, c]) - largest) - log_sum)
        loss[i] = total
        mass[i] = weight[t]


@njit(fastmath={"contract"})
def _backward(g, x, target, weight, ignore_index, smoothing, normalizer, gx, start, stop):
    classes = x.shape[1]
    spread = 0.0  # what label smoothing takes from the target and gives to all classes
    for c in range(classes):
        spread += smoothing / classes * weight[c]
    for i in range(start, stop):
        row, out, t = x[i], gx[i], target[i]
        if t == ignore_index:
            for c in range(classes):
                out[c] = 0.0
            continue
        largest, log_sum, gi = normalizer[i, 0], normalizer[i, 1], g[i]
        mass = gi * ((1 - smoothing) * weight[t] + spread)
        for c in range(classes):
            out[c] = mass * _exp((np.float64(row[c]) - largest) - log_sum)
        if smoothing > 0:
            for c in range(classes):
                out[c] -= gi * smoothing / classes * weight[c]
        out[t] -= gi * (1 - smoothing) * weight[t]


@njit()
def _wrong(target, classes, ignore_index):
    """The first row whose target is no class; -1 if there is none."""
    for i in range(target.size):
        if not (0 <= target[i] < classes or target[i] == ignore_index):
            return i
    return -1


def _prepared(x: Array, target: Array, weight: Array, ignore_index: int) -> tuple[Array, Array, Array]:
    """As the loops want them, and checked, since they would read and write outside the arrays."""
    if target.shape != x.shape[:1] or weight.shape != x.shape[1:] or not x.shape[1]:
        raise ValueError(f"logits {x.shape}, targets {target.shape} and weights {weight.shape} do not fit")
    classes = compiled(target, np.int64)
    wraps = target.dtype == np.uint64 and target.size and target.max() >= 1 << 63
    if (i := int(target.argmax()) if wraps else _wrong(classes, x.shape[1], ignore_index)) >= 0:
        raise ValueError(f"target {target[i]} is not one of the {x.shape[1]} classes 0 to {x.shape[1] - 1}")
    return compiled(x), classes, compiled(weight, np.float64)


@kernel("softmax_cross_entropy", "cpu")
def softmax_cross_entropy(
    x: Array, target: Array, weight: Array, *, smoothing: float, ignore_index: int, reduction: str
) -> tuple[Any, Array, float]:
    """x (M, C) logits, target (M,) classes, weight (C,): the loss, what backward needs again, and Σ weights of targets.

    The loss is that of each row (M,) for the reduction "none", else one number. Raises ValueError for a target that
    is no class.
    """
    ignore_index, smoothing = int(ignore_index), float(smoothing)
    logits, target, weight = _prepared(x, target, weight, ignore_index)
    loss, mass, normalizer = np.empty(len(x)), np.empty(len(x)), np.empty((len(x), 2))
    args = logits, target, weight, ignore_index, smoothing, loss, mass, normalizer
    split(_forward, len(x), EXP_COST * x.size, *args)
    total = float(np.add.reduce(mass))
    if reduction == "none":
        return loss.astype(x.dtype), normalizer, total
    summed = np.add.reduce(loss)
    return (summed if reduction == "sum" else summed / total).astype(x.dtype), normalizer, total


@kernel("softmax_cross_entropy.vjp", "cpu")
def softmax_cross_entropy_vjp(
    g: Array,
    y: Array,
    x: Array,
    target: Array,
    weight: Array,
    *,
    needs: list[bool],
    smoothing: float,
    ignore_index: int,
    reduction: str,
    normalizer: Array,
    total: float,
) -> Any:
    """The gradient with respect to the logits; that of the weights is left to the composition."""
    if needs[2]:
        return NotImplemented
    ignore_index, smoothing = int(ignore_index), float(smoothing)
    logits, target, weight = _prepared(x, target, weight, ignore_index)
    gx = empty_like(logits)
    if x.size:
        each = np.empty(len(x))
        each[...] = np.divide(g, total, dtype=np.float64) if reduction == "mean" else g
        split(
            _backward, len(x), EXP_COST * x.size, each, logits, target, weight, ignore_index, smoothing, normalizer, gx
        )
    return gx, None, None


# ---- logsumexp -------------------------------------------------------------------------------------------


@njit(fastmath=SUMS)
def _exp_sums(x, shift, total, start, stop):
    """Σ exp(x − shift) along the rows of x (M, D)."""
    for i in range(start, stop):
        row, top = x[i], np.float64(shift[i])
        s = 0.0
        for j in range(row.size):
            s += _exp(np.float64(row[j]) - top)
        total[i] = s


@kernel("logsumexp_fused", "cpu")
def logsumexp_fused(x: Array, *, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Any:
    """log Σ eˣ over `axis`, summed in float64, in x's dtype."""
    if x.dtype.char not in "fd" or not x.size:
        return NotImplemented
    axes = tuple(range(x.ndim)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    largest = np.max(x, axis=axes, keepdims=True)
    shift = np.where(np.isfinite(largest), largest, 0).astype(x.dtype)
    last = {a % x.ndim for a in axes}
    order = (*(i for i in range(x.ndim) if i not in last), *sorted(last))
    rows = compiled(x.transpose(order)).reshape(largest.size, -1)
    total = np.empty(len(rows))
    split(_exp_sums, len(rows), EXP_COST * x.size, rows, shift.reshape(-1), total)
    with np.errstate(divide="ignore"):
        y = (np.log(total).reshape(shift.shape) + shift).astype(x.dtype)
    return y if keepdims else y.reshape(tuple(n for i, n in enumerate(x.shape) if i not in last))
