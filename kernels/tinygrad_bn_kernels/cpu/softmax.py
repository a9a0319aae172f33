"""Cross-entropy and logsumexp.

Cross-entropy takes one row at a time, while it is in cache, and makes no (M, C) temporary.
"""

from typing import Any

import numpy as np

from tinygrad_bn_kernels import kernel
from tinygrad_bn_kernels.cpu.arrays import Array, compiled
from tinygrad_bn_kernels.cpu.exponential import exp
from tinygrad_bn_kernels.cpu.jit import SUMS, inlined, njit
from tinygrad_bn_kernels.cpu.memory import empty_like
from tinygrad_bn_kernels.cpu.threads import EXP_COST, split

Axis = int | tuple[int, ...] | None

_FLOAT64, _INT64 = np.dtype(np.float64), np.dtype(np.int64)


# ---- cross-entropy ---------------------------------------------------------------------------------------


@inlined(fastmath=SUMS)
def _exponentials(row, shift):
    """Σ exp(x − shift) over elements other than the shift, and the number of those equal to it, in float64."""
    others, equal = 0.0, 0.0
    for j in range(row.size):
        d = np.float64(row[j]) - shift
        others += 0.0 if d == 0.0 else exp(d)
        equal += 1.0 if d == 0.0 else 0.0
    return others, equal


# No reassociation below: (x − largest) − log_sum keeps digits that x − (largest + log_sum) loses for large logits, and
# others + (equal − 1) keeps those that the sum of all exponentials loses.


@njit(allocates=False, fastmath={"contract"})
def _forward(x, target, weight, ignore_index, smoothing, loss, mass, normalizer, start, stop):
    """The loss of each row, the weight of its target, and its normalizer: the largest logit and the log of the sum."""
    classes = x.shape[1]
    for i in range(start, stop):
        t = target[i]
        if t == ignore_index:
            loss[i] = mass[i] = normalizer[i, 0] = normalizer[i, 1] = 0.0
            continue
        row = x[i]
        largest = np.float64(row[0])
        for c in range(1, classes):
            largest = row[c] if row[c] > largest else largest
        others, equal = _exponentials(row, largest)
        log_sum = np.log1p(others + (equal - 1))
        normalizer[i, 0], normalizer[i, 1] = largest, log_sum
        total = -(1 - smoothing) * weight[t] * ((np.float64(row[t]) - largest) - log_sum)
        if smoothing > 0:
            for c in range(classes):
                total -= smoothing / classes * weight[c] * ((np.float64(row[c]) - largest) - log_sum)
        loss[i] = total
        mass[i] = weight[t]


@njit(allocates=False, fastmath={"contract"})
def _backward(g, x, target, weight, ignore_index, smoothing, normalizer, gx, start, stop):
    classes = x.shape[1]
    spread = 0.0  # weight of the classes' share of label smoothing
    for c in range(classes):
        spread += smoothing / classes * weight[c]
    for i in range(start, stop):
        row, out, t = x[i], gx[i], target[i]
        if t == ignore_index:
            for c in range(classes):
                out[c] = 0.0
            continue
        largest, log_sum, gi = normalizer[i, 0], normalizer[i, 1], g[i]
        own = gi * ((1 - smoothing) * weight[t])
        mass = gi * ((1 - smoothing) * weight[t] + spread)
        for c in range(classes):
            out[c] = mass * exp((np.float64(row[c]) - largest) - log_sum)
        log_p = (np.float64(row[t]) - largest) - log_sum
        if smoothing > 0:
            for c in range(classes):
                out[c] -= gi * smoothing / classes * weight[c]
            out[t] = own * np.expm1(log_p) + gi * (spread * exp(log_p) - smoothing / classes * weight[t])
        else:
            out[t] = own * np.expm1(log_p)  # p − 1 loses its digits where p is near 1


@njit(allocates=False)
def _find_invalid(target, classes, ignore_index):
    """The first row whose target is not a class; -1 if all are."""
    for i in range(target.size):
        if not (0 <= target[i] < classes or target[i] == ignore_index):
            return i
    return -1


