"""Convolution in one to three dimensions by im2col, a matrix product, and col2im.

The columns of a group are (C / G · K, N · P): for each of K kernel positions, the input elements that it multiplies at
each of P output positions. The output, the gradient of the input and the gradient of the weight are one product each.
The loops update positions by steps and remainders: a division for each element would cost more than its copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from tinygrad_bn_kernels import kernel
from tinygrad_bn_kernels.cuda import maps
from tinygrad_bn_kernels.cuda.array import DeviceArray
from tinygrad_bn_kernels.cuda.launch import blocks, launch, program, u4
from tinygrad_bn_kernels.cuda.layout import View, copy_between, transpose
from tinygrad_bn_kernels.cuda.linear import product
from tinygrad_bn_kernels.cuda.reduce import sum_
from tinygrad_bn_kernels.cuda.shim import cuda, uint32
from tinygrad_bn_kernels.cuda.strides import contiguous, row_block

Ints = tuple[int, ...]
Pairs = tuple[tuple[int, int], ...]

# Most elements of the columns at a time: images are processed in chunks.
COLUMNS = 1 << 26

_THREE = "u4 u4 u4"


@program("columns", f"f4* f4* u4 u4 {_THREE} {_THREE} {_THREE} {_THREE} {_THREE} {_THREE}", block=(32, 8), registers=64)
def COLUMNS_OF(T: Any) -> Callable[..., None]:
    """im2col: x (N, C, D, H, W) to (C · K, N · P). A row of the loop is one kernel position, channel and image."""

    def columns(
        x, out, images, channels, depth, height, width, kd, kh, kw, sd, sh, sw, pd, ph, pw, od, oh, ow, dd, dh, dw
    ):
        places, kernel = uint32(od * oh * ow), uint32(kd * kh * kw)
        step, row_step = uint32(cuda.blockDim.x), uint32(cuda.gridDim.x * cuda.blockDim.y)
        step_w, step_h = uint32(step % ow), uint32(step // ow)
        row = uint32(cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y)
        while row < uint32(images * channels * kernel):
            line = uint32(row // images)
            n = uint32(row - line * images)
            c = uint32(line // kernel)
            k = uint32(line - c * kernel)
            k_d = uint32(k // uint32(kh * kw))
            k_h = uint32(uint32(k // kw) - k_d * kh)
            k_w = uint32(k - uint32(k // kw) * kw)
            base = uint32((n * channels + c) * depth)
            p = uint32(cuda.threadIdx.x)
            o_w = uint32(p % ow)
            o_h = uint32(uint32(p // ow) % oh)
            o_d = uint32(p // uint32(oh * ow))
            while p < places:
                d = uint32(o_d * sd + k_d * dd - pd)  # negative positions wrap around, out of range
                h = uint32(o_h * sh + k_h * dh - ph)
                w = uint32(o_w * sw + k_w * dw - pw)
                value = T(0)
                if d < depth and h < height and w < width:
                    value = x[uint32(((base + d) * height + h) * width + w)]
                out[uint32(row * places + p)] = value
                p = uint32(p + step)
                o_w, o_h = uint32(o_w + step_w), uint32(o_h + step_h)
                if o_w >= ow:
                    o_w, o_h = uint32(o_w - ow), uint32(o_h + uint32(1))
                while o_h >= oh:
                    o_h, o_d = uint32(o_h - oh), uint32(o_d + uint32(1))
            row = uint32(row + row_step)

    return columns


@program("images", f"f4* f4* u4 u4 {_THREE} {_THREE} {_THREE} {_THREE} {_THREE} {_THREE}", block=(32, 8), registers=64)
def IMAGES_OF(T: Any) -> Callable[..., None]:
    """col2im, the adjoint: each element of x is a sum over columns. Every element is written by one thread."""

    def images_of(
        columns, x, images, channels, depth, height, width, kd, kh, kw, sd, sh, sw, pd, ph, pw, od, oh, ow, dd, dh, dw
    ):
        places = uint32(od * oh * ow)
        across, kernel = uint32(images * places), uint32(kd * kh * kw)
        step, row_step = uint32(cuda.blockDim.x), uint32(cuda.gridDim.x * cuda.blockDim.y)
        step_q, step_r = uint32(step // sw), uint32(step % sw)
        # The next kernel position is this far back in the output: quotient and remainder by the stride.
        back_d, rest_d = uint32(dd // sd), uint32(dd % sd)
        back_h, rest_h = uint32(dh // sh), uint32(dh % sh)
        back_w, rest_w = uint32(dw // sw), uint32(dw % sw)
        row = uint32(cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y)
        while row < uint32(images * channels * depth * height):
            plane = uint32(row // height)
            h = uint32(row - plane * height)
            image = uint32(plane // depth)
            d = uint32(plane - image * depth)
            n = uint32(image // channels)
            c = uint32(image - n * channels)
            d_q, h_q = uint32(uint32(d + pd) // sd), uint32(uint32(h + ph) // sh)
            d_r, h_r = uint32(uint32(d + pd) - d_q * sd), uint32(uint32(h + ph) - h_q * sh)
            w = uint32(cuda.threadIdx.x)
            w_q = uint32(uint32(w + pw) // sw)
            w_r = uint32(uint32(w + pw) - w_q * sw)
            while w < width:
                total = T(0)
                line = uint32(uint32(c * kernel) * across + n * places)
                q_d, r_d = d_q, d_r
                for _ in range(kd):
                    q_h, r_h = h_q, h_r
                    for _ in range(kh):
                        q_w, r_w = w_q, w_r
                        for _ in range(kw):
                            if r_d == 0 and r_h == 0 and r_w == 0 and q_d < od and q_h < oh and q_w < ow:
                                total += columns[uint32(line + (q_d * oh + q_h) * ow + q_w)]
                            line = uint32(line + across)
                            q_w = uint32(q_w - back_w)
                            if r_w < rest_w:
                                q_w, r_w = uint32(q_w - uint32(1)), uint32(r_w + sw)
                            r_w = uint32(r_w - rest_w)
                        q_h = uint32(q_h - back_h)
                        if r_h < rest_h:
                            q_h, r_h = uint32(q_h - uint32(1)), uint32(r_h + sh)
                        r_h = uint32(r_h - rest_h)
                    q_d = uint32(q_d - back_d)
                    if r_d < rest_d:
                        q_d, r_d = uint32(q_d - uint32(1)), uint32(r_d + sd)
                    r_d = uint32(r_d - rest_d)
                x[uint32(row * width + w)] = total
                w = uint32(w + step)
                w_q, w_r = uint32(w_q + step_q), uint32(w_r + step_r)
                if w_r >= sw:
                    w_q, w_r = uint32(w_q + uint32(1)), uint32(w_r - sw)
            row = uint32(row + row_step)

    return images_of


class _Geometry:
    """The sizes of one convolution, padded to three dimensions."""

    def __init__(
        self, channels: int, size: Ints, kernel: Ints, out: Ints, stride: Ints, padding: Pairs, dilation: Ints
    ) -> None:
        if len(size) > 3:
            raise ValueError(f"convolution on cuda has one to three dimensions; got {len(size)}")
        one, none = (1,) * (3 - len(size)), (0,) * (3 - len(size))
        self.size, self.out, self.channels = (*one, *size), (*one, *out), channels
        self.kernel, before = (*one, *kernel), (*none, *(b for b, _ in padding))
        self.numbers = (*self.size, *self.kernel, *one, *stride, *before, *self.out, *one, *dilation)
        self.places, self.lines = math.prod(out), channels * math.prod(kernel)

    def chunks(self, images: int) -> Iterator[tuple[int, int]]:
        """(first image, number of images) of each chunk."""
        each = max(1, COLUMNS // max(self.lines * self.places, 1))
        return ((first, min(each, images - first)) for first in range(0, images, each))

    def columns(self, x: DeviceArray, first: int, count: int) -> DeviceArray:
        """The columns (C · K, count · P) of `count` images from `first` on."""
        images = x.view((count, self.channels, *self.size), first * self.channels * math.prod(self.size))
        out = DeviceArray((self.lines, count * self.places), x.dtype)
        block = row_block(self.places)
        grid = blocks(count * self.lines, block[1])
        launch(COLUMNS_OF, grid, images, out, *u4(count, self.channels, *self.numbers), block=block)
        return out

    def images(self, columns: DeviceArray, x: DeviceArray, first: int, count: int) -> None:
        """The adjoint of `columns`, written to x."""
        images = x.view((count, self.channels, *self.size), first * self.channels * math.prod(self.size))
        block, rows = row_block(self.size[-1]), count * self.channels * self.size[0] * self.size[1]
        numbers = u4(count, self.channels, *self.numbers)
        launch(IMAGES_OF, blocks(rows, block[1]), columns, images, *numbers, block=block)

    def by_group(self, y: DeviceArray, first: int, count: int, groups: int) -> DeviceArray:
        """Outputs (N, O, P) as (G, O / G, count · P)."""
        channels = y.shape[1]
        part = y.view((count, channels, self.places), first * channels * self.places)
        return transpose(part, axes=(1, 0, 2)).reshape((groups, channels // groups, count * self.places))


@kernel("conv", "cuda")
def conv(
    x: DeviceArray, weight: DeviceArray, *, stride: Ints, padding: Pairs, dilation: Ints, groups: int
) -> DeviceArray:
    """x (N, C, *size) by weight (O, C / G, *kernel): (N, O, *out)."""
    x, weight = maps.same_dtype(x, weight)
    size, kernel, outputs = x.shape[2:], weight.shape[2:], len(weight)
    axes = zip(size, kernel, stride, padding, dilation, strict=True)
    out = tuple((n + before + after - d * (k - 1) - 1) // s + 1 for n, k, s, (before, after), d in axes)
    to = _Geometry(x.shape[1], size, kernel, out, stride, padding, dilation)
    y = DeviceArray((len(x), outputs, *out), x.dtype)
    for first, count in to.chunks(len(x)) if y.size else ():
        columns = to.columns(x, first, count)
        rows, width = outputs // groups, count * to.places
        part = product(weight, columns, rows, width, to.lines // groups)  # (G, O / G, count · P)
        shape = outputs, count, to.places
        steps = to.places, outputs * to.places, 1
        into = View(shape, first * outputs * to.places, steps)
        copy_between(part, View(shape, 0, contiguous(shape)), y, into)
    return y


@kernel("conv_input", "cuda")
def conv_input(
    g: DeviceArray, weight: DeviceArray, *, size: Ints, stride: Ints, padding: Pairs, dilation: Ints, groups: int
) -> DeviceArray:
    """g (N, O, *out) and weight (O, C / G, *kernel) to (N, C, *size)."""
    g, weight = maps.same_dtype(g, weight)
    channels = weight.shape[1] * groups
    to = _Geometry(channels, size, weight.shape[2:], g.shape[2:], stride, padding, dilation)
    gx = DeviceArray((len(g), channels, *size), g.dtype)
    for first, count in to.chunks(len(g)) if gx.size else ():
        gs, depth = to.by_group(g, first, count, groups), len(weight) // groups
        columns = product(weight, gs, to.lines // groups, count * to.places, depth, "tn")
        to.images(columns, gx, first, count)
    return gx


@kernel("conv_weight", "cuda")
def conv_weight(
    x: DeviceArray, g: DeviceArray, *, kernel: Ints, stride: Ints, padding: Pairs, dilation: Ints, groups: int
) -> DeviceArray:
    """x (N, C, *size) and g (N, O, *out) to (O, C / G, *kernel)."""
    x, g = maps.same_dtype(x, g)
    outputs, channels = g.shape[1], x.shape[1]
    to = _Geometry(channels, x.shape[2:], kernel, g.shape[2:], stride, padding, dilation)
    total = None
    for first, count in to.chunks(len(x)) if g.size else ():
        columns, gs = to.columns(x, first, count), to.by_group(g, first, count, groups)
        part = product(gs, columns, outputs // groups, to.lines // groups, count * to.places, "nt")
        total = part if total is None else maps.add(total, part)
    shape = (outputs, channels // groups, *kernel)
    return maps.fill(DeviceArray(shape, x.dtype), 0) if total is None else total.reshape(shape)


@kernel("conv_with_bias", "cuda")
def conv_with_bias(x: DeviceArray, weight: DeviceArray, bias: DeviceArray, **options: Any) -> DeviceArray:
    """`conv` plus a bias (O,)."""
    maps.check(x, weight, bias)
    return maps.add(conv(x, weight, **options), bias.reshape((-1, *(1,) * (x.ndim - 2))))


@kernel("conv_with_bias.vjp", "cuda")
def conv_with_bias_vjp(
    g: DeviceArray, y: DeviceArray, x: DeviceArray, weight: DeviceArray, bias: DeviceArray, *, needs: list[bool],
    **options: Any,
) -> Any:  # fmt: skip
    """Gradients with respect to x, weight and bias; None where `needs` is false."""
    gx = conv_input(g, weight, size=x.shape[2:], **options) if needs[0] else None
    gweight = conv_weight(x, g, kernel=weight.shape[2:], **options) if needs[1] else None
    return gx, gweight, sum_(g, axis=(0, *range(2, g.ndim))) if needs[2] else None
