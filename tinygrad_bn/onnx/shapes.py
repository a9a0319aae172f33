"""The operators of ONNX that move elements, or make arrays and shapes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tinygrad_bn import functional as F
from tinygrad_bn.arguments import expect_fits_memory
from tinygrad_bn.more_ops import getitem, pad
from tinygrad_bn.onnx.errors import OnnxError
from tinygrad_bn.onnx.operators import Ints, Value, array_of, axes_of, axis_of, ints, number, operator
from tinygrad_bn.tensor import Array


@operator
def Reshape(x: Value, shape: Value, *, allowzero: int = 0) -> Value:
    sizes = ints(shape)
    if not allowzero:
        sizes = tuple(x.shape[i] if n == 0 else n for i, n in enumerate(sizes))
    return F.reshape(x, shape=sizes)


@operator
def Flatten(x: Value, *, axis: int = 1) -> Value:
    start = axis_of(axis, x.ndim, beyond=1)
    return F.reshape(x, shape=(math.prod(x.shape[:start]), math.prod(x.shape[start:])))


@operator
def Transpose(x: Value, *, perm: Ints | None = None) -> Value:
    return F.transpose(x, axes=None if perm is None else tuple(perm))


@operator
def Squeeze(x: Value, axes: Value = None) -> Value:
    gone = [i for i, n in enumerate(x.shape) if n == 1] if axes is None else axes_of(axes, x.ndim)
    if any(x.shape[i] != 1 for i in gone):
        raise OnnxError(f"Squeeze of the axes {tuple(gone)} of {x.shape}, whose lengths are not 1")
    return F.reshape(x, shape=tuple(n for i, n in enumerate(x.shape) if i not in gone))


@operator
def Unsqueeze(x: Value, axes: Value) -> Value:
    ndim = x.ndim + len(ints(axes))
    new, rest = axes_of(axes, ndim), iter(x.shape)
    return F.reshape(x, shape=tuple(1 if i in new else next(rest) for i in range(ndim)))


@operator
def Concat(*xs: Value, axis: int) -> Value:
    return F.concatenate(list(xs), axis=axis)


@operator
def Split(
    x: Value, split: Value = None, *, axis: int = 0, num_outputs: int | None = None, outputs: int = 1
) -> tuple[Value, ...]:
    n, parts = x.shape[axis], num_outputs or outputs
    each = -(-n // parts)
    sizes = ints(split) if split is not None else [each] * (parts - 1) + [n - each * (parts - 1)]
    if sum(sizes) != n or min(sizes) < 0 or len(sizes) != outputs:
        raise OnnxError(f"Split of {n} elements into {outputs} parts of {sizes}")
    ends, before = np.cumsum(sizes), (slice(None),) * (axis % x.ndim)
    return tuple(
        getitem(x, index=(*before, slice(int(end) - size, int(end)))) for end, size in zip(ends, sizes, strict=True)
    )


@operator
def Slice(x: Value, starts: Value, ends: Value, axes: Value = None, steps: Value = None) -> Value:
    start, end = ints(starts), ints(ends)
    at = axes_of(range(len(start)) if axes is None else axes, x.ndim)
    index = [slice(None)] * x.ndim
    for i, axis in enumerate(at):
        step, n = 1 if steps is None else ints(steps)[i], x.shape[axis]
        first, last = (v + n if v < 0 else v for v in (start[i], end[i]))
        if step > 0:
            index[axis] = slice(max(first, 0), max(last, 0), step)
        else:  # from an element that is there; an end before the first element is None for Python
            index[axis] = slice(max(first, 0), None if last < 0 else last, step)
    return getitem(x, index=tuple(index))


@operator
def Gather(x: Value, indices: Value, *, axis: int = 0) -> Value:
    return getitem(x, index=(slice(None),) * axis_of(axis, x.ndim) + (np.asarray(array_of(indices)),))


@operator
def GatherElements(x: Value, indices: Value, *, axis: int = 0) -> Value:
    at = np.asarray(array_of(indices))
    index = list(np.ogrid[tuple(slice(n) for n in at.shape)])
    index[axis_of(axis, x.ndim)] = at
    return getitem(x, index=tuple(index))


@operator
def GatherND(x: Value, indices: Value, *, batch_dims: int = 0) -> Value:
    at = np.asarray(array_of(indices))
    lead = np.ogrid[tuple(slice(n) for n in x.shape[:batch_dims])]
    batch = tuple(b.reshape(b.shape + (1,) * (at.ndim - 1 - batch_dims)) for b in lead)
    return getitem(x, index=(*batch, *np.moveaxis(at, -1, 0)))


@operator
def Expand(x: Value, shape: Value) -> Value:
    wide = np.broadcast_shapes(x.shape, ints(shape))
    expect_fits_memory("the result of Expand", wide)
    return F.broadcast_to(x, shape=wide)


@operator
def Tile(x: Value, repeats: Value) -> Value:
    times = ints(repeats)
    expect_fits_memory("the result of Tile", [n * t for n, t in zip(x.shape, times, strict=True)])
    return getitem(x, index=np.ix_(*(np.tile(np.arange(n), t) for n, t in zip(x.shape, times, strict=True))))


@operator
def Pad(x: Value, pads: Value, value: Value = None, axes: Value = None, *, mode: str = "constant") -> Value:
    flat, at = ints(pads), range(x.ndim) if axes is None else axes_of(axes, x.ndim)
    width = [(0, 0)] * x.ndim
    for i, axis in enumerate(at):
        width[axis] = flat[i], flat[i + len(at)]
    if mode == "constant":
        inner = tuple(slice(max(-b, 0), n - max(-a, 0)) for (b, a), n in zip(width, x.shape, strict=True))
        x = getitem(x, index=inner) if min(flat, default=0) < 0 else x
        if getattr(value, "requires_grad", False):
            raise OnnxError("Pad by a value that gets a gradient is not computed")
        fill = 0 if value is None else np.asarray(array_of(value)).item()
        return pad(x, width=tuple((max(b, 0), max(a, 0)) for b, a in width), value=fill)
    if mode not in ("reflect", "edge", "wrap") or min(flat, default=0) < 0:
        raise OnnxError(f"Pad in the mode {mode!r} by {flat} is not computed")
    expect_fits_memory("the result of Pad", [n + b + a for n, (b, a) in zip(x.shape, width, strict=True)])
    places = (np.pad(np.arange(n), pair, mode=mode) for n, pair in zip(x.shape, width, strict=True))  # type: ignore[call-overload]
    return getitem(x, index=np.ix_(*places))


@operator
def Shape(x: Value, *, start: int = 0, end: int | None = None) -> Array:
    return np.array(x.shape[start:end], np.int64)


@operator
def Size(x: Value) -> Array:
    return np.array(x.size, np.int64)


@operator
def Constant(*, value: Any = None, value_float: Any = None, value_int: Any = None, value_floats: Any = None,
             value_ints: Any = None) -> Array:  # fmt: skip
    if value is not None:
        return np.asarray(value)
    if value_float is not None or value_floats is not None:
        return np.array(value_float if value_floats is None else value_floats, np.float32)
    return np.array(value_int if value_ints is None else value_ints, np.int64)


@operator
def ConstantOfShape(shape: Value, *, value: Any = None) -> Array:
    expect_fits_memory("the result of ConstantOfShape", ints(shape))
    fill = np.zeros(1, np.float32) if value is None else np.asarray(value)
    return np.full(ints(shape), fill.reshape(()), fill.dtype)


@operator
def Range(start: Value, limit: Value, delta: Value) -> Array:
    first, last, step = (np.asarray(array_of(v)) for v in (start, limit, delta))
    if not step or not np.isfinite([first, last, step]).all():
        raise OnnxError(f"Range from {first} to {last} by {step}")
    count = math.ceil(max((last - first) / step, 0))
    expect_fits_memory("the result of Range", (count,))
    return (first + np.arange(count) * step).astype(first.dtype)


@operator
def Dropout(
    x: Value, ratio: Value = 0.5, training_mode: Value = False, *, seed: int = 0, training: bool, outputs: int = 1
) -> Any:
    """As `nn.Dropout`: in training mode elements are dropped, in evaluation none."""
    p, kept = 0.5 if ratio is None else number(ratio), np.ones(x.shape, bool)
    if not (training or bool(training_mode is not None and np.asarray(array_of(training_mode)))) or not p:
        return (x, kept)[:outputs]
    factor = F.dropout(np.ones(x.shape, x.dtype), p, training=True)  # 0, or 1 / (1 − p)
    return (x * factor, factor != 0)[:outputs]
