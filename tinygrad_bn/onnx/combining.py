"""The operators of ONNX that combine elements: reductions, products, normalisation and losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tinygrad_bn import functional as F
from tinygrad_bn.functional.normalization import block_norm
from tinygrad_bn.more_ops import getitem, pad
from tinygrad_bn.onnx.errors import OnnxError
from tinygrad_bn.onnx.operators import (
    OPERATORS,
    Ints,
    Operator,
    Value,
    array_of,
    axes_of,
    axis_of,
    ints,
    of_arrays,
    of_several,
    operator,
)  # fmt: skip

# ---- reductions -----------------------------------------------------------------------------------------


def _reduction(reduce: Callable[..., Value]) -> Operator:
    def run(x: Value, axes: Value = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Value:
        axis = None if axes is None or not len(ints(axes)) else axes_of(axes, x.ndim)
        if axis is None and noop_with_empty_axes:
            axis = ()
        return reduce(x, axis=axis, keepdims=bool(keepdims))

    return run


def _whole(reduce: Callable[..., Value]) -> Callable[..., Value]:
    """A reduction whose result has the dtype of x: integers stay integers."""

    def run(x: Value, **options: Any) -> Value:
        y = reduce(x, **options)
        return y if y.dtype == x.dtype else F.astype(y, dtype=x.dtype)

    return run


def _extreme(reduce: Callable[..., Value], infinite: float) -> Callable[..., Value]:
    """max or min, where the result for no elements is the number of the dtype that is nearest to `infinite`."""

    def run(x: Value, *, axis: Any, keepdims: bool) -> Value:
        if x.size:
            return reduce(x, axis=axis, keepdims=keepdims)
        shape = np.empty(x.shape, bool).any(axis=axis, keepdims=keepdims).shape
        if x.dtype.kind == "f":
            return np.full(shape, infinite, x.dtype)
        least, most = (False, True) if x.dtype == bool else (np.iinfo(x.dtype).min, np.iinfo(x.dtype).max)
        return np.full(shape, least if infinite < 0 else most, x.dtype)

    return run


OPERATORS |= {
    "ReduceSum": _reduction(_whole(F.sum)), "ReduceMean": _reduction(_whole(F.mean)),
    "ReduceMax": _reduction(_extreme(F.max, -np.inf)),
    "ReduceMin": _reduction(_extreme(F.min, np.inf)),
    "ReduceL1": _reduction(_whole(lambda x, **o: F.sum(F.abs(x), **o))),
    "ReduceL2": _reduction(_whole(lambda x, **o: F.sqrt(F.sum(F.mul(x, x), **o)))),
    "ReduceSumSquare": _reduction(_whole(lambda x, **o: F.sum(F.mul(x, x), **o))),
    "ReduceLogSum": _reduction(_whole(lambda x, **o: F.log(F.sum(x, **o)))),
    "ReduceLogSumExp": _reduction(_whole(F.logsumexp)),
}  # fmt: skip


def _arg_extreme(find: Callable[..., Value]) -> Operator:
    def run(x: Value, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Value:
        if not select_last_index:
            return find(x, axis=axis, keepdims=bool(keepdims))
        backwards = getitem(x, index=(slice(None),) * (axis % x.ndim) + (slice(None, None, -1),))
        return x.shape[axis] - 1 - find(backwards, axis=axis, keepdims=bool(keepdims))

    return run


OPERATORS |= {"ArgMax": _arg_extreme(F.argmax), "ArgMin": _arg_extreme(F.argmin)}


def _normalised(function: Callable[..., Value]) -> Operator:
    """Softmax and its like. Before version 13 all axes from `axis` on were one."""

    def run(x: Value, *, axis: int | None = None, opset: int) -> Value:
        if opset >= 13:
            return function(x, -1 if axis is None else axis)
        start = axis_of(1 if axis is None else axis, x.ndim)
        rows = F.reshape(x, shape=(math.prod(x.shape[:start]), math.prod(x.shape[start:])))
        return F.reshape(function(rows, 1), shape=x.shape)

    return run


def _hardmax(x: Value, axis: int) -> Value:
    place = np.expand_dims(np.argmax(array_of(x), axis=axis), axis)
    return of_arrays(lambda x: (np.indices(x.shape)[axis] == place).astype(x.dtype))(x)


OPERATORS |= {
    "Softmax": _normalised(lambda x, axis: F.softmax(x, axis=axis)),
    "LogSoftmax": _normalised(lambda x, axis: F.log_softmax(x, axis=axis)),
    "Hardmax": _normalised(_hardmax),
}


# ---- products -------------------------------------------------------------------------------------------

OPERATORS["MatMul"] = F.matmul


@operator
def Gemm(
    a: Value, b: Value, c: Value = None, *, alpha: float = 1.0, beta: float = 1.0, transA: int = 0, transB: int = 0
) -> Value:
    if transB and not transA and alpha == beta == 1 and c is not None and c.shape == b.shape[:1]:
        return F.linear(a, b, c)
    y = F.matmul(F.transpose(a) if transA else a, F.transpose(b) if transB else b)
    y = y if alpha == 1 else y * alpha
    return y if c is None else y + (c if beta == 1 else c * beta)


# ---- normalisation --------------------------------------------------------------------------------------


@operator
def BatchNormalization(
    x: Value, scale: Value, bias: Value, mean: Value, var: Value, *, epsilon: float = 1e-5, momentum: float = 0.9,
    training_mode: int = 0, spatial: int = 1, outputs: int = 1, opset: int,
) -> Any:  # fmt: skip
    """With arrays for statistics; those of a file are an `nn.BatchNorm`, see `graph`."""
    if not spatial:
        raise OnnxError("BatchNormalization of each element (spatial=0) is not computed")
    if not training_mode:
        if outputs > 1:
            raise OnnxError("BatchNormalization has one output unless training_mode is 1")
        return F.batch_norm_inference(x, mean, var, scale, bias, eps=epsilon)
    y, (batch_mean, batch_var) = F.batch_norm_training.run(x, scale, bias, eps=epsilon)
    running = (old * momentum + F.astype(new, dtype=old.dtype) * (1 - momentum)
               for old, new in ((mean, batch_mean), (var, batch_var)))  # fmt: skip
    return (y, *running)[:outputs]


def _columns(v: Value, ndim: int) -> Value:
    """(C,) as it broadcasts along axis 1."""
    return F.reshape(v, shape=(-1, *(1,) * (ndim - 2)))


@operator
def InstanceNormalization(x: Value, scale: Value, bias: Value, *, epsilon: float = 1e-5) -> Value:
    return F.instance_norm(x, scale, bias, eps=epsilon)


@operator
def LayerNormalization(
    x: Value, scale: Value, bias: Value = None, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1,
    outputs: int = 1,
) -> Any:  # fmt: skip
    start = axis % x.ndim
    groups, size = math.prod(x.shape[:start]), math.prod(x.shape[start:])
    y = block_norm(x, None, None, blocks=(groups, 1, 1, size), eps=epsilon)
    y = F.mul(y, scale) if bias is None else F.mul(y, scale) + bias
    if outputs == 1:
        return y
    over, wide = tuple(range(start, x.ndim)), F.astype(x, dtype=np.float64)
    mean, var = (f(wide, axis=over, keepdims=True) for f in (F.mean, F.var))
    return (y, *(F.astype(v, dtype=np.float32) for v in (mean, F.rsqrt(var + epsilon))))[:outputs]


@operator
def RMSNormalization(x: Value, scale: Value, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> Value:
    return F.mul(F.rms_norm(x, x.shape[axis % x.ndim :], eps=epsilon), scale)


@operator
def GroupNormalization(
    x: Value, scale: Value, bias: Value, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1, opset: int
) -> Value:
    y = F.group_norm(x, num_groups, eps=epsilon)
    if opset < 21:  # scale and bias of each group
        each = x.shape[1] // num_groups
        repeated = np.repeat(np.arange(num_groups), each)
        scale, bias = (getitem(v, index=repeated) for v in (scale, bias))
    return F.mul(y, _columns(scale, x.ndim)) + _columns(bias, x.ndim)


@operator
def MeanVarianceNormalization(x: Value, *, axes: Ints = (0, 2, 3)) -> Value:
    centred = x - F.mean(x, axis=axes_of(axes, x.ndim), keepdims=True)
    return centred / (F.sqrt(F.mean(centred * centred, axis=axes_of(axes, x.ndim), keepdims=True)) + 1e-9)


@operator
def LpNormalization(x: Value, *, axis: int = -1, p: int = 2) -> Value:
    """x / (Σ |x|ᵖ)^(1 / p); 0 stays 0, with the gradient 0."""
    total = F.sum(F.abs(x) if p == 1 else x * x, axis=axis, keepdims=True)
    empty = total == 0
    size = F.where(empty, 1.0, total)
    return F.where(empty, x * 0, x / (size if p == 1 else F.sqrt(size)))


@operator
def LRN(x: Value, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0) -> Value:
    before = (size - 1) // 2
    width = [(0, 0)] * x.ndim
    width[1] = before, size - 1 - before
    padded, channels = pad(x * x, width=tuple(width)), x.shape[1]
    total = of_several(F.add)(*(getitem(padded, index=(slice(None), slice(i, i + channels))) for i in range(size)))
    return x / F.pow(total * (alpha / size) + bias, beta)


# ---- losses ---------------------------------------------------------------------------------------------


@operator
def NegativeLogLikelihoodLoss(
    x: Value, target: Value, weight: Value = None, *, ignore_index: int = -100, reduction: str = "mean"
) -> Value:
    return F.nll_loss(x, np.asarray(array_of(target)), weight, ignore_index=ignore_index, reduction=reduction)  # type: ignore[arg-type]


@operator
def SoftmaxCrossEntropyLoss(
    x: Value, target: Value, weight: Value = None, *, ignore_index: int = -100, reduction: str = "mean",
    outputs: int = 1,
) -> Any:  # fmt: skip
    log_probabilities = F.log_softmax(x, axis=1)
    loss = NegativeLogLikelihoodLoss(log_probabilities, target, weight, ignore_index=ignore_index, reduction=reduction)
    return (loss, log_probabilities)[:outputs]
