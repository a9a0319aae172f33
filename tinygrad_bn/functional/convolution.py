"""Convolution in any number of dimensions, forwards and to both of its operands, and its transpose.

Three maps make up convolution and all of its derivatives, each linear in both operands: `conv` (input and weight to
output), `conv_input` (output and weight to input) and `conv_weight` (input and output to weight). The gradients of each
are the other two, so the family is closed: derivatives of every order follow.

As in every such library, "convolution" does not flip the weight (it is a cross-correlation).
"""

# A rule may name an op that is declared further down, which mypy cannot infer through a decorator.
# mypy: disable-error-code="has-type"

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, TypeAlias

import numpy as np

from tinygrad_bn.arguments import (
    at_least_single,
    each_axis,
    expect_array,
    expect_fits_memory,
    expect_floats,
    expect_size,
    shown,
)
from tinygrad_bn.backend import Array
from tinygrad_bn.functional.half import rounded_once
from tinygrad_bn.functional.statistics import values
from tinygrad_bn.more_ops import getitem, pad, scatter_add
from tinygrad_bn.ops import reshape
from tinygrad_bn.sample import REAL, Draw, Drawn
from tinygrad_bn.tensor import Operand, Tensor, fused, primitive

Ints: TypeAlias = tuple[int, ...]
Pairs: TypeAlias = tuple[tuple[int, int], ...]
Padding: TypeAlias = Any  # a number, one for each axis, a pair (before, after) for each axis, "same" or "valid"

QUIET = np.errstate(invalid="ignore")  # BLAS raises this flag on some processors only


def output_size(size: Ints, kernel: Ints, stride: Ints, padding: Pairs, dilation: Ints) -> Ints:
    """Lengths of the output's axes: ⌊(n + before + after − dilation · (k − 1) − 1) / stride⌋ + 1."""
    return tuple(
        (n + before + after - d * (k - 1) - 1) // s + 1
        for n, k, s, (before, after), d in zip(size, kernel, stride, padding, dilation, strict=True)
    )


def _last(index: Iterable[Any]) -> Any:
    """An index of the last axes."""
    return (..., *index)


def windows(padded: Array, kernel: Ints, out: Ints, stride: Ints, dilation: Ints) -> Iterator[tuple[Ints, Array]]:
    """For every place in the kernel: the elements that it multiplies, (N, C, *out), a view of the padded input."""
    for place in np.ndindex(*kernel):
        axes = zip(place, dilation, out, stride, strict=True)
        yield place, padded[_last(slice(at * d, at * d + (n - 1) * s + 1, s) for at, d, n, s in axes)]


def _padded(x: Array, padding: Pairs) -> Array:
    return np.pad(x, ((0, 0), (0, 0), *padding)) if any(map(any, padding)) else x


