"""Max and average pooling over windows, and their adaptive variants.

Max pooling is indexing: the place of the largest element of each window is a constant to the gradient, and `getitem`
takes the element there, with its derivatives of every order. Average pooling is a sum of slices.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np

from tinygrad_bn import backend
from tinygrad_bn.arguments import at_least_single, each_axis, expect_fits_memory, expect_flags, expect_floats
from tinygrad_bn.backend import Array
from tinygrad_bn.functional.convolution import Ints, Pairs, windows
from tinygrad_bn.functional.half import rounded_once
from tinygrad_bn.functional.statistics import mean, values
from tinygrad_bn.more_ops import argmax, getitem, pad, stack
from tinygrad_bn.ops import astype, reshape
from tinygrad_bn.sample import Draw, Drawn
from tinygrad_bn.tensor import Operand, Tensor, fused, primitive


def pooled_size(size: Ints, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints, ceil_mode: bool) -> Ints:
    """Lengths of the output's axes; with `ceil_mode` windows may stick out, but none starts after x."""
    out = []
    for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True):
        span = n + 2 * p - d * (k - 1) - 1
        count = (-(-span // s) if ceil_mode else span // s) + 1
        out.append(count - 1 if ceil_mode and (count - 1) * s >= n + p else count)
    return tuple(out)


def _within(
    size: Ints, kernel: Ints, out: Ints, stride: Ints, padding: Ints, dilation: Ints
) -> tuple[Ints, Ints, Ints, Ints]:
    """Kernel, stride, padding and dilation of the same windows without most of what lies outside the input.

    So work and memory are bounded by the input, however large the kernel and its padding are.
    """
    each = []
    for n, k, m, s, p, d in zip(size, kernel, out, stride, padding, dilation, strict=True):
        first, last = max((p - (m - 1) * s) // d, 0), min((n - 1 + p) // d, k - 1)
        each.append((last - first + 1, s if m > 1 else 1, p - first * d, d if last > first else 1))
    kernel, stride, padding, dilation = zip(*each, strict=True)
    return kernel, stride, padding, dilation


def _border(size: Ints, kernel: Ints, out: Ints, stride: Ints, padding: Ints, dilation: Ints) -> Pairs:
    """How much has to be put around the input for every window to lie inside: (before, after) for each axis."""
    ends = ((m - 1) * s + d * (k - 1) + 1 for m, s, d, k in zip(out, stride, dilation, kernel, strict=True))
    return tuple((p, max(end - n - p, 0)) for end, n, p in zip(ends, size, padding, strict=True))


# ---- max -------------------------------------------------------------------------------------------------


def _sample_max_pool(d: Draw) -> Drawn:
    size = (d.integer(3, 4), d.integer(3, 4))
    kernel, stride, dilation = (tuple(d.integer(1, 2) for _ in size) for _ in range(3))
    padding = tuple(d.integer(0, k // 2) for k in kernel)
    out = pooled_size(size, kernel, stride, padding, dilation, d.choice([False, True]))
    x = d.distinct((d.integer(1, 2), d.integer(1, 2), *size))
    return (x,), {"kernel": kernel, "out": out, "stride": stride, "padding": padding, "dilation": dilation}


@primitive(None, formula="y = where the largest of each window lies", sample=_sample_max_pool)
def max_pool_places(x: Operand, *, kernel: Ints, out: Ints, stride: Ints, padding: Ints, dilation: Ints) -> Operand:
    """Flat index of the largest element of each window in its plane: the first one, or the first NaN. int64."""
    border = _border(x.shape[2:], kernel, out, stride, padding, dilation)
    padded = np.pad(x, ((0, 0), (0, 0), *border))
    index = np.pad(np.arange(math.prod(x.shape[2:])).reshape(x.shape[2:]), border, constant_values=-1)[None, None]
    best = np.zeros((*x.shape[:2], *out), x.dtype)
    found = np.full(best.shape, -1)
    for (_, met), (_, at) in zip(
        windows(padded, kernel, out, stride, dilation), windows(index, kernel, out, stride, dilation), strict=True
    ):
        better = (at >= 0) & ((found < 0) | (met > best) | (np.isnan(met) & ~np.isnan(best)))
        best, found = np.where(better, met, best), np.where(better, at, found)
    return found


def _taken(x: Operand, places: Array) -> Tensor:
    """x (N, C, *size) at flat indices of each plane, (N, C, *out)."""
    planes = x.shape[0] * x.shape[1]
    flat = reshape(x, shape=(planes, math.prod(x.shape[2:])))
    taken = getitem(flat, index=(np.arange(planes)[:, None], places.reshape(planes, math.prod(places.shape[2:]))))
    return reshape(taken, shape=places.shape)


@fused(formula="y = the largest of each window;  its place gets g", sample=_sample_max_pool, widens=False)
def max_pool(x: Operand, *, kernel: Ints, out: Ints, stride: Ints, padding: Ints, dilation: Ints) -> Operand:
    """Max pooling of x (N, C, *size) to (N, C, *out). In a tie the first element counts."""
    places: Any = max_pool_places(
        values(x), kernel=kernel, out=out, stride=stride, padding=padding, dilation=dilation
    )  # a constant to the gradient
    return _taken(x, places)


# ---- average ---------------------------------------------------------------------------------------------


def _averages(x: Operand, *, kernel: Ints, out: Ints, stride: Ints, padding: Ints, count_include_pad: bool) -> Tensor:
    """Average pooling of x (N, C, *size) to (N, C, *out): the sum of its shifted slices, one axis after the other."""
    once, wide = (1,) * len(kernel), at_least_single(x.dtype)
    total: Any = astype(x, dtype=wide)
    inside = not any(map(any, _border(x.shape[2:], kernel, out, stride, padding, once)))
    if kernel == stride and math.prod(kernel) >= 16 and inside:  # smaller ones are faster in slices
        return astype(_tile_means(total, kernel, out), dtype=x.dtype)
    counts = _counts(x.shape[2:], kernel, out, stride, padding, count_include_pad)
    kernel, stride, padding, once = _within(x.shape[2:], kernel, out, stride, padding, once)
    total = pad(total, width=((0, 0), (0, 0), *_border(x.shape[2:], kernel, out, stride, padding, once)))
    for axis, (k, m, s) in enumerate(zip(kernel, out, stride, strict=True), start=2):
        before = (slice(None),) * axis
        shifted = [getitem(total, index=(*before, slice(at, at + (m - 1) * s + 1, s))) for at in range(k)]
        total = sum(shifted[1:], start=shifted[0])
    shares = (1 / counts).astype(wide)
    return astype(total * backend.move(shares, backend.device_of(x)), dtype=x.dtype)


def _tile_means(x: Operand, kernel: Ints, out: Ints) -> Tensor:
    """The means of windows that lie side by side: each axis of x is cut into (out, kernel)."""
    used = tuple(m * k for m, k in zip(out, kernel, strict=True))
    x = x if x.shape[2:] == used else getitem(x, index=(..., *map(slice, used)))
    cut = reshape(x, shape=(*x.shape[:2], *chain(*zip(out, kernel, strict=True))))
    return mean(cut, axis=tuple(range(3, cut.ndim, 2)))


def _counts(size: Ints, kernel: Ints, out: Ints, stride: Ints, padding: Ints, include_pad: bool) -> Array:
    """How many elements each window counts: those inside the input, or inside the input and its padding."""
    counts = np.ones(out)
    for axis, (n, k, m, s, p) in enumerate(zip(size, kernel, out, stride, padding, strict=True)):
        start = np.arange(m) * s - p
        low, high = (-p, n + p) if include_pad else (0, n)
        inside = np.minimum(start + k, high) - np.maximum(start, low)
        counts = counts * inside.reshape(-1, *(1,) * (len(size) - axis - 1))
    return counts


# ---- functions -------------------------------------------------------------------------------------------


def _expect_planes(x: Operand, ndim: int) -> None:
    expect_floats(x, "pooling")
    if x.ndim != ndim + 2:
        raise ValueError(f"{ndim}-dimensional pooling takes {ndim + 2} axes, (N, C, ...); got {x.shape}")
    if min(x.shape[2:]) < 1:
        raise ValueError(f"x {x.shape} has no elements to pool")


def window_options(
    ndim: int, kernel_size: int | Ints, stride: int | Ints | None, padding: int | Ints, dilation: int | Ints = 1
) -> tuple[Ints, Ints, Ints, Ints]:
    """Kernel, stride, padding and dilation of pooling, checked, as numbers for each axis."""
    kernel = each_axis(kernel_size, ndim, "kernel_size", 1)
    steps = kernel if stride is None else each_axis(stride, ndim, "stride", 1)
    around, spread = each_axis(padding, ndim, "padding", 0), each_axis(dilation, ndim, "dilation", 1)
    if any(2 * p > k for p, k in zip(around, kernel, strict=True)):
        raise ValueError(f"padding {around} is more than half of the kernel {kernel}: some windows would hold nothing")
    return kernel, steps, around, spread


def _out(x: Operand, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints, ceil_mode: bool) -> Ints:
    """`pooled_size`, checked."""
    out = pooled_size(x.shape[2:], kernel, stride, padding, dilation, ceil_mode)
    if min(out) < 1:
        raise ValueError(
            f"pooling: a window of {kernel} (dilation {dilation}) does not fit x {x.shape} with padding {padding}; "
            "x has to be larger, or kernel_size smaller"
        )
    for n, m, k, s, p, d in zip(x.shape[2:], out, kernel, stride, padding, dilation, strict=True):
        if d > 1:
            start = np.arange(m) * s - p
            first = np.maximum(-(start // d), 0)  # the first element of each window that does not lie before x
            if not ((first < k) & (start + first * d < n)).all():
                raise ValueError(
                    f"some windows of {kernel}, dilation {dilation}, hold nothing but padding of x {x.shape}"
                )
    return out


def _max_pool_of_rank(ndim: int) -> Callable[..., Tensor]:
    def pool(
        x: Operand,
        kernel_size: int | Ints,
        stride: int | Ints | None = None,
        padding: int | Ints = 0,
        dilation: int | Ints = 1,
        ceil_mode: bool = False,
    ) -> Tensor:
        """The largest element of each window of x (N, C, *size). The gradient goes to the first of a tie.

        Args:
            x: floating-point.
            kernel_size, stride: of the windows; the stride is the kernel's size if None.
            padding: of −∞, at most half of the kernel.
            dilation: distance of the elements of a window.
            ceil_mode: let the last windows stick out.

        Raises:
            ValueError: a window that does not fit, or holds only padding.
            TypeError: x is not floating-point.
        """
        _expect_planes(x, ndim)
        expect_flags(ceil_mode=ceil_mode)
        kernel, steps, around, spread = window_options(ndim, kernel_size, stride, padding, dilation)
        out = _out(x, kernel, steps, around, spread, ceil_mode)
        kernel, steps, around, spread = _within(x.shape[2:], kernel, out, steps, around, spread)
        return max_pool(x, kernel=kernel, out=out, stride=steps, padding=around, dilation=spread)

    pool.__name__ = pool.__qualname__ = f"max_pool{ndim}d"
    return pool


def _avg_pool_of_rank(ndim: int) -> Callable[..., Tensor]:
    def pool(
        x: Operand,
        kernel_size: int | Ints,
        stride: int | Ints | None = None,
        padding: int | Ints = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
    ) -> Tensor:
        """The mean of each window of x (N, C, *size); arguments and errors as of max pooling.

        `count_include_pad`: whether padding, which is 0, counts as elements.
        """
        _expect_planes(x, ndim)
        expect_flags(ceil_mode=ceil_mode, count_include_pad=count_include_pad)
        kernel, steps, around, once = window_options(ndim, kernel_size, stride, padding)
        out = _out(x, kernel, steps, around, once, ceil_mode)
        return _averages(x, kernel=kernel, out=out, stride=steps, padding=around, count_include_pad=count_include_pad)

    pool.__name__ = pool.__qualname__ = f"avg_pool{ndim}d"
    return pool


max_pool1d, max_pool2d, max_pool3d = map(_max_pool_of_rank, (1, 2, 3))
avg_pool1d, avg_pool2d, avg_pool3d = map(_avg_pool_of_rank, (1, 2, 3))


def _bounds(n: int, out: int) -> tuple[Array, Array]:
    """Where the windows of adaptive pooling start and stop: ⌊i · n / out⌋ and ⌈(i + 1) · n / out⌉."""
    i = np.arange(out)
    return i * n // out, -(-(i + 1) * n // out)


def _adaptive_size(x: Operand, output_size: int | Ints) -> Ints:
    expect_floats(x, "adaptive pooling")
    if x.ndim < 3 or 0 in x.shape[2:]:
        raise ValueError(
            f"adaptive pooling takes x of (N, C, ...) with at least one element on each axis; got {x.shape}"
        )
    out = each_axis(output_size, x.ndim - 2, "output_size", 1)
    expect_fits_memory("the output of adaptive pooling", (*x.shape[:2], *out))
    return out


@rounded_once
def adaptive_avg_pool(x: Operand, output_size: int | Ints) -> Tensor:
    """The means of windows that divide x (N, C, *size) into (N, C, *output_size); 1 is global average pooling."""
    out = _adaptive_size(x, output_size)
    if (kernel := _even(x.shape[2:], out)) is not None:
        no = (0,) * len(out)
        return _averages(x, kernel=kernel, out=out, stride=kernel, padding=no, count_include_pad=True)
    y = x
    for axis, m in enumerate(out, start=2):
        before = (slice(None),) * axis
        parts = zip(*_bounds(x.shape[axis], m), strict=True)
        means = [mean(getitem(y, index=(*before, slice(start, stop))), axis=axis) for start, stop in parts]
        y = stack(*means, axis=axis)
    return y


def adaptive_max_pool(x: Operand, output_size: int | Ints) -> Tensor:
    """The largest elements of windows that divide x (N, C, *size) into (N, C, *output_size)."""
    out = _adaptive_size(x, output_size)
    bounds = [_bounds(n, m) for n, m in zip(x.shape[2:], out, strict=True)]
    most = tuple(int((stop - start).max()) for start, stop in bounds)
    index = np.arange(math.prod(x.shape[2:])).reshape(x.shape[2:])
    if math.prod(out) > math.prod(most):  # the loop over elements of windows is shorter than that over windows
        if _even(x.shape[2:], out):
            no, once = (0,) * len(out), (1,) * len(out)
            return max_pool(x, kernel=most, out=out, stride=most, padding=no, dilation=once)
        return _taken(x, _places_in_even_windows(values(x), index, bounds, most, out))
    places = []
    for place in np.ndindex(*out):
        window = tuple(slice(start[i], stop[i]) for i, (start, stop) in zip(place, bounds, strict=True))
        part = values(x)[(..., *window)]
        part = part.reshape(*x.shape[:2], math.prod(part.shape[2:]))
        flat = backend.move(index[window].reshape(-1), backend.device_of(x))
        places.append(getitem(flat, index=argmax(part, axis=2)))
    return _taken(x, stack(*places, axis=2).reshape(*x.shape[:2], *out))


def _places_in_even_windows(x: Array, index: Array, bounds: list[tuple[Array, Array]], most: Ints, out: Ints) -> Array:
    """`max_pool_places` of windows that are made as large as the largest by repeating their last elements.

    That changes neither their maxima nor the first places of these.
    """
    each = zip(bounds, most, strict=True)
    rows = [(start[:, None] + np.arange(k)).clip(max=stop[:, None] - 1).reshape(-1) for (start, stop), k in each]
    index = backend.move(index[np.ix_(*rows)].reshape(-1), backend.device_of(x))
    spread = getitem(x.reshape(*x.shape[:2], -1), index=(slice(None), slice(None), index))
    spread = spread.reshape(*x.shape[:2], *(len(r) for r in rows))
    no, once = (0,) * len(out), (1,) * len(out)
    return getitem(index, index=max_pool_places(spread, kernel=most, out=out, stride=most, padding=no, dilation=once))


def _even(size: Ints, out: Ints) -> Ints | None:
    """The size of the windows of adaptive pooling if all are alike, else None."""
    return tuple(n // m for n, m in zip(size, out, strict=True)) if not any(map(operator.mod, size, out)) else None