def _prepared(x: Array, target: Array, weight: Array | None, ignore_index: int) -> tuple[Array, Array, Array]:
    """Operands in the loops' dtypes; a weight of None is 1.

    Raises TypeError for targets that are not integers, ValueError for other shapes and for targets that are not
    classes: loops would access memory out of bounds.
    """
    rows, count = x.shape
    weight = np.ones(count) if weight is None else compiled(weight, _FLOAT64)
    if target.shape != (rows,) or weight.shape != (count,) or not count:
        raise ValueError(
            f"expected logits (M, C), targets (M,), weights (C,); got {x.shape}, {target.shape}, {weight.shape}"
        )
    if target.dtype.kind not in "iu":
        raise TypeError(f"targets are class indices, of an integer dtype; got {target.dtype}")
    classes = compiled(target, _INT64)
    wraps = target.dtype == np.uint64 and target.size and target.max() >= 1 << 63
    if (i := int(target.argmax()) if wraps else _find_invalid(classes, count, ignore_index)) >= 0:
        raise ValueError(f"target {target[i]} is not one of the {count} classes 0 to {count - 1}")
    return compiled(x), classes, weight


@kernel("softmax_cross_entropy", "cpu")
def softmax_cross_entropy(
    x: Array, target: Array, weight: Array | None, *, smoothing: float, ignore_index: int, reduction: str
) -> Any:
    """x (M, C) logits, target (M,) classes, weight (C,) or None: the loss, the normalizer (M, 2), Σ target weights.

    The loss is (M,) for the reduction "none", else one number. Raises ValueError for a target that is not a class.
    """
    if x.dtype.kind != "f" or reduction not in ("mean", "sum", "none") or not 0 <= smoothing <= 1:
        return NotImplemented
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
    weight: Array | None,
    *,
    needs: list[bool],
    smoothing: float,
    ignore_index: int,
    reduction: str,
    normalizer: Array,
    total: float,
) -> Any:
    """The gradient of the logits; NotImplemented if the weights need one."""
    if needs[2]:
        return NotImplemented
    ignore_index, smoothing = int(ignore_index), float(smoothing)
    logits, target, weight = _prepared(x, target, weight, ignore_index)
    gx = empty_like(logits)
    if x.size:
        gs = np.empty(len(x))
        gs[...] = np.divide(g, total, dtype=np.float64) if reduction == "mean" else g
        args = gs, logits, target, weight, ignore_index, smoothing, normalizer, gx
        split(_backward, len(x), EXP_COST * x.size, *args)
    return gx, None, None


# ---- logsumexp -------------------------------------------------------------------------------------------


@njit(allocates=False, fastmath={"contract"})
def _exp_sums(x, shift, total, start, stop):
    """Σ exp(x − shift) − 1 along the rows of x (M, D)."""
    for i in range(start, stop):
        others, equal = _exponentials(x[i], np.float64(shift[i]))
        total[i] = others + (equal - 1)


def _shifted_sums(x: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """A finite shift, the largest element over `axes`, in x's dtype, and Σ exp(x − shift) − 1, with these axes kept."""
    largest = np.max(x, axis=axes, keepdims=True)
    shift = np.where(np.isfinite(largest), largest, 0).astype(x.dtype)
    last = {a % x.ndim for a in axes}
    order = (*(i for i in range(x.ndim) if i not in last), *sorted(last))
    rows = compiled(x.transpose(order)).reshape(largest.size, -1)
    total = np.empty(len(rows))
    split(_exp_sums, len(rows), EXP_COST * x.size, rows, shift.reshape(-1), total)
    return shift, total.reshape(shift.shape)


def _axes(x: Array, axis: Axis) -> tuple[int, ...]:
    return tuple(range(x.ndim)) if axis is None else axis if isinstance(axis, tuple) else (axis,)


@kernel("logsumexp", "cpu")
def logsumexp(x: Array, *, axis: Axis = None, keepdims: bool = False) -> Any:
    """log Σ eˣ over `axis`, summed in float64, in x's dtype; exact also near 0."""
    if x.dtype.char not in "fd" or not x.size or not (x.ndim or axis in (None, ())):
        return NotImplemented
    shift, total = _shifted_sums(x, axes := _axes(x, axis))
    with np.errstate(divide="ignore"):
        y = (np.log1p(total) + shift).astype(x.dtype)
    return y if keepdims else np.squeeze(y, axes)


@kernel("logsumexp.vjp", "cpu")
def logsumexp_vjp(g: Array, y: Array, x: Array, *, needs: list[bool], axis: Axis = None, keepdims: bool = False) -> Any:
    """g · eˣ / Σ eˣ; exp(x − y) would be rounded at the size of y."""
    if x.dtype.char not in "fd" or not x.size or not (x.ndim or axis in (None, ())):
        return NotImplemented
    shift, total = _shifted_sums(x, _axes(x, axis))
    gx = np.exp(x - shift)
    with np.errstate(divide="ignore", invalid="ignore"):
        gx *= (g.reshape(total.shape) / (total + 1)).astype(x.dtype)
    return (gx,)
