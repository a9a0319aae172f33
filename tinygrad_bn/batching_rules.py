"""How each op runs once for all samples of `vmap`: one rule for each family of ops.

A rule gets the op and its operands as one sample sees them. It returns the result for all samples, with the axis of the
samples first, and the by-products. A fused op without a rule runs as its composition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from tinygrad_bn import tensor
from tinygrad_bn.more_ops import getitem, scatter_add, stack
from tinygrad_bn.ops import astype, broadcast_to, matmul, reshape, sum, sum_to, transpose, where
from tinygrad_bn.tensor import OPS, Op

Level: TypeAlias = Any  # a `batching.Level`, which is built on this
Params: TypeAlias = dict[str, Any]
Result: TypeAlias = tuple[Any, Sequence[Any]]
Rule: TypeAlias = Callable[[Level, Op, Sequence[Any], Params], Result]


# Ops that do not run for samples one by one, and what to do instead. Optimisers do not either.
REFUSED = {
    "dropout_by_key": "drop nothing, or call the function once for each sample",
    "running_statistics": "a BatchNorm in training moves its running statistics: use eval(), freeze() or a layer with "
    "track_running_stats=False",
    "squared_norm": "take functional.sum_of_squares",
}


def rule_of(op: Op) -> Rule | None:
    """The rule of an op, or None. One that this package does not know runs once for each sample."""
    if op.fused or op.updates or op.name in REFUSED:
        return RULES.get(op.name)
    return RULES.get(op.name, _one_by_one)


def _run(op: Op | str, xs: Sequence[Any], params: Params) -> Result:
    return tensor.apply(OPS[op] if isinstance(op, str) else op, xs, params)


def _ndim(x: Any) -> int:
    return int(getattr(x, "ndim", 0))


def _aligned(level: Level, xs: Sequence[Any]) -> list[Any]:
    """Operands that broadcast: the samples are the first of as many axes as the longest shape needs."""
    ndim = max(map(_ndim, xs))
    return [
        reshape(x.value, shape=(level.size, *(1,) * (ndim - x.ndim), *x.shape)) if level.holds(x) else x for x in xs
    ]


def _axis(axis: int, ndim: int) -> int:
    """An axis of a sample from 0 on. Raises IndexError if it is not there; without axes, 0 and −1 are, as in NumPy."""
    if not -max(ndim, 1) <= axis < max(ndim, 1):
        raise IndexError(f"axis {axis} is out of bounds for a sample of {ndim} axes")
    return int(axis) % max(ndim, 1)


def _elementwise(level: Level, op: Op, xs: Sequence[Any], params: Params) -> Result:
    return _run(op, _aligned(level, xs), params)


def _reduction(level: Level, op: Op, xs: Sequence[Any], params: Params) -> Result:
    [x], axis = xs, params["axis"]
    axes = range(x.ndim) if axis is None else [_axis(a, x.ndim) for a in np.atleast_1d(axis)]
    one: Any = tuple(int(a) + 1 for a in axes)
    kept = (level.size, *(1 if i in one else n for i, n in enumerate(x.shape, start=1)))
    value = x.value
    if not x.ndim or (axis is None and op.name in ("argmax", "argmin")):
        value, one = reshape(value, shape=(level.size, x.size)), (1,)
    one = one if op.name not in ("argmax", "argmin") else one[0]
    y, saved = _run(op, [value], {**params, "axis": one, "keepdims": False})
    return (reshape(y, shape=kept) if params["keepdims"] else y), saved


def _broadcast_to(level: Level, op: Op, xs: Sequence[Any], params: Params) -> Result:
    shape = np.broadcast_shapes(params["shape"]) if isinstance(params["shape"], int) else tuple(params["shape"])
    [x] = xs
    value = reshape(x.value, shape=(level.size, *(1,) * (len(shape) - x.ndim), *x.shape))
    return broadcast_to(value, shape=(level.size, *shape)), ()


def _sum_to(level: Level, op: Op, xs: Sequence[Any], params: Params) -> Result:
    [x], shape = xs, tuple(params["shape"])
    lead = x.ndim - len(shape)
    value = sum(x.value, axis=tuple(range(1, lead + 1))) if lead else x.value
    return sum_to(value, shape=(level.size, *shape)), ()


def _matmul(level: Level, op: Op, xs: Sequence[Any], params: Params) -> Result:
    a, b = xs
    if not (_ndim(a) and _ndim(b)):
        raise ValueError("matmul takes operands of at least one axis; for a number use *")
    if not level.holds(b) and b.ndim <= 2:
        return _run(op, [a.value, b], params)
    row, column = a.ndim == 1, b.ndim == 1
    wide = [a[None] if row else a, b[:, None] if column else b]
    y, _ = _run(op, _aligned(level, wide), params)
    if row or column:
        y = reshape(y, shape=(*y.shape[:-2], *y.shape[-2:-1][row:], *y.shape[-1:][column:]))
    return y, ()


def _linear(level: Level, op: Op, xs: Sequence[Any], params: Params) -> Result:
    x, weight, bias = xs
    if not level.holds(weight) and not level.holds(bias):
        return _run(op, [x.value, weight, bias], params)
    y = matmul(x, transpose(weight))
    return level.full(y if bias is None else y + bias), ()


def _reshape(level: Level, op: Op, xs: Sequence[Any], params: Params) -> Result:
    [x] = xs
    shape = np.broadcast_to(np.float32(0), x.shape).reshape(params["shape"]).shape  # without -1
    return reshape(x.value, shape=(level.size, *shape)), ()


def _transpose(level: Level, op: Op, xs: Sequence[Any], params: Params) -> Result:
    [x], axes = xs, params["axes"]
    order = range(x.ndim)[::-1] if axes is None else [_axis(a, x.ndim) for a in axes]
    return transpose(x.value, axes=(0, *(a + 1 for a in order))), ()


def _join(level: Level, op: Op, xs: Sequence[Any], params: Params) -> Result:
    ndim = _ndim(xs[0]) + (op.name == "stack")
    return _run(op, [level.full(x) for x in xs], {"axis": _axis(params["axis"], ndim) + 1})


def _pad(level: Level, op: Op, xs: Sequence[Any], params: Params) -> Result:
    return _run(op, [xs[0].value], {**params, "width": ((0, 0), *params["width"])})


# ---- indexing -------------------------------------------------------------------------------------------


def _is_array(part: Any) -> bool:
    return isinstance(part, list | tuple) or _ndim(part) > 0


def _place(index: tuple[Any, ...]) -> int:
    """Where the samples, the first axis of the indexed array, are in the result.

    NumPy puts the axes of several arrays first if a slice, None or an ellipsis stands between them.
    """
    if not any(map(_is_array, index)):
        return 0
    at = [i for i, part in enumerate(index) if _is_array(part) or isinstance(part, int | np.integer)]
    if at == list(range(at[0], at[-1] + 1)):
        return 0
    arrays = [np.asarray(index[i]) for i in at]
    return max(1 if a.dtype == bool else a.ndim for a in arrays)


def _first(x: Any, place: int) -> Any:
    return transpose(x, axes=(place, *(i for i in range(x.ndim) if i != place))) if place else x


def _index(level: Level, xs: Sequence[Any], index: Any) -> tuple[Any, int, Any]:
    """The index for all samples of an array that has a first axis for them, its `_place`, and that array."""
    [x] = xs
    parts = index if isinstance(index, tuple) else (index,)
    if not any(map(level.holds, parts)):
        return (slice(None), *parts), _place(parts), x.value
    if not all(_is_array(p) or isinstance(p, int | np.integer) or level.holds(p) for p in parts):
        raise NotImplementedError("under vmap, an index of each sample has integers and arrays only")
    if any(p.dtype == bool for p in parts if level.holds(p)):
        raise NotImplementedError("under vmap, a mask would give each sample a shape of its own: use functional.where")
    aligned = [p if not isinstance(p, tensor.Tensor) else p._data for p in _aligned(level, parts)]
    samples = np.arange(level.size).reshape(-1, *(1,) * max(map(_ndim, parts)))
    return (samples, *aligned), 0, level.full(x)


def _getitem(level: Level, op: Op, xs: Sequence[Any], params: Params) -> Result:
    index, place, x = _index(level, xs, params["index"])
    return _first(getitem(x, index=index), place), ()


def _scatter_add(level: Level, op: Op, xs: Sequence[Any], params: Params) -> Result:
    index, place, x = _index(level, xs, params["index"])
    if place:
        x = transpose(x, axes=(*range(1, place + 1), 0, *range(place + 1, x.ndim)))
    return scatter_add(x, index=index, shape=(level.size, *params["shape"])), ()


# ---- layers ---------------------------------------------------------------------------------------------


def _folded(x: Any) -> Any:
    """(B, N, ...) as (B · N, ...)."""
    return reshape(x, shape=(x.shape[0] * x.shape[1], *x.shape[2:]))


def _unfolded(y: Any, size: int) -> Any:
    return reshape(y, shape=(size, y.shape[0] // max(size, 1), *y.shape[1:]))


def _one_by_one(level: Level, op: Op, xs: Sequence[Any], params: Params) -> Result:
    """Any op, once for each sample."""
    each = [
        _run(op, [getitem(x.value, index=(i,)) if level.holds(x) else x for x in xs], params) for i in range(level.size)
    ]
    saved = [stack(*map(_tensor, parts), axis=0) for parts in zip(*(s for _, s in each), strict=True)]
    return stack(*(y for y, _ in each), axis=0), saved


def _tensor(s: Any) -> Any:
    """A by-product as a tensor, which in a vmap around this one it is already."""
    return s if isinstance(s, tensor.Tensor) else tensor.Tensor(s)


def _by_sample(level: Level, op: Op, xs: Sequence[Any], params: Params) -> Result:
    """An op that treats each of its N inputs by itself: B · N inputs."""
    y, _ = _run(op, [_folded(xs[0].value), *xs[1:]], params)
    return _unfolded(y, level.size), ()


def _into_channels(x: Any) -> Any:
    """(B, N, C, ...) as (N, B · C, ...)."""
    x = transpose(x, axes=(1, 0, *range(2, x.ndim)))
    return reshape(x, shape=(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:]))


def _from_channels(y: Any, size: int) -> Any:
    y = reshape(y, shape=(y.shape[0], size, y.shape[1] // max(size, 1), *y.shape[2:]))
    return transpose(y, axes=(1, 0, *range(2, y.ndim)))


def _convolution(level: Level, op: Op, xs: Sequence[Any], params: Params) -> Result:
    """Each sample is a group of channels of its own."""
    if op.name != "conv_weight" and not any(map(level.holds, xs[1:])):
        return _by_sample(level, op, xs, params)
    x, other, *bias = map(level.full, xs)
    groups = {**params, "groups": params["groups"] * level.size}
    if op.name == "conv_weight":
        y, _ = _run(op, [_into_channels(x), _into_channels(other)], groups)
        return _unfolded(y, level.size), ()
    y, _ = _run(op, [_into_channels(x), _folded(other), *map(_folded, bias)], groups)
    return _from_channels(y, level.size), ()


def _batch_norm(level: Level, op: Op, xs: Sequence[Any], params: Params) -> Result:
    """Each sample has channels of its own."""
    full = [x if x is None else level.full(x) for x in xs]
    y, saved = _run(op, [x if x is None else _folded(x) if x.ndim == 2 else _into_channels(x) for x in full], params)
    y = _unfolded(y, level.size) if y.ndim == 1 else _from_channels(y, level.size)
    return y, [_unfolded(_tensor(s), level.size) for s in saved]


def _cross_entropy(level: Level, op: Op, xs: Sequence[Any], params: Params) -> Result:
    """The loss of every row, reduced for each sample."""
    x, target, weight = xs
    if level.holds(weight):
        raise NotImplementedError("under vmap, the class weights of a loss have to be the same for all samples")
    rows, classes = (_folded(level.full(v)) for v in (x, target))
    loss, (normalizer, _) = _run(op, [rows, classes, weight], {**params, "reduction": "none"})
    loss, normalizer = (_unfolded(_tensor(v), level.size) for v in (loss, normalizer))
    counts = _unfolded(classes, level.size) != params["ignore_index"]
    if weight is None:
        total = sum(astype(counts, dtype=np.float64), axis=1)
    else:
        each = getitem(weight, index=where(counts, _unfolded(classes, level.size), 0)._data)
        total = sum(where(counts, astype(each, dtype=np.float64), 0.0), axis=1)
    if params["reduction"] != "none":
        loss = sum(loss, axis=1)
    if params["reduction"] == "mean":
        loss = astype(loss / total, dtype=loss.dtype)
    return loss, (normalizer, total)


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        (
            "add", "sub", "mul", "div", "neg", "pow", "exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "abs", "sign",
            "relu", "clip", "maximum", "minimum", "tanh", "sech_squared", "sigmoid", "softplus", "silu", "gelu", "erf",
            "erfc", "where", "equal", "not_equal", "less", "less_equal", "greater", "greater_equal", "astype", "to",
        ),
        _elementwise,
    ),
    **dict.fromkeys(
        ("sum", "max", "min", "argmax", "argmin", "mean", "var", "std", "sum_of_squares", "logsumexp"), _reduction
    ),
    **dict.fromkeys(("conv", "conv_input", "conv_weight", "conv_with_bias"), _convolution),
    **dict.fromkeys(("max_pool", "max_pool_places"), _by_sample),
    **dict.fromkeys(
        (
            "batch_norm_training", "batch_norm_relu", "batch_norm_inference", "batch_norm_gradient",
            "batch_norm_weight_gradient",
        ),
        _batch_norm,
    ),
    **dict.fromkeys(("concatenate", "stack"), _join),
    "broadcast_to": _broadcast_to,
    "sum_to": _sum_to,
    "matmul": _matmul,
    "linear": _linear,
    "reshape": _reshape,
    "transpose": _transpose,
    "pad": _pad,
    "getitem": _getitem,
    "scatter_add": _scatter_add,
    "softmax_cross_entropy": _cross_entropy,
}  # fmt: skip
