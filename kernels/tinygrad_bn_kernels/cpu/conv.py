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
from tinygrad_bn_kernels.cpu.reduce import sum_to
from tinygrad_bn_kernels.cpu.threads import split

if not config.DISABLE_JIT:  # type: ignore[attr-defined]
    from tinygrad_bn_kernels.cpu.simd import fma, lanes, load, splat, store, total

Ints = tuple[int, ...]
Pairs = tuple[tuple[int, int], ...]

ROWS = 4  # of the output in a tile
VECTORS = 3  # of each row in a tile
PLACES = 3  # of the kernel in a tile of the weight's gradient
MULTIPLICATIONS = 16  # that take as long as moving one element

# The weight's gradient is a sum over the batch. It is made of so many parts, whatever the number of threads, so that
# the result does not depend on it; and in a part runs of about so many elements are summed in registers.
PARTS = 16
RUN = 1024


# ---- loops -----------------------------------------------------------------------------------------------


@njit()
def _inside(rest, before, stride, count, width):
    """Which elements of a row of the buffer come from the input: from the first, to before the second."""
    start = rest - before
    first = min(max((stride - 1 - start) // stride, 0), width)
    return first, max(min((count - 1 - start) // stride + 1, width), first)


@njit()
def _fill(image, frame, buffer):
    """Copy an image (C, H, W) into buffer, flat (C, stride_h, stride_w, height, width), with 0 around it."""
    before_h, before_w, stride_h, stride_w, height, width = frame
    channels, rows, columns = image.shape
    to = 0
    for c in range(channels):
        for a in range(stride_h):
            for b in range(stride_w):
                start = b - before_w
                first, stop = _inside(b, before_w, stride_w, columns, width)
                for u in range(height):
                    h = u * stride_h + a - before_h
                    if h < 0 or h >= rows:
                        for v in range(width):
                            buffer[to + v] = 0
                    else:
                        for v in range(first):
                            buffer[to + v] = 0
                        if stride_w == 1:
                            for v in range(first, stop):
                                buffer[to + v] = image[c, h, v + start]
                        else:
                            for v in range(first, stop):
                                buffer[to + v] = image[c, h, v * stride_w + start]
                        for v in range(stop, width):
                            buffer[to + v] = 0
                    to += width
    buffer[to:] = 0


@njit()
def _take(buffer, frame, image):
    """The adjoint of `_fill`: back from the buffer to the image; each element stands in one place."""
    before_h, before_w, stride_h, stride_w, height, width = frame
    channels, rows, columns = image.shape
    at = 0
    for c in range(channels):
        for a in range(stride_h):
            for b in range(stride_w):
                start = b - before_w
                first, stop = _inside(b, before_w, stride_w, columns, width)
                for u in range(height):
                    h = u * stride_h + a - before_h
                    if 0 <= h < rows:
                        for v in range(first, stop):
                            image[c, h, v * stride_w + start] = buffer[at + v]
                    at += width


@njit()
def _tile(buffer, offsets, weight, at, flat, first, to):
    """Three vectors of four rows of `flat`, from row `first` and column `to` on: sums over all offsets of what stands
    `at` elements after each, times the four numbers that `weight` has for it."""
    step = lanes(buffer)
    zero = splat(buffer.dtype.type(0))
    a0, a1, a2 = zero, zero, zero
    b0, b1, b2 = zero, zero, zero
    c0, c1, c2 = zero, zero, zero
    d0, d1, d2 = zero, zero, zero
    for r in range(len(offsets)):
        start = offsets[r] + at
        x0, x1, x2 = load(buffer, start), load(buffer, start + step), load(buffer, start + 2 * step)
        w = splat(weight[ROWS * r])
        a0, a1, a2 = fma(w, x0, a0), fma(w, x1, a1), fma(w, x2, a2)
        w = splat(weight[ROWS * r + 1])
        b0, b1, b2 = fma(w, x0, b0), fma(w, x1, b1), fma(w, x2, b2)
        w = splat(weight[ROWS * r + 2])
        c0, c1, c2 = fma(w, x0, c0), fma(w, x1, c1), fma(w, x2, c2)
        w = splat(weight[ROWS * r + 3])
        d0, d1, d2 = fma(w, x0, d0), fma(w, x1, d1), fma(w, x2, d2)
    row = flat[first]
    store(row, to, a0), store(row, to + step, a1), store(row, to + 2 * step, a2)
    row = flat[first + 1]
    store(row, to, b0), store(row, to + step, b1), store(row, to + 2 * step, b2)
    row = flat[first + 2]
    store(row, to, c0), store(row, to + step, c1), store(row, to + 2 * step, c2)
    row = flat[first + 3]
    store(row, to, d0), store(row, to + step, d1), store(row, to + 2 * step, d2)


@njit()
def _room(channels, frame, dtype_of):
    """A buffer for so many channels, and what a tile may read past its end."""
    _, _, stride_h, stride_w, height, width = frame
    slack = width + VECTORS * lanes(dtype_of)
    return np.zeros(channels * stride_h * stride_w * height * width + slack, dtype_of.dtype)


@njit()
def _correlate(images, frame, offsets, weights, bias, out, start, stop):
    """Each image (C, H, W), framed, by weights (groups, O / groups / 4, R · 4), to out (items, O / groups, OH, OW); an
    item is a group of an image."""
    width = frame[-1]
    _, channels, rows, columns = out.shape
    groups = len(weights)
    length = (rows - 1) * width + columns
    block = VECTORS * lanes(images)
    buffer = _room(images.shape[1], frame, images)
    flat = np.empty((ROWS * weights.shape[1], length + block), images.dtype)
    for item in range(start, stop):
        _fill(images[item], frame, buffer)
        group = item % groups
        for at in range(0, length, block):  # what the tiles of one run read stays in the first cache
            for tile in range(weights.shape[1]):
                _tile(buffer, offsets, weights[group, tile], at, flat, tile * ROWS, at)
        for o in range(channels):
            shift = bias[group * channels + o]
            for p in range(rows):
                source, line = flat[o, p * width : p * width + columns], out[item, o, p]
                for q in range(columns):
                    line[q] = source[q] + shift


@njit()
def _correlate_input(gradients, frame, offsets, weights, out, start, stop):
    """The adjoint: gradients (items, O / groups, OH, OW) by weights (groups, R / 4, O / groups · 4) to out (items, C,
    H, W). What comes to each place of the kernel is added to the buffer at its offset."""
    _, channels, rows, _ = gradients.shape
    width, groups, places = frame[-1], len(weights), len(offsets)
    length = rows * width
    step, one = lanes(gradients), splat(gradients.dtype.type(1))
    block = VECTORS * step
    plain = (0, 0, 1, 1, rows, width)
    framed, runs = _room(channels, plain, gradients), np.arange(channels) * length
    buffer = _room(out.shape[1], frame, gradients)
    flat = np.empty((ROWS, block), gradients.dtype)
    for item in range(start, stop):
        _fill(gradients[item], plain, framed)
        buffer[:] = 0
        for at in range(0, length, block):
            count = min(block, length - at)
            for first in range(0, places, ROWS):
                _tile(framed, runs, weights[item % groups, first // ROWS], at, flat, 0, 0)
                for r in range(first, min(first + ROWS, places)):
                    source, to = flat[r - first], offsets[r] + at
                    whole = count // step * step
                    for t in range(0, whole, step):
                        store(buffer, to + t, fma(one, load(source, t), load(buffer, to + t)))
                    for t in range(whole, count):
                        buffer[to + t] += source[t]
        _take(buffer, frame, out[item])


@njit()
def _weight_tile(buffers, gradients, count, offsets, first, r, begin, end, sums):
    """Add to four rows and three columns of `sums`, from `first` and `r` on: Σ of gradients (count, O, T) times what
    each place meets in the buffers (count, T'), over the run from `begin` to `end`."""
    step = lanes(buffers)
    zero = splat(buffers.dtype.type(0))
    a0, a1, a2 = zero, zero, zero
    b0, b1, b2 = zero, zero, zero
    c0, c1, c2 = zero, zero, zero
    d0, d1, d2 = zero, zero, zero
    s0, s1, s2 = offsets[r], offsets[r + 1], offsets[r + 2]
    for k in range(count):
        x = buffers[k]
        ga, gb, gc, gd = gradients[k, first], gradients[k, first + 1], gradients[k, first + 2], gradients[k, first + 3]
        for t in range(begin, end, step):
            x0, x1, x2 = load(x, s0 + t), load(x, s1 + t), load(x, s2 + t)
            g = load(ga, t)
            a0, a1, a2 = fma(g, x0, a0), fma(g, x1, a1), fma(g, x2, a2)
            g = load(gb, t)
            b0, b1, b2 = fma(g, x0, b0), fma(g, x1, b1), fma(g, x2, b2)
            g = load(gc, t)
            c0, c1, c2 = fma(g, x0, c0), fma(g, x1, c1), fma(g, x2, c2)
            g = load(gd, t)
            d0, d1, d2 = fma(g, x0, d0), fma(g, x1, d1), fma(g, x2, d2)
    row = sums[first]
    row[r], row[r + 1], row[r + 2] = row[r] + total(a0), row[r + 1] + total(a1), row[r + 2] + total(a2)
    row = sums[first + 1]
    row[r], row[r + 1], row[r + 2] = row[r] + total(b0), row[r + 1] + total(b1), row[r + 2] + total(b2)
    row = sums[first + 2]
    row[r], row[r + 1], row[r + 2] = row[r] + total(c0), row[r + 1] + total(c1), row[r + 2] + total(c2)
    row = sums[first + 3]
    row[r], row[r + 1], row[r + 2] = row[r] + total(d0), row[r + 1] + total(d1), row[r + 2] + total(d2)


@njit()
def _correlate_weight(images, frame, offsets, gradients, groups, sums, start, stop):
    """Σ over images of what each place of the kernel meets, times the output's gradient (items, O / groups, OH, OW).

    Part p of the images and group g go to sums[p, g] (O / groups, R), both rounded up to whole tiles.
    """
    channels, rows = gradients.shape[1:3]
    width, parts, batch = frame[-1], len(sums), len(images) // groups
    step = lanes(images)
    length = (rows * width + step - 1) // step * step
    together = max(1, RUN // length)
    plain = (0, 0, 1, 1, rows, width)
    buffers = np.empty((together, len(_room(images.shape[1], frame, images))), images.dtype)
    framed = np.zeros((together, sums.shape[2], length), images.dtype)
    for item in range(start, stop):
        part, group = item // groups, item % groups
        last = (part + 1) * batch // parts
        for n in range(part * batch // parts, last, together):
            count = min(together, last - n)
            for k in range(count):
                i = (n + k) * groups + group
                _fill(images[i], frame, buffers[k])
                for o in range(channels):
                    _fill(gradients[i, o : o + 1], plain, framed[k, o])
            for begin in range(0, length, RUN):
                end = min(begin + RUN, length)
                for first in range(0, sums.shape[2], ROWS):
                    for r in range(0, sums.shape[3], PLACES):
                        _weight_tile(buffers, framed, count, offsets, first, r, begin, end, sums[part, group])


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
    y = np.empty((len(x), len(weight), *out), dtype)
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
    gx = np.zeros((len(g), groups * weight.shape[1], *size), dtype)
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
    offsets = np.pad(offsets, (0, -places % PLACES))
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
