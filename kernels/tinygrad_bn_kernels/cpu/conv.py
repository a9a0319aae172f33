"""Convolution in one or two dimensions: the columns of one image at a time, which stay in cache, and BLAS.

The columns of an image are (C · KH · KW, OH · OW): what each place of the kernel meets at each place of the output.
Convolution is the weight, as a matrix, times them; its adjoints are the other two products of the same three matrices.
What has groups, or three dimensions, is declined: the reference does the same place by place of the kernel.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinygrad_bn_kernels import kernel
from tinygrad_bn_kernels.cpu.arrays import compiled
from tinygrad_bn_kernels.cpu.jit import njit

Array = NDArray[Any]
Ints = tuple[int, ...]
Pairs = tuple[tuple[int, int], ...]


@njit()
def _columns(x, kh, kw, sh, sw, dh, dw, top, left, oh, ow, columns):
    """What each place of the kernel meets in one image x (C, H, W); 0 in the padding."""
    c, height, width = x.shape
    zero = x.dtype.type(0)
    for row in range(c * kh * kw):
        channel, i, j = row // (kh * kw), row // kw % kh, row % kw
        out = columns[row]
        for p in range(oh):
            h = p * sh + i * dh - top
            start = j * dw - left
            line = out[p * ow : (p + 1) * ow]
            if h < 0 or h >= height:
                for q in range(ow):
                    line[q] = zero
            elif sw == 1 and start >= 0 and start + ow <= width:
                source = x[channel, h, start : start + ow]
                for q in range(ow):
                    line[q] = source[q]
            else:
                for q in range(ow):
                    w = q * sw + start
                    line[q] = x[channel, h, w] if 0 <= w < width else zero


@njit()
def _add_columns(columns, kh, kw, sh, sw, dh, dw, top, left, oh, ow, x):
    """The adjoint: add each column where it came from."""
    c, height, width = x.shape
    for row in range(c * kh * kw):
        channel, i, j = row // (kh * kw), row // kw % kh, row % kw
        source = columns[row]
        for p in range(oh):
            h = p * sh + i * dh - top
            if h < 0 or h >= height:
                continue
            start = j * dw - left
            line = source[p * ow : (p + 1) * ow]
            if sw == 1 and start >= 0 and start + ow <= width:
                out = x[channel, h, start : start + ow]
                for q in range(ow):
                    out[q] += line[q]
            else:
                for q in range(ow):
                    w = q * sw + start
                    if 0 <= w < width:
                        x[channel, h, w] += line[q]


class _Geometry:
    """The numbers that the loops need, from the options of the op; a single axis counts as an image one row high."""

    def __init__(self, size: Ints, kernel: Ints, out: Ints, stride: Ints, padding: Pairs, dilation: Ints) -> None:
        lead = (1,) * (2 - len(size))
        self.size, self.kernel, self.out = (*lead, *size), (*lead, *kernel), (*lead, *out)
        before = (*[0] * len(lead), *(b for b, _ in padding))
        self.numbers = (*self.kernel, *lead, *stride, *lead, *dilation, *before, *self.out)

    def fill(self, columns: Array, image: Array) -> None:
        """The columns of an image."""
        _columns(image, *self.numbers, columns)  # type: ignore[call-arg]

    def add(self, columns: Array, image: Array) -> None:
        """The adjoint of `fill`, added to the image."""
        _add_columns(columns, *self.numbers, image)  # type: ignore[call-arg]

    def columns(self, channels: int, dtype: Any) -> Array:
        """Room for the columns of one image."""
        return np.empty((channels * self.kernel[0] * self.kernel[1], self.out[0] * self.out[1]), dtype)


def _fits(groups: int, *arrays: Array) -> bool:
    """Whether this is work for the loops here."""
    return groups == 1 and arrays[0].ndim in (3, 4) and all(a.dtype.char in "fd" and a.size for a in arrays)


def _out(size: Ints, kernel: Ints, stride: Ints, padding: Pairs, dilation: Ints) -> Ints:
    axes = zip(size, kernel, stride, padding, dilation, strict=True)
    return tuple((n + before + after - d * (k - 1) - 1) // s + 1 for n, k, s, (before, after), d in axes)


@kernel("conv", "cpu")
def conv(x: Array, weight: Array, *, stride: Ints, padding: Pairs, dilation: Ints, groups: int) -> Any:
    """x (N, C, *size) by weight (O, C, *kernel): (N, O, *out)."""
    if not _fits(groups, x, weight) or x.shape[1] != weight.shape[1]:
        return NotImplemented
    dtype = np.result_type(x, weight)
    x, w = compiled(x, dtype), compiled(weight, dtype).reshape(len(weight), -1)
    out = _out(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    to = _Geometry(x.shape[2:], weight.shape[2:], out, stride, padding, dilation)
    images, y = x.reshape(*x.shape[:2], *to.size), np.empty((len(x), len(weight), *out), dtype)
    columns, flat = to.columns(x.shape[1], dtype), y.reshape(len(x), len(weight), -1)
    for image, result in zip(images, flat, strict=True):
        to.fill(columns, image)
        np.matmul(w, columns, out=result)
    return y


@kernel("conv_input", "cpu")
def conv_input(
    g: Array, weight: Array, *, size: Ints, stride: Ints, padding: Pairs, dilation: Ints, groups: int
) -> Any:
    """g (N, O, *out) and weight (O, C, *kernel) to (N, C, *size)."""
    if not _fits(groups, g, weight) or g.shape[1] != len(weight):
        return NotImplemented
    dtype = np.result_type(g, weight)
    gs, w = compiled(g, dtype).reshape(*g.shape[:2], -1), compiled(weight, dtype).reshape(len(weight), -1)
    to = _Geometry(size, weight.shape[2:], g.shape[2:], stride, padding, dilation)
    gx = np.zeros((len(g), weight.shape[1], *size), dtype)
    images, columns = gx.reshape(*gx.shape[:2], *to.size), to.columns(weight.shape[1], dtype)
    for gi, image in zip(gs, images, strict=True):
        np.matmul(w.T, gi, out=columns)
        to.add(columns, image)
    return gx


@kernel("conv_weight", "cpu")
def conv_weight(x: Array, g: Array, *, kernel: Ints, stride: Ints, padding: Pairs, dilation: Ints, groups: int) -> Any:
    """x (N, C, *size) and g (N, O, *out) to (O, C, *kernel)."""
    if not _fits(groups, x, g) or len(x) != len(g):
        return NotImplemented
    dtype = np.result_type(x, g)
    x, gs = compiled(x, dtype), compiled(g, dtype).reshape(*g.shape[:2], -1)
    to = _Geometry(x.shape[2:], kernel, g.shape[2:], stride, padding, dilation)
    images, columns = x.reshape(*x.shape[:2], *to.size), to.columns(x.shape[1], dtype)
    total, one = np.zeros((g.shape[1], len(columns)), dtype), np.empty((g.shape[1], len(columns)), dtype)
    for image, gi in zip(images, gs, strict=True):
        to.fill(columns, image)
        total += np.matmul(gi, columns.T, out=one)
    return total.reshape(g.shape[1], x.shape[1], *kernel)
