"""Convolution in one or two dimensions: tiles of the output stay in registers while the kernel slides over an image.

The images of a batch are taken one by one. An image is copied into a buffer with its padding around it; there, what
one place of the kernel meets at all places of the output is one contiguous run, which starts at that place's offset.
So convolution is a matrix product of the weight with rows that overlap, and no columns need to be written down: of four
rows of the output, three vectors each are summed in twelve registers over all places of the kernel ("implicit GEMM").

With stride s every s-th element meets a place: the buffer then holds s × s images, each of the elements whose
coordinates leave the same rest when divided by s, and in each the runs are contiguous again.

A run goes on past the end of each row of the output, up to the width of the buffer. What it computes there is dropped,
and of a gradient, what comes from there is 0. As 0 times infinity is NaN, weights that are not finite, and gradients of
the weight that are not, are left to the reference.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import config

from tinygrad_bn_kernels import kernel
from tinygrad_bn_kernels.cpu.arrays import Array, compiled
from tinygrad_bn_kernels.cpu.jit import njit
from tinygrad_bn_kernels.cpu.memory import empty
from tinygrad_bn_kernels.cpu.reduce import sum_to
from tinygrad_bn_kernels.cpu.threads import MULTIPLICATIONS, split
from tinygrad_bn_kernels.cpu.tiles import ROWS, VECTORS, add_inner_products, add_products, copy, four

if not config.DISABLE_JIT:  # type: ignore[attr-defined]
    from tinygrad_bn_kernels.cpu.simd import lanes

Ints = tuple[int, ...]
Pairs = tuple[tuple[int, int], ...]


# The weight's gradient is a sum over the batch. It is made of so many parts, whatever the number of threads, so that
# the result does not depend on it; and in a part runs of about so many elements are summed in registers.
PARTS = 8
RUN = 1024


# ---- loops -----------------------------------------------------------------------------------------------


@njit()
def _inside(rest, before, stride, count, width):
    """Which elements of a row of the buffer come from the input: from the first, to before the second."""
    start = rest - before
    first = min(max((stride - 1 - start) // stride, 0), width)
    return first, max(min((count - 1 - start) // stride + 1, width), first)


@njit()
def _fill(image, at, size, frame, buffer, to):
    """Copy a channel of `size` (H, W), from `at` on, into the buffer from `to` on, flat (stride_h, stride_w, height,
    width), with 0 around it; it gives where that ends."""
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
def _take(buffer, at, size, frame, image, to):
    """The adjoint of `_fill`: a channel back from the buffer; each element stands in one place, or in none."""
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
def _framed_already(size, frame):
    """Whether an image is what the buffer would be, so that it can be read itself."""
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
    """What a tile may read after the last element."""
    return frame[-1] + VECTORS * lanes(images)


@njit()
def _correlate(images, frame, offsets, weights, bias, out, start, stop):
    """Each image (C, H, W), framed, by weights (groups, O / groups / 4, R · 4), to out (items, O / groups, OH, OW);
    an item is a group of an image."""
    _, inputs, height, width = images.shape
    _, channels, rows, columns = out.shape
    groups, tiles, length = weights.shape
    block = VECTORS * lanes(images)
    pitch = -(-((rows - 1) * frame[-1] + columns) // block) * block
    source, target = images.reshape(images.size), out.reshape(out.size)
    size, image, slack = (height, width), inputs * height * width, _slack(frame, images)
    buffer = np.zeros(inputs * _extent(frame) + slack, images.dtype)
    flat, numbers = np.zeros(ROWS * tiles * pitch, images.dtype), weights.reshape(weights.size)
    direct = _framed_already(size, frame)
    for item in range(start, stop):
        group = item % groups
        read, base = source, item * image
        if not direct or base + image + slack > len(source):
            read, base, to = buffer, 0, 0
            for c in range(inputs):
                to = _fill(source, item * image + c * height * width, size, frame, buffer, to)
        for o in range(channels):
            flat[o * pitch : (o + 1) * pitch] = bias[group * channels + o]
        for at in range(0, pitch, block):  # what the tiles of one run read stays in the first cache
            for tile in range(tiles):
                a, weight = tile * ROWS * pitch + at, (group * tiles + tile) * length
                add_products(read, offsets, base + at, numbers, weight, (1, ROWS), flat, four(a, pitch))
        for o in range(channels):
            for p in range(rows):
                copy(flat, o * pitch + p * frame[-1], target, ((item * channels + o) * rows + p) * columns, columns)


@njit()
def _correlate_input(gradients, frame, offsets, weights, out, start, stop):
    """The adjoint: gradients (items, O / groups, OH, OW) by weights (groups, R / 4, O / groups · 4) to out (items, C,
    H, W). What comes to each place of the kernel is added to the buffer at its offset."""
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
    places = np.full(ROWS * tiles, extent)  # rows of 0 after the last go where nobody looks
    places[: len(offsets)] = offsets
    for item in range(start, stop):
        for o in range(channels):
            _fill(source, (item * channels + o) * rows * columns, (rows, columns), plain, framed, o * pitch)
        buffer[:] = 0
        for at in range(0, pitch, block):
            for tile in range(tiles):
                weight, row = (item % groups * tiles + tile) * length, ROWS * tile
                to = places[row] + at, places[row + 1] + at, places[row + 2] + at, places[row + 3] + at
                add_products(framed, runs, at, numbers, weight, (1, ROWS), buffer, to)
        at = 0
        for c in range(outputs):
            at = _take(buffer, at, (height, width), frame, target, (item * outputs + c) * height * width)


@njit()
def _correlate_weight(images, frame, offsets, gradients, groups, sums, start, stop):
    """Σ over images of what each place of the kernel meets, times the output's gradient (items, O / groups, OH, OW).

    Part p of the images and group g go to sums[p, g] (O / groups, R), both rounded up to whole tiles.
    """
    items, inputs, height, width = images.shape
    _, channels, rows, columns = gradients.shape
    parts, batch = len(sums), items // groups
    step = lanes(images)
    length = -(-rows * frame[-1] // step) * step
    together = max(1, RUN // length)
    plain, size = (0, 0, 1, 1, rows, frame[-1]), (height, width)
    source, cotangents = images.reshape(images.size), gradients.reshape(gradients.size)
    image, slack = inputs * height * width, _slack(frame, images)
    pitch = inputs * _extent(frame) + slack
    buffer = np.zeros(together * pitch, images.dtype)
    framed = np.zeros(together * sums.shape[2] * length, images.dtype)
    direct = _framed_already(size, frame)
    for item in range(start, stop):
        part, group = item // groups, item % groups
        last = (part + 1) * batch // parts
        for n in range(part * batch // parts, last, together):
            count = min(together, last - n)
            read, base, apart = source, (n * groups + group) * image, groups * image
            copied = not direct or base + (count - 1) * apart + image + slack > len(source)
            if copied:
                read, base, apart = buffer, 0, pitch
            for k in range(count):
                i = (n + k) * groups + group
                if copied:
                    to = k * pitch
                    for c in range(inputs):
                        to = _fill(source, i * image + c * height * width, size, frame, buffer, to)
                for o in range(channels):
                    at = (i * channels + o) * rows * columns
                    _fill(cotangents, at, (rows, columns), plain, framed, (k * sums.shape[2] + o) * length)
            for begin in range(0, length, RUN):
                end = min(begin + RUN, length)
                for first in range(0, sums.shape[2], ROWS):
                    for r in range(0, sums.shape[3], VECTORS):
                        add_inner_products(
                            read, base, apart, offsets, r, framed, first, count, length, begin, end, sums[part, group]
                        )  # fmt: skip


# ---- kernels ---------------------------------------------------------------------------------------------


class _Axis(NamedTuple):
    """One axis of a convolution: places of the kernel, elements of the output, stride, padding before, dilation."""

    kernel: int
    out: int
    stride: int
    before: int
    dilation: int

    @property
    def places(self) -> Array:
        """Where the places of the kernel are."""
        return np.arange(self.kernel) * self.dilation

    @property
    def extent(self) -> int:
        """How many elements of one rest the buffer needs."""
        return (self.kernel - 1) * self.dilation // self.stride + self.out


def _packed(weight: Array) -> Array:
    """(groups, O, R) as tiles want it: (groups, O / 4, R · 4), with rows of 0 after the last."""
    groups, channels, places = weight.shape
    padded = np.zeros((groups, -(-channels // ROWS) * ROWS, places), weight.dtype)
    padded[:, :channels] = weight
    tiles = padded.reshape(groups, -1, ROWS, places).transpose(0, 1, 3, 2)
    return np.ascontiguousarray(tiles).reshape(groups, -1, ROWS * places)


def _frame(kernel: Ints, out: Ints, stride: Ints, padding: Pairs, dilation: Ints, channels: int) -> tuple[Ints, Array]:
    """How an image is framed: what is before it, strides, extents; and where in its buffer the run of each channel and
    place of the kernel starts, (channels · KH · KW,). Of a single axis, the first is one element high."""
    before = (b for b, _ in padding)
    given = [_Axis(*each) for each in zip(kernel, out, stride, before, dilation, strict=True)]
    rows, columns = [_Axis(1, 1, 1, 0, 1)] * (2 - len(given)) + given
    i, j = rows.places[:, None], columns.places
    c = np.arange(channels)[:, None, None]
    plane = (c * rows.stride + i % rows.stride) * columns.stride + j % columns.stride
    offsets = (plane * rows.extent + i // rows.stride) * columns.extent + j // columns.stride
    frame = rows.before, columns.before, rows.stride, columns.stride, rows.extent, columns.extent
    return frame, np.ascontiguousarray(offsets, np.intp).ravel()


def _fits(groups: int, *arrays: Array) -> bool:
    """Whether this is work for the loops here: three axes are left to the reference."""
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
    """x (N, C, *size) by weight (O, C / groups, *kernel): (N, O, *out)."""
    zero = np.zeros(len(weight), np.result_type(x, weight))
    return conv_fused(x, weight, zero, stride=stride, padding=padding, dilation=dilation, groups=groups)


@kernel("conv_fused", "cpu")
def conv_fused(
    x: Array, weight: Array, bias: Array, *, stride: Ints, padding: Pairs, dilation: Ints, groups: int
) -> Any:
    """`conv`, and the bias (O,) added."""
    if not _fits(groups, x, weight, bias) or x.shape[1] != weight.shape[1] * groups or bias.shape != weight.shape[:1]:
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
    if not _fits(groups, g, weight) or g.shape[1] != len(weight) or not np.isfinite(weight).all():
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
    if not _fits(groups, x, g) or len(x) != len(g):
        return NotImplemented
    dtype = np.result_type(x, g)
    images, gs = _planes(compiled(x, dtype), groups), _planes(compiled(g, dtype), groups)
    frame, offsets = _frame(kernel, g.shape[2:], stride, padding, dilation, images.shape[1])
    places = len(offsets)
    offsets = np.pad(offsets, (0, -places % VECTORS))
    parts = min(PARTS, len(x))
    sums = np.zeros((parts, groups, -(-gs.shape[1] // ROWS) * ROWS, len(offsets)), dtype)
    work = g.size * places / MULTIPLICATIONS
    split(_correlate_weight, parts * groups, work, images, frame, offsets, gs, groups, sums)
    gweight = np.ascontiguousarray(sums.sum(axis=0)[:, : gs.shape[1], :places])
    if not np.isfinite(gweight).all():
        return NotImplemented
    return gweight.reshape(g.shape[1], images.shape[1], *kernel)


@kernel("conv_fused.vjp", "cpu")
def conv_fused_vjp(
    g: Array, y: Array, x: Array, weight: Array, bias: Array, *, needs: list[bool], **options: Any
) -> Any:
    """The gradients of x, weight and bias, each where it is needed."""
    if not _fits(options["groups"], g, x, weight):
        return NotImplemented
    gx = conv_input(g, weight, size=x.shape[2:], **options) if needs[0] else None
    gweight = conv_weight(x, g, kernel=weight.shape[2:], **options) if needs[1] else None
    gbias = sum_to(g, shape=(len(bias), *(1,) * (g.ndim - 2))) if needs[2] else None
    gradients = gx, gweight, gbias
    if any(gradient is NotImplemented for gradient in gradients):
        return NotImplemented
    return gx, gweight, None if gbias is None else gbias.reshape(bias.shape)
