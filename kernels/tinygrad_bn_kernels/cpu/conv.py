"""Convolution in one or two dimensions, as a matrix product without im2col ("implicit GEMM").

Each image is copied into a buffer with its padding. There the elements that one position (c, i, j) of the kernel is
multiplied by, for all positions of the output, are one contiguous run that starts at the position's offset. So the
output is the product of the weight and a matrix whose rows are overlapping runs of the buffer; tiles of it, 4 channels
by 3 vectors, are summed in registers.

With stride s the buffer holds s × s sub-images, one for each remainder of the coordinates divided by s, so that runs
are contiguous again.

The rows of the output are as wide as the buffer: the elements past their end are dropped in the output, and 0 in its
gradient. As 0 · ∞ is NaN, the reference handles weights, and gradients of weights, that are not finite.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numba import config

from tinygrad_bn_kernels import kernel
from tinygrad_bn_kernels.cpu.arrays import Array, compiled
from tinygrad_bn_kernels.cpu.jit import njit
from tinygrad_bn_kernels.cpu.memory import empty
from tinygrad_bn_kernels.cpu.reduce import sum_to
from tinygrad_bn_kernels.cpu.threads import MULTIPLICATIONS, split

if not config.DISABLE_JIT:  # type: ignore[attr-defined]
    from tinygrad_bn_kernels.cpu.simd import lanes
    from tinygrad_bn_kernels.cpu.tiles import ROWS, VECTORS, add_inner_products, add_products, copy

Ints = tuple[int, ...]
Pairs = tuple[tuple[int, int], ...]


# The weight's gradient is the sum over PARTS parts of the batch, for any number of threads, so that its bits do not
# depend on it. Runs of about RUN elements are summed in registers.
PARTS = 8
RUN = 1024


# ---- loops -----------------------------------------------------------------------------------------------


@njit()
def _inside(remainder, before, stride, count, width):
    """The range of a buffer row that is inside the image, in the sub-image of this remainder."""
    start = remainder - before
    first = min(max((stride - 1 - start) // stride, 0), width)
    return first, max(min((count - 1 - start) // stride + 1, width), first)


@njit()
def _fill(image, at, size, frame, buffer, to):
    """Copy a channel of `size` (H, W), from `at`, into the buffer (stride_h, stride_w, height, width), from `to`.

    Elements outside the image are 0. Returns the end of the buffer.
    """
    (rows, columns), (before_h, before_w, stride_h, stride_w, height, width) = size, frame
    for a in range(stride_h):
        for b in range(stride_w):
            start = b - before_w
            first, stop = _inside(b, before_w, stride_w, columns, width)
            for u in range(height):
                h = u * stride_h + a - before_h
                inside = 0 <= h < rows
                for v in range(first if inside else width):
                    buffer[to + v] = 0
                if inside:
                    row = at + h * columns + start
                    if stride_w == 1:
                        copy(image, row + first, buffer, to + first, stop - first)
                    else:
                        for v in range(first, stop):
                            buffer[to + v] = image[row + v * stride_w]
                    for v in range(stop, width):
                        buffer[to + v] = 0
                to += width
    return to


@njit()
def _unfill(buffer, at, size, frame, image, to):
    """The adjoint of `_fill`: copy a channel from the buffer, and 0 for elements that it lacks."""
    (rows, columns), (before_h, before_w, stride_h, stride_w, height, width) = size, frame
    image[to : to + rows * columns] = 0
    for a in range(stride_h):
        for b in range(stride_w):
            start = b - before_w
            first, stop = _inside(b, before_w, stride_w, columns, width)
            for u in range(height):
                h = u * stride_h + a - before_h
                if 0 <= h < rows:
                    row = to + h * columns + start
                    if stride_w == 1:
                        copy(buffer, at + first, image, row + first, stop - first)
                    else:
                        for v in range(first, stop):
                            image[row + v * stride_w] = buffer[at + v]
                at += width
    return at


@njit()
def _needs_no_buffer(size, frame):
    """Whether the buffer would equal the image."""
    before_h, before_w, stride_h, stride_w, height, width = frame
    plain = before_h == 0 and before_w == 0 and stride_h == 1 and stride_w == 1
    return plain and height == size[0] and width == size[1]


@njit()
def _extent(frame):
    """Elements of a channel in the buffer."""
    _, _, stride_h, stride_w, height, width = frame
    return stride_h * stride_w * height * width


@njit()
def _slack(frame, images):
    """Elements that a tile may read past the end."""
    return frame[-1] + VECTORS * lanes(images)


@njit()
def _correlate(images, frame, offsets, weights, bias, out, start, stop):
    """out (items, O / groups, OH, OW) from images (items, C / groups, H, W) and packed weights.

    The weights are (groups, tiles, R · ROWS). An item is one group of one image; R is the number of positions in the
    kernel.
    """
    _, inputs, height, width = images.shape
    _, channels, rows, columns = out.shape
    groups, tiles, length = weights.shape
    block = VECTORS * lanes(images)
    pitch = -(-((rows - 1) * frame[-1] + columns) // block) * block
    source, target = images.reshape(images.size), out.reshape(out.size)
    size, image, slack = (height, width), inputs * height * width, _slack(frame, images)
    buffer = np.zeros(inputs * _extent(frame) + slack, images.dtype)
    flat, numbers = np.zeros(ROWS * tiles * pitch, images.dtype), weights.reshape(weights.size)
    targets, direct = np.arange(ROWS * tiles) * pitch, _needs_no_buffer(size, frame)
    for item in range(start, stop):
        group = item % groups
        read, base = source, item * image
        if not direct or base + image + slack > len(source):
            read, base, to = buffer, 0, 0
            for c in range(inputs):
                to = _fill(source, item * image + c * height * width, size, frame, buffer, to)
        for o in range(channels):
            flat[o * pitch : (o + 1) * pitch] = bias[group * channels + o]
        for at in range(0, pitch, block):  # the block of each run stays in the L1 cache
            for tile in range(tiles):
                weight = (group * tiles + tile) * length
                add_products(read, offsets, base + at, numbers, weight, (1, ROWS), flat, targets, tile * ROWS, at)
        for o in range(channels):
            for p in range(rows):
                copy(flat, o * pitch + p * frame[-1], target, ((item * channels + o) * rows + p) * columns, columns)


@njit()
def _correlate_input(gradients, frame, offsets, weights, out, start, stop):
    """The adjoint: out (items, C / groups, H, W) from gradients (items, O / groups, OH, OW) and packed weights.

    The weights are (groups, R / ROWS, O / groups · ROWS). The run of each position is added to the buffer at its
    offset.
    """
    _, channels, rows, columns = gradients.shape
    _, outputs, height, width = out.shape
    groups, tiles, length = weights.shape
    block, plain = VECTORS * lanes(gradients), (0, 0, 1, 1, rows, frame[-1])
    pitch = -(-rows * frame[-1] // block) * block
    source, target = gradients.reshape(gradients.size), out.reshape(out.size)
    framed, runs = np.zeros(channels * pitch, gradients.dtype), np.arange(channels) * pitch
    extent = outputs * _extent(frame) + _slack(frame, gradients)
    buffer = np.zeros(extent + pitch, gradients.dtype)
    numbers = weights.reshape(weights.size)
    targets = np.full(ROWS * tiles, extent)  # the zero rows of the last tile are written past the end
    targets[: len(offsets)] = offsets
    for item in range(start, stop):
        for o in range(channels):
            _fill(source, (item * channels + o) * rows * columns, (rows, columns), plain, framed, o * pitch)
        buffer[:] = 0
        for at in range(0, pitch, block):
            for tile in range(tiles):
                weight = (item % groups * tiles + tile) * length
                add_products(framed, runs, at, numbers, weight, (1, ROWS), buffer, targets, tile * ROWS, at)
        at = 0
        for c in range(outputs):
            at = _unfill(buffer, at, (height, width), frame, target, (item * outputs + c) * height * width)


@njit()
def _correlate_weight(images, frame, offsets, gradients, groups, sums, start, stop):
    """Σ over images of each position's run times the output's gradient (items, O / groups, OH, OW).

    sums (PARTS, groups, O / groups, R) has its last axes rounded up to whole tiles.
    """
    items, inputs, height, width = images.shape
    _, channels, rows, columns = gradients.shape
    parts, _, padded, positions = sums.shape
    batch, totals = items // groups, sums.reshape(sums.size)
    step = lanes(images)
    length = -(-rows * frame[-1] // step) * step
    together = max(1, RUN // length)
    plain, size = (0, 0, 1, 1, rows, frame[-1]), (height, width)
    source, cotangents = images.reshape(images.size), gradients.reshape(gradients.size)
    image, slack = inputs * height * width, _slack(frame, images)
    pitch = inputs * _extent(frame) + slack
    buffer = np.zeros(together * pitch, images.dtype)
    framed = np.zeros(together * padded * length, images.dtype)
    direct = _needs_no_buffer(size, frame)
    for item in range(start, stop):
        part, group = item // groups, item % groups
        last = (part + 1) * batch // parts
        for n in range(part * batch // parts, last, together):
            count = min(together, last - n)
            read, base, stride = source, (n * groups + group) * image, groups * image
            copied = not direct or base + (count - 1) * stride + image + slack > len(source)
            if copied:
                read, base, stride = buffer, 0, pitch
            for k in range(count):
                i = (n + k) * groups + group
                if copied:
                    to = k * pitch
                    for c in range(inputs):
                        to = _fill(source, i * image + c * height * width, size, frame, buffer, to)
                for o in range(channels):
                    at = (i * channels + o) * rows * columns
                    _fill(cotangents, at, (rows, columns), plain, framed, (k * padded + o) * length)
            for begin in range(0, length, RUN):
                end = min(begin + RUN, length)
                for first in range(0, padded, ROWS):
                    for r in range(0, positions, VECTORS):
                        to = ((part * groups + group) * padded + first) * positions + r
                        add_inner_products(
                            read, base, stride, offsets, r, framed, first * length, padded * length, length, count,
                            begin, end, totals, to, positions,
                        )  # fmt: skip


# ---- kernels ---------------------------------------------------------------------------------------------


class _Axis(NamedTuple):
    """One axis of a convolution: sizes of kernel and output, stride, padding before, dilation."""

    kernel: int
    out: int
    stride: int
    before: int
    dilation: int

    @property
    def positions(self) -> Array:
        """The kernel's positions in the padded image."""
        return np.arange(self.kernel) * self.dilation

    @property
    def extent(self) -> int:
        """Elements of a sub-image."""
        return (self.kernel - 1) * self.dilation // self.stride + self.out