def _grouped(x: Array, groups: int) -> Array:
    """(N, C, *S) as (N, groups, C / groups, S)."""
    return x.reshape(x.shape[0], groups, x.shape[1] // groups, math.prod(x.shape[2:]))


def _wide(x: Array) -> Array:
    return x.astype(at_least_single(x.dtype), copy=False)


def _conv_operands(d: Draw) -> tuple[tuple[Array, Array, Array], dict[str, Any]]:
    """Input, weight and output of one convolution, and its options."""
    ndim = d.integer(1, 2)
    groups = d.choice([1, 2])
    kernel, stride, dilation = (tuple(d.integer(1, 2) for _ in range(ndim)) for _ in range(3))
    padding = tuple((d.integer(0, 1), d.integer(0, 1)) for _ in range(ndim))
    size = tuple(d.integer(3, 4) for _ in range(ndim))
    n, c, o = d.integer(1, 2), groups * d.integer(1, 2), groups * d.integer(1, 2)
    x = d.array(REAL, (n, c, *size))
    weight = d.array(REAL, (o, c // groups, *kernel))
    y = d.array(REAL, (n, o, *output_size(size, kernel, stride, padding, dilation)))
    return (x, weight, y), {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}


def _sample_conv(d: Draw) -> Drawn:
    (x, weight, _), options = _conv_operands(d)
    return (x, weight), options


def _sample_conv_input(d: Draw) -> Drawn:
    (x, weight, y), options = _conv_operands(d)
    return (y, weight), {"size": tuple(n + d.integer(0, 1) for n in x.shape[2:]), **options}


def _sample_conv_weight(d: Draw) -> Drawn:
    (x, weight, y), options = _conv_operands(d)
    return (x, y), {"kernel": weight.shape[2:], **options}


@primitive(
    lambda g, y, x, weight, **o: conv_input(g, weight, size=x.shape[2:], **o),
    lambda g, y, x, weight, **o: conv_weight(x, g, kernel=weight.shape[2:], **o),
    formula="y[n, o, p] = Σ_c,k x[n, c, p · stride + k · dilation − before] · w[o, c, k]",
    sample=_sample_conv,
)
@QUIET
def conv(x: Operand, weight: Operand, *, stride: Ints, padding: Pairs, dilation: Ints, groups: int) -> Operand:
    """Convolution of x (N, C, *size) by weight (O, C / groups, *kernel): (N, O, *out)."""
    kernel, wide = weight.shape[2:], _wide(x)
    out = output_size(x.shape[2:], kernel, stride, padding, dilation)
    w = _wide(weight).reshape(groups, -1, *weight.shape[1:])
    y = np.zeros((x.shape[0], groups, weight.shape[0] // groups, math.prod(out)), np.result_type(wide, w))
    for place, met in windows(_padded(wide, padding), kernel, out, stride, dilation):
        y += w[_last(place)] @ _grouped(met, groups)
    return y.reshape(x.shape[0], weight.shape[0], *out).astype(np.result_type(x, weight), copy=False)


def _conv_to(out: Ints, x: Any, weight: Any, **options: Any) -> Any:
    """`conv`, without the outputs beyond `out` that a larger input has room for."""
    y = conv(x, weight, **options)
    return y if y.shape[2:] == out else getitem(y, index=_last(slice(n) for n in out))


@primitive(
    lambda h, y, g, weight, *, size, **o: _conv_to(g.shape[2:], h, weight, **o),
    lambda h, y, g, weight, *, size, **o: conv_weight(h, g, kernel=weight.shape[2:], **o),
    formula="y = the gradient g of conv's output, taken back to its input",
    sample=_sample_conv_input,
)
@QUIET
def conv_input(
    g: Operand, weight: Operand, *, size: Ints, stride: Ints, padding: Pairs, dilation: Ints, groups: int
) -> Operand:
    """The adjoint of `conv` in its input: g (N, O, *out) and weight (O, C / groups, *kernel) to (N, C, *size)."""
    kernel, wide = weight.shape[2:], _grouped(_wide(g), groups)
    w = np.swapaxes(_wide(weight).reshape(groups, -1, *weight.shape[1:]), 1, 2)
    around = (n + before + after for n, (before, after) in zip(size, padding, strict=True))
    padded = np.zeros((g.shape[0], groups * weight.shape[1], *around), np.result_type(wide, w))
    for place, met in windows(padded, kernel, g.shape[2:], stride, dilation):
        met += (w[_last(place)] @ wide).reshape(met.shape)
    inner = (slice(before, before + n) for n, (before, _) in zip(size, padding, strict=True))
    return np.ascontiguousarray(padded[_last(inner)]).astype(np.result_type(g, weight), copy=False)


@primitive(
    lambda h, y, x, g, *, kernel, **o: conv_input(g, h, size=x.shape[2:], **o),
    lambda h, y, x, g, *, kernel, **o: _conv_to(g.shape[2:], x, h, **o),
    formula="y = the gradient g of conv's output, taken back to its weight",
    sample=_sample_conv_weight,
)
@QUIET
def conv_weight(
    x: Operand, g: Operand, *, kernel: Ints, stride: Ints, padding: Pairs, dilation: Ints, groups: int
) -> Operand:
    """The adjoint of `conv` in its weight: x (N, C, *size) and g (N, O, *out) to (O, C / groups, *kernel)."""
    gs = _grouped(_wide(g), groups)
    y = np.zeros((groups, g.shape[1] // groups, x.shape[1] // groups, *kernel), np.result_type(_wide(x), gs))
    for place, met in windows(_padded(_wide(x), padding), kernel, g.shape[2:], stride, dilation):
        y[_last(place)] = (gs @ np.swapaxes(_grouped(met, groups), 2, 3)).sum(axis=0)
    return y.reshape(g.shape[1], x.shape[1] // groups, *kernel).astype(np.result_type(x, g), copy=False)


def _sample_conv_with_bias(d: Draw) -> Drawn:
    (x, weight), options = _sample_conv(d)
    return (x, weight, d.array(REAL, weight.shape[:1])), options


@fused(
    formula="y = conv(x, w) + bias, one number for each output channel",
    sample=_sample_conv_with_bias,
    widens=False,  # float64 would cost more than it gains
)
@rounded_once
def conv_with_bias(
    x: Operand, weight: Operand, bias: Operand, *, stride: Ints, padding: Pairs, dilation: Ints, groups: int
) -> Operand:
    """`conv` with a bias (O,)."""
    y = conv(x, weight, stride=stride, padding=padding, dilation=dilation, groups=groups)
    return y + reshape(bias, shape=(-1, *(1,) * (x.ndim - 2)))


# ---- functions -------------------------------------------------------------------------------------------


def pairs(padding: Padding, kernel: Ints, stride: Ints, dilation: Ints) -> Pairs:
    """Padding as (before, after) for each axis.

    It may be a number, one for each axis, a pair for each axis, "valid" (none) or "same": as many outputs as inputs,
    the odd one after, for stride 1 only, as in PyTorch.
    """
    ndim = len(kernel)
    if isinstance(padding, str) and padding == "valid":
        return ((0, 0),) * ndim
    if isinstance(padding, str) and padding == "same":
        if any(s != 1 for s in stride):
            raise ValueError(f"padding='same' needs stride 1; got {stride}")
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((t // 2, t - t // 2) for t in total)
    if isinstance(padding, str):
        raise ValueError(f"padding is 'same', 'valid', or in numbers; got {shown(padding)}")
    if not isinstance(padding, tuple | list) or not any(isinstance(p, tuple | list) for p in padding):
        return tuple((p, p) for p in each_axis(padding, ndim, "padding", 0))
    if len(padding) != ndim or not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in padding):
        raise ValueError(
            f"padding needs a pair (before, after) of 0 or more for each of {ndim} axes; got {shown(padding)}"
        )
    flat = each_axis(tuple(chain(*padding)), 2 * ndim, "padding in pairs (before, after)", 0)
    return tuple(zip(flat[::2], flat[1::2], strict=True))


def _limited(stride: Ints, size: Ints, padding: Pairs) -> Ints:
    """The stride, at most as long as the padded input: a longer one gives one window too, but may overflow in loops."""
    return tuple(min(s, n + before + after) for s, n, (before, after) in zip(stride, size, padding, strict=True))


# ---- windows far outside the input or far apart ----------------------------------------------------------

NEAR = 32  # padding that is always written down: the usual case, without a further look

Axes: TypeAlias = list[tuple[Array, Array]]


def _is_distant(size: Ints, out: Ints, padding: Pairs) -> bool:
    """Whether the padded input is far larger than input and output: it cannot be written down."""
    padded = math.prod(n + before + after for n, (before, after) in zip(size, padding, strict=True))
    return padded > max(1 << 16, 16 * math.prod(size), 16 * math.prod(out))


def _distinct_windows(size: Ints, kernel: Ints, out: Ints, stride: Ints, padding: Pairs, dilation: Ints) -> Axes:
    """For each axis: the input's places in each distinct window, (windows, k), and the window of each output.

    Places outside the input are `size`. So all windows of padding alone are one.
    """
    axes = []
    for n, k, m, s, (before, _), d in zip(size, kernel, out, stride, padding, dilation, strict=True):
        at = np.arange(m)[:, None] * s + np.arange(k) * d - before
        places, window = np.unique(np.where((at >= 0) & (at < n), at, n), axis=0, return_inverse=True)
        axes.append((places, window.reshape(-1)))
    return axes


def _side_by_side(axes: Axes) -> dict[str, Any]:
    """The options of a convolution whose windows lie one after the other."""
    ndim = len(axes)
    kernel = tuple(places.shape[1] for places, _ in axes)
    return {"stride": kernel, "padding": ((0, 0),) * ndim, "dilation": (1,) * ndim}


def _along(axis: int, index: Any) -> tuple[Any, ...]:
    return (*(slice(None),) * axis, index)


def _distant_conv(x: Operand, weight: Operand, bias: Operand | None, groups: int, axes: Axes) -> Operand:
    """Convolution of x by its distinct windows, each written down once."""
    x = pad(x, width=((0, 0), (0, 0), *((0, 1),) * len(axes)))
    for axis, (places, _) in enumerate(axes, start=2):
        x = getitem(x, index=_along(axis, places.reshape(-1)))
    y = _conv(x, weight, bias, groups=groups, **_side_by_side(axes))
    for axis, (_, window) in enumerate(axes, start=2):
        y = getitem(y, index=_along(axis, window))
    return y


def _distant_conv_input(g: Operand, weight: Operand, size: Ints, groups: int, axes: Axes) -> Operand:
    """The adjoint of `_distant_conv` in x (N, C, *size): the same steps backwards."""
    for axis, (places, window) in enumerate(axes, start=2):
        g = scatter_add(g, index=_along(axis, window), shape=(*g.shape[:axis], len(places), *g.shape[axis + 1 :]))
    written = tuple(places.size for places, _ in axes)
    x = conv_input(g, weight, size=written, groups=groups, **_side_by_side(axes))
    for axis, ((places, _), n) in enumerate(zip(axes, size, strict=True), start=2):
        shape = (*x.shape[:axis], n + 1, *x.shape[axis + 1 :])
        x = getitem(scatter_add(x, index=_along(axis, places.reshape(-1)), shape=shape), index=_along(axis, slice(n)))
    return x


# ---- functions of any number of axes ---------------------------------------------------------------------


def _conv(x: Operand, weight: Operand, bias: Operand | None, **options: Any) -> Operand:
    return conv(x, weight, **options) if bias is None else conv_with_bias(x, weight, bias, **options)


def _check_bias(bias: Operand, channels: int) -> None:
    if np.shape(values(bias)) != (channels,):
        got = np.shape(values(bias))
        raise ValueError(f"bias has to be one number for each of {channels} output channels; got shape {got}")


def _of_rank(ndim: int) -> Callable[..., Tensor]:
    """The convolution over `ndim` axes."""

    def convolution(
        x: Operand,
        weight: Operand,
        bias: Operand | None = None,
        stride: int | Ints = 1,
        padding: Padding = 0,
        dilation: int | Ints = 1,
        groups: int = 1,
    ) -> Tensor:
        """Convolution (cross-correlation) of x (N, C, *size) by weight (O, C / groups, *kernel); gives (N, O, *out).

        Args:
            x, weight: floating-point; every group of output channels sees C / groups input channels.
            bias: (O,), or None.
            stride, dilation: one number, or one for each axis.
            padding: zeros around x: a number, one for each axis, a pair (before, after) for each axis, "valid", or
                "same" (stride 1 only). Zero times an infinite weight is NaN, here too.
            groups: divides both C and O.

        Raises:
            ValueError: shapes or options that do not fit.
            TypeError: x is not floating-point.
            MemoryError: an output that no memory holds.

        >>> conv2d(np.ones((1, 1, 3, 3)), np.ones((1, 1, 2, 2)), padding="same")[0, 0]
        array([[4., 4., 2.],
               [4., 4., 2.],
               [2., 2., 1.]])
        """
        expect_floats(x, f"conv{ndim}d")
        expect_array(weight, f"the weight of conv{ndim}d")
        if x.ndim != ndim + 2 or np.ndim(values(weight)) != ndim + 2:
            raise ValueError(f"conv{ndim}d takes x and weight of {ndim + 2} axes; got {x.shape} and {weight.shape}")
        groups = expect_size("groups", groups)
        if weight.shape[0] % groups or x.shape[1] != weight.shape[1] * groups:
            raise ValueError(
                f"conv{ndim}d: x {x.shape}, (N, C, ...), and weight {weight.shape}, (O, C / groups, ...), "
                f"do not fit {groups} groups; C has to be the same, and groups to divide O"
            )
        kernel = weight.shape[2:]
        if min(weight.shape) < 1:
            raise ValueError(
                f"weight {weight.shape}, (O, C / groups, ...), has to have at least one element on each axis"
            )
        stride, dilation = each_axis(stride, ndim, "stride", 1), each_axis(dilation, ndim, "dilation", 1)
        padded = pairs(padding, kernel, stride, dilation)
        out = output_size(x.shape[2:], kernel, stride, padded, dilation)
        if min(out, default=1) < 1:
            raise ValueError(
                f"conv{ndim}d: a kernel of {kernel} (dilation {dilation}) does not fit x {x.shape} with padding "
                f"{padded}; x has to be larger, or the kernel smaller"
            )
        if bias is not None:
            _check_bias(bias, weight.shape[0])
        if max(map(max, padded)) > NEAR:
            expect_fits_memory(f"the output of conv{ndim}d", (x.shape[0], weight.shape[0], *out))
            if _is_distant(x.shape[2:], out, padded):
                axes = _distinct_windows(x.shape[2:], kernel, out, stride, padded, dilation)
                return _distant_conv(x, weight, bias, groups, axes)
        stride = _limited(stride, x.shape[2:], padded)
        return _conv(x, weight, bias, stride=stride, padding=padded, dilation=dilation, groups=groups)

    convolution.__name__ = convolution.__qualname__ = f"conv{ndim}d"
    return convolution


conv1d, conv2d, conv3d = _of_rank(1), _of_rank(2), _of_rank(3)


def transposed_options(
    stride: int | Ints, padding: int | Ints, output_padding: int | Ints, dilation: int | Ints
) -> tuple[Ints, Ints, Ints, Ints]:
    """The options of `conv_transpose2d`, checked, as numbers for each axis."""
    stride, dilation = each_axis(stride, 2, "stride", 1), each_axis(dilation, 2, "dilation", 1)
    around, extra = each_axis(padding, 2, "padding", 0), each_axis(output_padding, 2, "output_padding", 0)
    if any(e >= max(s, d) for e, s, d in zip(extra, stride, dilation, strict=True)):
        raise ValueError(f"output_padding {extra} has to be smaller than stride {stride} or dilation {dilation}")
    return stride, around, extra, dilation


@rounded_once
def conv_transpose2d(
    x: Operand,
    weight: Operand,
    bias: Operand | None = None,
    stride: int | Ints = 1,
    padding: int | Ints = 0,
    output_padding: int | Ints = 0,
    groups: int = 1,
    dilation: int | Ints = 1,
) -> Tensor:
    """The adjoint of `conv2d`: x (N, C, H, W) and weight (C, O / groups, KH, KW) to (N, O, H', W').

    H' = (H − 1) · stride − 2 · padding + dilation · (KH − 1) + output_padding + 1. Arguments are PyTorch's.

    Raises:
        ValueError: shapes or options that do not fit.
    """
    expect_floats(x, "conv_transpose2d")
    expect_array(weight, "the weight of conv_transpose2d")
    groups = expect_size("groups", groups)
    fits = x.ndim == weight.ndim == 4 and min(weight.shape) > 0
    if not fits or x.shape[1] != weight.shape[0] or x.shape[1] % groups:
        raise ValueError(f"conv_transpose2d: x {x.shape}, weight {weight.shape} and {groups} groups do not fit")
    stride, around, extra, dilation = transposed_options(stride, padding, output_padding, dilation)
    size = tuple(
        (n - 1) * s - 2 * p + d * (k - 1) + e + 1
        for n, s, p, d, k, e in zip(x.shape[2:], stride, around, dilation, weight.shape[2:], extra, strict=True)
    )
    if min(size) < 1:
        raise ValueError(f"an input of shape {x.shape} with padding {around} leaves no output")
    expect_fits_memory("the output of conv_transpose2d", (x.shape[0], weight.shape[1] * groups, *size))
    padded = tuple((p, p) for p in around)
    if _is_distant(size, x.shape[2:], padded):
        axes = _distinct_windows(size, weight.shape[2:], x.shape[2:], stride, padded, dilation)
        y = _distant_conv_input(x, weight, size, groups, axes)
    else:
        stride = _limited(stride, size, padded)
        y = conv_input(x, weight, size=size, stride=stride, padding=padded, dilation=dilation, groups=groups)
    if bias is None:
        return y
    _check_bias(bias, y.shape[1])
    return y + reshape(bias, shape=(-1, 1, 1))
