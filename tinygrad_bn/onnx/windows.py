"""The operators of ONNX that slide windows over x (N, C, *size): convolution and pooling."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tinygrad_bn import functional as F
from tinygrad_bn.functional.convolution import Ints, Pairs, conv_input
from tinygrad_bn.functional.pooling import max_pool, max_pool_places
from tinygrad_bn.more_ops import getitem, pad
from tinygrad_bn.onnx.errors import OnnxError
from tinygrad_bn.onnx.operators import Value, array_of, operator

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def _around(size: Ints, kernel: Ints, strides: Ints, dilations: Ints, pads: Ints | None, auto_pad: str) -> Pairs:
    """Padding as (before, after) for each axis."""
    if auto_pad in ("NOTSET", "VALID"):
        flat = pads or (0,) * (2 * len(size))
        return tuple(zip(flat[: len(size)], flat[len(size) :], strict=True))
    if auto_pad not in ("SAME_UPPER", "SAME_LOWER"):
        raise OnnxError(f"auto_pad={auto_pad!r} is not known")
    found = []
    for n, k, s, d in zip(size, kernel, strides, dilations, strict=True):
        total = max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
        less, more = total // 2, total - total // 2
        found.append((less, more) if auto_pad == "SAME_UPPER" else (more, less))
    return tuple(found)


@operator
def Conv(
    x: Value, weight: Value, bias: Value = None, *, auto_pad: str = "NOTSET", dilations: Ints | None = None,
    group: int = 1, kernel_shape: Ints | None = None, pads: Ints | None = None, strides: Ints | None = None,
) -> Value:  # fmt: skip
    ndim, kernel = x.ndim - 2, weight.shape[2:]
    strides, dilations = strides or (1,) * ndim, dilations or (1,) * ndim
    if ndim not in CONVOLUTIONS:
        raise OnnxError(f"Conv of x {x.shape} is not computed; it takes 1 to 3 axes behind (N, C)")
    around = _around(x.shape[2:], kernel, strides, dilations, pads, auto_pad)
    return CONVOLUTIONS[ndim](x, weight, bias, strides, around, dilations, group)


@operator
def ConvTranspose(
    x: Value, weight: Value, bias: Value = None, *, auto_pad: str = "NOTSET", dilations: Ints | None = None,
    group: int = 1, kernel_shape: Ints | None = None, output_padding: Ints | None = None,
    output_shape: Ints | None = None, pads: Ints | None = None, strides: Ints | None = None,
) -> Value:  # fmt: skip
    ndim, kernel = x.ndim - 2, weight.shape[2:]
    strides, dilations = strides or (1,) * ndim, dilations or (1,) * ndim
    extra = output_padding or (0,) * ndim
    spans = zip(x.shape[2:], strides, kernel, dilations, extra, strict=True)
    whole = [(n - 1) * s + (k - 1) * d + 1 + e for n, s, k, d, e in spans]
    if output_shape is not None or auto_pad.startswith("SAME"):
        wanted = output_shape or [n * s for n, s in zip(x.shape[2:], strides, strict=True)]
        totals = [max(w - n, 0) for w, n in zip(whole, wanted[-ndim:], strict=True)]
        halves = [(t // 2, t - t // 2) for t in totals]
        around = tuple((less, more) if auto_pad == "SAME_UPPER" else (more, less) for less, more in halves)
        size = tuple(wanted[-ndim:])
    else:
        around = _around(x.shape[2:], kernel, strides, dilations, pads, "NOTSET")
        size = tuple(n - before - after for n, (before, after) in zip(whole, around, strict=True))
    if min(size, default=1) < 1:
        raise OnnxError(f"ConvTranspose of x {x.shape} has an output of {size}")
    y = conv_input(x, weight, size=size, stride=tuple(strides), padding=around, dilation=tuple(dilations), groups=group)
    return y if bias is None else y + F.reshape(bias, shape=(-1, *(1,) * ndim))


# ---- pooling --------------------------------------------------------------------------------------------


def _outputs(size: Ints, kernel: Ints, strides: Ints, dilations: Ints, around: Pairs, ceil_mode: int) -> Ints:
    out = []
    for n, k, s, d, (before, after) in zip(size, kernel, strides, dilations, around, strict=True):
        span = n + before + after - d * (k - 1) - 1
        count = (-(-span // s) if ceil_mode else span // s) + 1
        out.append(count - 1 if ceil_mode and (count - 1) * s >= n + before else count)  # none starts behind x
    if min(out, default=1) < 1:
        raise OnnxError(f"windows of {tuple(kernel)} do not fit an input of {tuple(size)}")
    return tuple(out)


def _windows(
    x: Value,
    kernel: Ints,
    strides: Ints | None,
    dilations: Ints | None,
    pads: Ints | None,
    auto_pad: str,
    ceil_mode: int,
) -> tuple[Ints, Ints, Pairs, Ints]:  # fmt: skip
    """Strides, dilations, padding and the size of the output of windows over x (N, C, *size)."""
    once = (1,) * (x.ndim - 2)
    strides, dilations = strides or once, dilations or once
    around = _around(x.shape[2:], kernel, strides, dilations, pads, auto_pad)
    return strides, dilations, around, _outputs(x.shape[2:], kernel, strides, dilations, around, ceil_mode)


@operator
def MaxPool(
    x: Value, *, kernel_shape: Ints, auto_pad: str = "NOTSET", ceil_mode: int = 0, dilations: Ints | None = None,
    pads: Ints | None = None, storage_order: int = 0, strides: Ints | None = None, outputs: int = 1,
) -> Value:  # fmt: skip
    if not np.issubdtype(x.dtype, np.floating):  # float64 holds the integers of 32 bits
        if x.dtype.itemsize > 4:
            raise OnnxError(f"MaxPool of {x.dtype} is not computed")
        found = MaxPool(
            F.astype(x, dtype=np.float64), kernel_shape=kernel_shape, auto_pad=auto_pad, ceil_mode=ceil_mode,
            dilations=dilations, pads=pads, storage_order=storage_order, strides=strides, outputs=2,
        )  # fmt: skip
        return (F.astype(found[0], dtype=x.dtype), found[1])[:outputs]
    strides, dilations, around, out = _windows(x, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    options = {
        "kernel": tuple(kernel_shape), "out": out, "stride": tuple(strides), "dilation": tuple(dilations),
        "padding": tuple(before for before, _ in around),  # what lies behind x follows from `out`
    }  # fmt: skip
    y = max_pool(x, **options)
    if outputs == 1:
        return y
    places = np.asarray(array_of(max_pool_places(x, **options)))
    size = x.shape[2:]
    if storage_order:  # the first axis of a plane runs fastest
        places = np.ravel_multi_index(np.unravel_index(places, size), size, order="F")
    planes = np.arange(x.shape[0] * x.shape[1]).reshape(*x.shape[:2], *(1,) * len(size))
    return y, places + planes * math.prod(size)


@operator
def AveragePool(
    x: Value, *, kernel_shape: Ints, auto_pad: str = "NOTSET", ceil_mode: int = 0, count_include_pad: int = 0,
    dilations: Ints | None = None, pads: Ints | None = None, strides: Ints | None = None,
) -> Value:  # fmt: skip
    """The sum of each window, divided by how many of its places count."""
    strides, dilations, around, out = _windows(x, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    total, count = _window_sums(x, kernel_shape, out, strides, dilations, around, count_include_pad)
    return total / np.maximum(count, 1).astype(x.dtype)


def _window_sums(
    x: Value, kernel: Ints, out: Ints, strides: Ints, dilations: Ints, around: Pairs, counts_padding: int
) -> tuple[Any, Any]:
    """The sum of each window, and how many of its places count: those of x, and of the padding if it does."""
    size = x.shape[2:]
    ends = [(m - 1) * s + d * (k - 1) + 1 for m, s, d, k in zip(out, strides, dilations, kernel, strict=True)]
    border = [(b, max(end - n - b, 0)) for end, n, (b, _) in zip(ends, size, around, strict=True)]
    places = np.pad(np.ones(size), around, constant_values=float(bool(counts_padding)))
    places = np.pad(places, [(0, max(end - n, 0)) for end, n in zip(ends, places.shape, strict=True)])
    padded = pad(x, width=((0, 0), (0, 0), *border))
    total: Any = 0
    count = np.zeros(out)
    for place in np.ndindex(*kernel):
        axes = zip(place, dilations, out, strides, strict=True)
        at = tuple(slice(i * d, i * d + (m - 1) * s + 1, s) for i, d, m, s in axes)
        total = total + getitem(padded, index=(slice(None), slice(None), *at))
        count += places[at]
    return total, count


def _over_planes(x: Value) -> Any:
    return tuple(range(2, x.ndim))


@operator
def GlobalAveragePool(x: Value) -> Value:
    return F.mean(x, axis=_over_planes(x), keepdims=True)


@operator
def GlobalMaxPool(x: Value) -> Value:
    return F.max(x, axis=_over_planes(x), keepdims=True)


@operator
def LpPool(
    x: Value, *, kernel_shape: Ints, p: int = 2, auto_pad: str = "NOTSET", ceil_mode: int = 0,
    dilations: Ints | None = None, pads: Ints | None = None, strides: Ints | None = None,
) -> Value:  # fmt: skip
    """(Σ |x|ᵖ)^(1 / p) of each window. What lies outside of x counts as 0."""
    strides, dilations, around, out = _windows(x, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    total, _ = _window_sums(F.pow(F.abs(x), float(p)), kernel_shape, out, strides, dilations, around, 0)
    return F.pow(total, 1 / p)


@operator
def GlobalLpPool(x: Value, *, p: int = 2) -> Value:
    return F.pow(F.sum(F.pow(F.abs(x), float(p)), axis=_over_planes(x), keepdims=True), 1 / p)