def _packed(weight: Array) -> Array:
    """The weight (groups, O, R) packed for tiles: (groups, O / ROWS, R · ROWS), with O rounded up by rows of 0."""
    groups, channels, positions = weight.shape
    padded = np.zeros((groups, -(-channels // ROWS) * ROWS, positions), weight.dtype)
    padded[:, :channels] = weight
    tiles = padded.reshape(groups, -1, ROWS, positions).transpose(0, 1, 3, 2)
    return np.ascontiguousarray(tiles).reshape(groups, -1, ROWS * positions)


def _frame(kernel: Ints, out: Ints, stride: Ints, padding: Pairs, dilation: Ints, channels: int) -> tuple[Ints, Array]:
    """The layout of the buffer (padding before, strides, extents), and the offsets of the runs, (channels · KH · KW,).

    With one axis, the height is 1.
    """
    before = (b for b, _ in padding)
    given = [_Axis(*each) for each in zip(kernel, out, stride, before, dilation, strict=True)]
    rows, columns = [_Axis(1, 1, 1, 0, 1)] * (2 - len(given)) + given
    i, j = rows.positions[:, None], columns.positions
    c = np.arange(channels)[:, None, None]
    plane = (c * rows.stride + i % rows.stride) * columns.stride + j % columns.stride
    offsets = (plane * rows.extent + i // rows.stride) * columns.extent + j // columns.stride
    frame = rows.before, columns.before, rows.stride, columns.stride, rows.extent, columns.extent
    if channels * math.prod(frame[2:]) >= 1 << 48:  # beyond int64 the loops would leave the buffer
        raise MemoryError(f"the padded image would have {channels * math.prod(frame[2:])} elements")
    return frame, np.ascontiguousarray(offsets, np.intp).ravel()


def _is_supported(*arrays: Array) -> bool:
    """Whether the loops support these arrays: one or two spatial axes, float32 or float64, not empty."""
    if config.DISABLE_JIT:  # type: ignore[attr-defined]
        return False
    return arrays[0].ndim in (3, 4) and all(a.dtype.char in "fd" and a.size for a in arrays)


def _out(size: Ints, kernel: Ints, stride: Ints, padding: Pairs, dilation: Ints) -> Ints:
    each = zip(size, kernel, stride, padding, dilation, strict=True)
    return tuple((n + before + after - d * (k - 1) - 1) // s + 1 for n, k, s, (before, after), d in each)


def _planes(x: Array, groups: int) -> Array:
    """(N, C, *size) as (N · groups, C / groups, H, W)."""
    return x.reshape(len(x) * groups, x.shape[1] // groups, *(1,) * (4 - x.ndim), *x.shape[2:])


@kernel("conv", "cpu")
def conv(x: Array, weight: Array, *, stride: Ints, padding: Pairs, dilation: Ints, groups: int) -> Any:
    """x (N, C, *size) and weight (O, C / groups, *kernel) to (N, O, *out)."""
    zero = np.zeros(len(weight), np.result_type(x, weight))
    return conv_with_bias(x, weight, zero, stride=stride, padding=padding, dilation=dilation, groups=groups)


@kernel("conv_with_bias", "cpu")
def conv_with_bias(
    x: Array, weight: Array, bias: Array, *, stride: Ints, padding: Pairs, dilation: Ints, groups: int
) -> Any:
    """`conv` plus the bias (O,)."""
    if not _is_supported(x, weight, bias) or x.shape[1] != weight.shape[1] * groups or bias.shape != weight.shape[:1]:
        return NotImplemented
    dtype = np.result_type(x, weight, bias)
    out = _out(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    frame, offsets = _frame(weight.shape[2:], out, stride, padding, dilation, weight.shape[1])
    y = empty((len(x), len(weight), *out), dtype)
    tiles = _packed(compiled(weight, dtype).reshape(groups, len(weight) // groups, -1))
    arguments = _planes(compiled(x, dtype), groups), frame, offsets, tiles, compiled(bias, dtype), _planes(y, groups)
    split(_correlate, len(x) * groups, y.size * weight[0].size / MULTIPLICATIONS, *arguments)
    return y


@kernel("conv_input", "cpu")
def conv_input(
    g: Array, weight: Array, *, size: Ints, stride: Ints, padding: Pairs, dilation: Ints, groups: int
) -> Any:
    """g (N, O, *out) and weight (O, C / groups, *kernel) to (N, C, *size)."""
    if not _is_supported(g, weight) or g.shape[1] != len(weight) or not np.isfinite(weight).all():
        return NotImplemented
    dtype = np.result_type(g, weight)
    frame, offsets = _frame(weight.shape[2:], g.shape[2:], stride, padding, dilation, weight.shape[1])
    adjoint = compiled(weight, dtype).reshape(groups, len(weight) // groups, -1).swapaxes(1, 2)
    gx = empty((len(g), groups * weight.shape[1], *size), dtype)
    arguments = _planes(compiled(g, dtype), groups), frame, offsets, _packed(adjoint), _planes(gx, groups)
    split(_correlate_input, len(g) * groups, g.size * len(offsets) / MULTIPLICATIONS, *arguments)
    return gx


@kernel("conv_weight", "cpu")
def conv_weight(x: Array, g: Array, *, kernel: Ints, stride: Ints, padding: Pairs, dilation: Ints, groups: int) -> Any:
    """x (N, C, *size) and g (N, O, *out) to (O, C / groups, *kernel)."""
    if not _is_supported(x, g) or len(x) != len(g):
        return NotImplemented
    dtype = np.result_type(x, g)
    images, gs = _planes(compiled(x, dtype), groups), _planes(compiled(g, dtype), groups)
    frame, offsets = _frame(kernel, g.shape[2:], stride, padding, dilation, images.shape[1])
    positions = len(offsets)
    offsets = np.pad(offsets, (0, -positions % VECTORS))
    parts = min(PARTS, len(x))
    sums = np.zeros((parts, groups, -(-gs.shape[1] // ROWS) * ROWS, len(offsets)), dtype)
    work = g.size * positions / MULTIPLICATIONS
    split(_correlate_weight, parts * groups, work, images, frame, offsets, gs, groups, sums)
    gweight = np.ascontiguousarray(sums.sum(axis=0)[:, : gs.shape[1], :positions])
    if not np.isfinite(gweight).all():
        return NotImplemented
    return gweight.reshape(g.shape[1], images.shape[1], *kernel)


@kernel("conv_with_bias.vjp", "cpu")
def conv_with_bias_vjp(
    g: Array, y: Array, x: Array, weight: Array, bias: Array, *, needs: list[bool], **options: Any
) -> Any:
    """The gradients of x, weight and bias, or None if not needed."""
    if not _is_supported(g, x, weight):
        return NotImplemented
    gx = conv_input(g, weight, size=x.shape[2:], **options) if needs[0] else None
    gweight = conv_weight(x, g, kernel=weight.shape[2:], **options) if needs[1] else None
    gbias = sum_to(g, shape=(len(bias), *(1,) * (g.ndim - 2))) if needs[2] else None
    gradients = gx, gweight, gbias
    if any(gradient is NotImplemented for gradient in gradients):
        return NotImplemented
    return gx, gweight, None if gbias is None else gbias.reshape(bias.shape)
