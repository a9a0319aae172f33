"""BatchNorm over (N, C, S): statistics, output and gradients, in three launches each way.

1. Sums: a block takes a part of a channel (S > 1, *planes*), or of 32 channels side by side (S = 1, *rows*). It takes
   the part's mean first and then squares about that mean, from a second reading that comes from the cache. So the
   variance is exact at any mean without a float64.
2. Finish: the parts of each channel are put together, in one order: results do not change from run to run.
3. Apply: an elementwise pass.

What is rounded off a mean is kept in a second number, `low`: x − mean is (x − m) − low.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tinygrad_bn_kernels import kernel
from tinygrad_bn_kernels.cuda import maps
from tinygrad_bn_kernels.cuda.array import DeviceArray
from tinygrad_bn_kernels.cuda.launch import PROGRAMS, blocks, driver, launch, program, u4
from tinygrad_bn_kernels.cuda.shim import cuda, uint32
from tinygrad_bn_kernels.cuda.strides import row_block
from tinygrad_bn_kernels.cuda.warps import THREADS, WARPS, over_block, plus

Scalar = Callable[..., None]

LANES, GROUPS = 32, 8  # of a block for rows: columns side by side, and rows of threads
TILE = LANES * GROUPS

# Elements of a part: small enough for the second reading to come from the cache, large enough for a block.
PLANE_PART = 8192
ROW_PART = 128

# ---- planes ----------------------------------------------------------------------------------------------
# A thread walks the elements of a channel in steps of the block. Where it is, sample n and place s, is kept up without
# a division: a step is `step_n` samples and `step_s` places.


@program("batch_norm.plane_moments", "f4* f4* u4 u4 u4 u4 u4 u4 u4", block=THREADS, shared=4 * WARPS, shuffles=24)
def PLANE_MOMENTS(T: Any) -> Scalar:
    """Of each part and channel: a mean m, what is left of it, and the sum of squares about both: (parts, 3, C)."""
    total = over_block(plus)

    def plane_moments(x, moments, work, channels, size, count, part, step_n, step_s):
        shared = cuda.shared.array(WARPS, T)
        block = uint32(cuda.blockIdx.x)
        while block < work:
            p = uint32(block // channels)
            c = uint32(block - p * channels)
            first = uint32(p * part)
            last = uint32(min(uint32(first + part), count))
            number = T(last - first)
            n = uint32(first // size)
            shift = x[uint32((n * channels + c) * size + (first - n * size))]
            m, rest, squares = shift, T(0), T(0)
            for again in range(2):
                start = uint32(first + cuda.threadIdx.x)
                n = uint32(start // size)
                s = uint32(start - n * size)
                rest, squares = T(0), T(0)
                while start < last:
                    d = x[uint32((n * channels + c) * size + s)] - m
                    rest += d
                    squares += d * d
                    start = uint32(start + uint32(THREADS))
                    n, s = uint32(n + step_n), uint32(s + step_s)
                    if s >= size:
                        n, s = uint32(n + uint32(1)), uint32(s - size)
                rest = total(rest, shared) / number
                if again == 0:
                    m = m + rest
            squares = total(squares, shared)
            if cuda.threadIdx.x == 0:
                at = uint32(p * uint32(3) * channels + c)
                moments[at] = m
                moments[uint32(at + channels)] = rest
                moments[uint32(at + channels + channels)] = squares - number * rest * rest
            block = uint32(block + cuda.gridDim.x)

    return plane_moments


def _plane_sums(relu: bool) -> Callable[[Any], Scalar]:
    def build(T: Any) -> Scalar:
        total = over_block(plus)

        def plane_sums(g, y, x, mean, sums, work, channels, size, count, part, step_n, step_s):
            shared = cuda.shared.array(WARPS, T)
            block = uint32(cuda.blockIdx.x)
            while block < work:
                p = uint32(block // channels)
                c = uint32(block - p * channels)
                last = uint32(min(uint32(p * part + part), count))
                start = uint32(p * part + cuda.threadIdx.x)
                n = uint32(start // size)
                s = uint32(start - n * size)
                m = mean[c]
                s0, s1, s2 = T(0), T(0), T(0)
                while start < last:
                    i = uint32((n * channels + c) * size + s)
                    d = x[i] - m
                    gi = g[i]
                    if relu:
                        gi = gi if y[i] > T(0) else T(0)
                    s0 += gi
                    s1 += gi * d
                    s2 += d
                    start = uint32(start + uint32(THREADS))
                    n, s = uint32(n + step_n), uint32(s + step_s)
                    if s >= size:
                        n, s = uint32(n + uint32(1)), uint32(s - size)
                s0, s1, s2 = total(s0, shared), total(s1, shared), total(s2, shared)
                if cuda.threadIdx.x == 0:
                    at = uint32(p * uint32(3) * channels + c)
                    sums[at] = s0
                    sums[uint32(at + channels)] = s1
                    sums[uint32(at + channels + channels)] = s2
                block = uint32(block + cuda.gridDim.x)

        return plane_sums

    return build


# ---- rows ------------------------------------------------------------------------------------------------


@program("batch_norm.row_moments", "f4* f4* u4 u4 u4 u4 u4", block=(LANES, GROUPS), shared=8 * TILE)
def ROW_MOMENTS(T: Any) -> Scalar:
    """What `plane_moments` gives, for x (N, C)."""

    def row_moments(x, moments, work, channels, rows, part, tiles):
        first_sums, second_sums = cuda.shared.array(TILE, T), cuda.shared.array(TILE, T)
        lane, group = uint32(cuda.threadIdx.x), uint32(cuda.threadIdx.y)
        place = uint32(group * uint32(LANES) + lane)
        block = uint32(cuda.blockIdx.x)
        while block < work:
            p = uint32(block // tiles)
            c = uint32((block - p * tiles) * uint32(LANES) + lane)
            first = uint32(p * part)
            last = uint32(min(uint32(first + part), rows))
            number = T(last - first)
            m, rest, squares = T(0), T(0), T(0)
            if c < channels:
                m = x[uint32(first * channels + c)]
            for again in range(2):
                rest, squares = T(0), T(0)
                row = uint32(first + group)
                if c < channels:
                    while row < last:
                        d = x[uint32(row * channels + c)] - m
                        rest += d
                        squares += d * d
                        row = uint32(row + uint32(GROUPS))
                first_sums[place], second_sums[place] = rest, squares
                cuda.syncthreads()
                rest, squares = T(0), T(0)
                for k in range(GROUPS):
                    rest += first_sums[uint32(uint32(k) * uint32(LANES) + lane)]
                    squares += second_sums[uint32(uint32(k) * uint32(LANES) + lane)]
                rest = rest / number
                if again == 0:
                    m = m + rest
                cuda.syncthreads()
            if group == 0 and c < channels:
                at = uint32(p * uint32(3) * channels + c)
                moments[at] = m
                moments[uint32(at + channels)] = rest
                moments[uint32(at + channels + channels)] = squares - number * rest * rest
            block = uint32(block + cuda.gridDim.x)

    return row_moments


def _row_sums(relu: bool) -> Callable[[Any], Scalar]:
    def build(T: Any) -> Scalar:
        def row_sums(g, y, x, mean, sums, work, channels, rows, part, tiles):
            shared0, shared1 = cuda.shared.array(TILE, T), cuda.shared.array(TILE, T)
            shared2 = cuda.shared.array(TILE, T)
            lane, group = uint32(cuda.threadIdx.x), uint32(cuda.threadIdx.y)
            place = uint32(group * uint32(LANES) + lane)
            block = uint32(cuda.blockIdx.x)
            while block < work:
                p = uint32(block // tiles)
                c = uint32((block - p * tiles) * uint32(LANES) + lane)
                last = uint32(min(uint32(p * part + part), rows))
                row = uint32(p * part + group)
                s0, s1, s2 = T(0), T(0), T(0)
                if c < channels:
                    m = mean[c]
                    while row < last:
                        i = uint32(row * channels + c)
                        d = x[i] - m
                        gi = g[i]
                        if relu:
                            gi = gi if y[i] > T(0) else T(0)
                        s0 += gi
                        s1 += gi * d
                        s2 += d
                        row = uint32(row + uint32(GROUPS))
                shared0[place], shared1[place], shared2[place] = s0, s1, s2
                cuda.syncthreads()
                if group == 0 and c < channels:
                    for k in range(1, GROUPS):
                        other = uint32(uint32(k) * uint32(LANES) + lane)
                        s0, s1, s2 = s0 + shared0[other], s1 + shared1[other], s2 + shared2[other]
                    at = uint32(p * uint32(3) * channels + c)
                    sums[at] = s0
                    sums[uint32(at + channels)] = s1
                    sums[uint32(at + channels + channels)] = s2
                cuda.syncthreads()
                block = uint32(block + cuda.gridDim.x)

        return row_sums

    return build


for _relu in (False, True):
    _end = "_relu" * _relu
    program(
        f"batch_norm.plane_sums{_end}", "f4* f4* f4* f4* f4* u4 u4 u4 u4 u4 u4 u4", block=THREADS, shared=4 * WARPS,
        shuffles=24,
    )(_plane_sums(_relu))  # fmt: skip
    program(
        f"batch_norm.row_sums{_end}",
        "f4* f4* f4* f4* f4* u4 u4 u4 u4 u4",
        block=(LANES, GROUPS),
        shared=12 * TILE,
        registers=64,
    )(_row_sums(_relu))

# ---- putting the parts together --------------------------------------------------------------------------


@program("batch_norm.finish", "f4* f4* f4* f4* f4* u4 u4 u4 u4 f4")
def FINISH(T: Any) -> Scalar:
    """Mean and variance of each channel from its parts (Chan et al. 1983), and m, low and scale for its output."""

    def finish(moments, weight, mean, var, constants, channels, parts, count, part, eps):
        c = uint32(cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x)
        if c < channels:
            m = moments[c]
            off = T(0)
            for p in range(parts):
                at = uint32(uint32(p) * uint32(3) * channels + c)
                number = T(uint32(min(part, uint32(count - uint32(p) * part))))
                off += number * ((moments[at] - m) + moments[uint32(at + channels)])
            off = off / T(count)
            squares = T(0)
            for p in range(parts):
                at = uint32(uint32(p) * uint32(3) * channels + c)
                number = T(uint32(min(part, uint32(count - uint32(p) * part))))
                d = (moments[at] - m) + moments[uint32(at + channels)] - off
                squares += moments[uint32(at + channels + channels)] + number * d * d
            rounded = m + off
            variance = squares / T(count)
            variance = T(0) if variance < T(0) else variance
            mean[c], var[c] = rounded, variance
            constants[c] = rounded
            constants[uint32(c + channels)] = (m - rounded) + off
            constants[uint32(c + channels + channels)] = weight[c] / math.sqrt(variance + eps)

    return finish


@program("batch_norm.given", "f4* f4* f4* f4* u4 f4")
def GIVEN(T: Any) -> Scalar:
    """The same constants from a mean and variance that are given."""

    def given(mean, var, weight, constants, channels, eps):
        c = uint32(cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x)
        if c < channels:
            constants[c] = mean[c]
            constants[uint32(c + channels)] = T(0)
            constants[uint32(c + channels + channels)] = weight[c] / math.sqrt(var[c] + eps)

    return given


@program("batch_norm.gradients", "f4* f4* f4* f4* f4* f4* f4* u4 u4 u4 f4")
def GRADIENTS(T: Any) -> Scalar:
    """Those of weight and bias from the parts' sums; and low, scale, mean of g and slope for the gradient of x."""

    def gradients(sums, mean, var, weight, gweight, gbias, constants, channels, parts, count, eps):
        c = uint32(cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x)
        if c < channels:
            s0, s1, s2 = T(0), T(0), T(0)
            for p in range(parts):
                at = uint32(uint32(p) * uint32(3) * channels + c)
                s0 += sums[at]
                s1 += sums[uint32(at + channels)]
                s2 += sums[uint32(at + channels + channels)]
            number, ivar = T(count), T(1) / math.sqrt(var[c] + eps)
            low = s2 / number
            by_weight = ivar * (s1 - low * s0)
            gbias[c], gweight[c] = s0, by_weight
            constants[c] = low
            constants[uint32(c + channels)] = weight[c] * ivar
            constants[uint32(c + uint32(2) * channels)] = s0 / number
            constants[uint32(c + uint32(3) * channels)] = ivar * by_weight / number

    return gradients


# ---- applying --------------------------------------------------------------------------------------------
# Rows of the last axis: for planes a row has one channel, and for rows each column is one.


def _normalize(columns: bool, relu: bool) -> Callable[[Any], Scalar]:
    def build(T: Any) -> Scalar:
        def planes(x, constants, bias, y, rows, channels, size):
            row = uint32(cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y)
            while row < rows:
                c = uint32(row % channels)
                m, low = constants[c], constants[uint32(c + channels)]
                a, b = constants[uint32(c + channels + channels)], bias[c]
                s = uint32(cuda.threadIdx.x)
                while s < size:
                    i = uint32(row * size + s)
                    v = ((x[i] - m) - low) * a + b
                    if relu:
                        v = T(0) if v <= T(0) else v
                    y[i] = v
                    s = uint32(s + cuda.blockDim.x)
                row = uint32(row + cuda.gridDim.x * cuda.blockDim.y)

        def vectors(x, constants, bias, y, rows, channels, size):
            c = uint32(cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x)
            if c < channels:
                m, low = constants[c], constants[uint32(c + channels)]
                a, b = constants[uint32(c + channels + channels)], bias[c]
                row = uint32(cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y)
                while row < rows:
                    i = uint32(row * channels + c)
                    v = ((x[i] - m) - low) * a + b
                    if relu:
                        v = T(0) if v <= T(0) else v
                    y[i] = v
                    row = uint32(row + cuda.gridDim.x * cuda.blockDim.y)

        return vectors if columns else planes

    return build


def _gradient(columns: bool, relu: bool) -> Callable[[Any], Scalar]:
    def build(T: Any) -> Scalar:
        def planes(g, y, x, mean, constants, gx, rows, channels, size):
            row = uint32(cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y)
            while row < rows:
                c = uint32(row % channels)
                m, low, a = mean[c], constants[c], constants[uint32(c + channels)]
                shift = constants[uint32(c + uint32(2) * channels)]
                slope = constants[uint32(c + uint32(3) * channels)]
                s = uint32(cuda.threadIdx.x)
                while s < size:
                    i = uint32(row * size + s)
                    gi = g[i]
                    if relu:
                        gi = gi if y[i] > T(0) else T(0)
                    gx[i] = a * (gi - shift - ((x[i] - m) - low) * slope)
                    s = uint32(s + cuda.blockDim.x)
                row = uint32(row + cuda.gridDim.x * cuda.blockDim.y)

        def vectors(g, y, x, mean, constants, gx, rows, channels, size):
            c = uint32(cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x)
            if c < channels:
                m, low, a = mean[c], constants[c], constants[uint32(c + channels)]
                shift = constants[uint32(c + uint32(2) * channels)]
                slope = constants[uint32(c + uint32(3) * channels)]
                row = uint32(cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y)
                while row < rows:
                    i = uint32(row * channels + c)
                    gi = g[i]
                    if relu:
                        gi = gi if y[i] > T(0) else T(0)
                    gx[i] = a * (gi - shift - ((x[i] - m) - low) * slope)
                    row = uint32(row + cuda.gridDim.x * cuda.blockDim.y)

        return vectors if columns else planes

    return build


for _columns, _word in ((False, "planes"), (True, "rows")):
    for _relu in (False, True):
        _end = f"{_word}{'_relu' * _relu}"
        program(f"batch_norm.normalize_{_end}", "f4* f4* f4* f4* u4 u4 u4", block=(LANES, GROUPS))(
            _normalize(_columns, _relu)
        )
        program(f"batch_norm.gradient_{_end}", "f4* f4* f4* f4* f4* f4* u4 u4 u4", block=(LANES, GROUPS))(
            _gradient(_columns, _relu)
        )


@program("batch_norm.running", "f4* f4* f4* f4* f4* f4* u4 f4 f4", block=THREADS, shared=4 * WARPS, shuffles=8)
def RUNNING(T: Any) -> Scalar:
    """New running statistics; the old ones, if any new one is not finite."""
    total = over_block(plus, again=False)

    def running(old_mean, old_var, mean, var, new_mean, new_var, channels, momentum, unbias):
        shared = cuda.shared.array(WARPS, T)
        thread = uint32(cuda.threadIdx.x)
        wrong = T(0)
        c = thread
        while c < channels:
            m = (T(1) - momentum) * old_mean[c] + momentum * mean[c]
            v = (T(1) - momentum) * old_var[c] + momentum * (var[c] * unbias)
            if not (m - m == T(0) and v - v == T(0)):
                wrong = T(1)
            c = uint32(c + uint32(THREADS))
        good = total(wrong, shared) == T(0)
        c = thread
        while c < channels:
            m = (T(1) - momentum) * old_mean[c] + momentum * mean[c]
            v = (T(1) - momentum) * old_var[c] + momentum * (var[c] * unbias)
            new_mean[c] = m if good else old_mean[c]
            new_var[c] = v if good else old_var[c]
            c = uint32(c + uint32(THREADS))

    return running


# ---- running them ----------------------------------------------------------------------------------------


def _cut(length: int, least: int, beside: int) -> tuple[int, int]:
    """Into how many parts `length` is cut, with `beside` others at the same time, and how long each is."""
    wanted = max(-(-length // (8 * least)), min(-(-length // least), 4 * driver().processors // max(beside, 1)), 1)
    part = -(-length // wanted)
    return -(-length // part), part


class _Sizes:
    """The numbers that the programs need of x (N, C, ...)."""

    def __init__(self, x: DeviceArray) -> None:
        self.channels = x.shape[1]
        self.count = x.size // max(self.channels, 1)  # elements of a channel
        self.size = self.count // max(x.shape[0], 1)
        self.rows = self.size == 1
        tiles = -(-self.channels // LANES)
        if self.rows:
            self.parts, self.part = _cut(self.count, ROW_PART, tiles)
            self.work = self.parts * tiles
            self.numbers = u4(self.work, self.channels, self.count, self.part, tiles)
        else:
            self.parts, self.part = _cut(self.count, PLANE_PART // 8, self.channels)
            self.work = self.parts * self.channels
            steps = THREADS // self.size, THREADS % self.size
            self.numbers = u4(self.work, self.channels, self.size, self.count, self.part, *steps)

    def apply(self, name: str, relu: bool, *args: Any) -> None:
        """Launch an elementwise pass, of rows of a channel's elements, or of all channels."""
        which = PROGRAMS[f"{name}_{'rows' if self.rows else 'planes'}{'_relu' * relu}"]
        if self.rows:
            block = row_block(self.channels)
            grid: tuple[int, ...] = blocks(self.count, 4 * block[1]), -(-self.channels // block[0])
            rows = self.count
        else:
            block, rows = row_block(self.size), self.count // self.size * self.channels
            grid = (blocks(rows, block[1]),)
        launch(which, grid, *args, *u4(rows, self.channels, self.size), block=block)


def _expect_channels(x: DeviceArray, *vectors: DeviceArray) -> None:
    """Raise ValueError unless each vector is (C,): the programs would read beyond it."""
    maps.check(x, *vectors)
    for v in vectors:
        if v.shape != x.shape[1:2]:
            raise ValueError(f"vectors of shape {v.shape} do not fit the channels of x {x.shape}")


def _vectors(x: DeviceArray, *vectors: DeviceArray) -> list[DeviceArray]:
    return [v.astype(x.dtype, copy=False) for v in vectors]


def _forward(x: DeviceArray, weight: DeviceArray, bias: DeviceArray, eps: float, relu: bool) -> Any:
    _expect_channels(x, weight, bias)
    y, mean, var = DeviceArray(x.shape, x.dtype), *(DeviceArray(x.shape[1:2], x.dtype) for _ in range(2))
    if not x.size:
        return y, maps.fill(mean, np.nan), maps.fill(var, np.nan)
    weight, bias = _vectors(x, weight, bias)
    to = _Sizes(x)
    moments, constants = DeviceArray((to.parts, 3, to.channels), x.dtype), DeviceArray((3, to.channels), x.dtype)
    launch(ROW_MOMENTS if to.rows else PLANE_MOMENTS, blocks(to.work, 1), x, moments, *to.numbers)
    numbers = *u4(to.channels, to.parts, to.count, to.part), x.number(eps)
    launch(FINISH, -(-to.channels // 256), moments, weight, mean, var, constants, *numbers)
    to.apply("batch_norm.normalize", relu, x, constants, bias, y)
    return y, mean, var


def _backward(
    g: DeviceArray,
    y: DeviceArray,
    x: DeviceArray,
    weight: DeviceArray,
    needs: list[bool],
    eps: float,
    mean: DeviceArray,
    var: DeviceArray,
    relu: bool,
) -> Any:
    gweight, gbias = (DeviceArray(x.shape[1:2], x.dtype) for _ in range(2))
    if not x.size:
        return DeviceArray(x.shape, x.dtype), maps.fill(gweight, 0), maps.fill(gbias, 0)
    (weight,) = _vectors(x, weight)
    to = _Sizes(x)
    sums, constants = DeviceArray((to.parts, 3, to.channels), x.dtype), DeviceArray((4, to.channels), x.dtype)
    which = PROGRAMS[f"batch_norm.{'row' if to.rows else 'plane'}_sums{'_relu' * relu}"]
    launch(which, blocks(to.work, 1), g, y, x, mean, sums, *to.numbers)
    numbers = *u4(to.channels, to.parts, to.count), x.number(eps)
    launch(GRADIENTS, -(-to.channels // 256), sums, mean, var, weight, gweight, gbias, constants, *numbers)
    gx = None
    if needs[0]:
        gx = DeviceArray(x.shape, x.dtype)
        to.apply("batch_norm.gradient", relu, g, y, x, mean, constants, gx)
    return gx, gweight, gbias


@kernel("batch_norm_fused", "cuda")
def batch_norm_fused(x: DeviceArray, weight: DeviceArray, bias: DeviceArray, *, eps: float) -> Any:
    """x (N, C, ...), weight and bias (C,): the output, and mean and biased variance (C,) in x's dtype."""
    return _forward(x, weight, bias, eps, False)


@kernel("batch_norm_relu_fused", "cuda")
def batch_norm_relu_fused(x: DeviceArray, weight: DeviceArray, bias: DeviceArray, *, eps: float) -> Any:
    """`batch_norm_fused`, and the ReLU of its output."""
    return _forward(x, weight, bias, eps, True)


@kernel("batch_norm_inference", "cuda")
def batch_norm_inference(
    x: DeviceArray, mean: DeviceArray, var: DeviceArray, weight: DeviceArray, bias: DeviceArray, *, eps: float
) -> DeviceArray:
    """x (N, C, ...) normalised by a mean and variance that are given, (C,) like weight and bias."""
    _expect_channels(x, mean, var, weight, bias)
    y = DeviceArray(x.shape, x.dtype)
    if x.size:
        mean, var, weight, bias = _vectors(x, mean, var, weight, bias)
        to, constants = _Sizes(x), DeviceArray((3, x.shape[1]), x.dtype)
        numbers = *u4(to.channels), x.number(eps)
        launch(GIVEN, -(-to.channels // 256), mean, var, weight, constants, *numbers)
        to.apply("batch_norm.normalize", False, x, constants, bias, y)
    return y


@kernel("batch_norm_fused.vjp", "cuda")
def batch_norm_fused_vjp(
    g: DeviceArray, y: DeviceArray, x: DeviceArray, weight: DeviceArray, bias: DeviceArray, *, needs: list[bool],
    eps: float, mean: DeviceArray, var: DeviceArray,
) -> Any:  # fmt: skip
    """Gradients with respect to x, weight and bias, from the statistics that the forward pass saved."""
    return _backward(g, y, x, weight, needs, eps, mean, var, False)


@kernel("batch_norm_relu_fused.vjp", "cuda")
def batch_norm_relu_fused_vjp(
    g: DeviceArray, y: DeviceArray, x: DeviceArray, weight: DeviceArray, bias: DeviceArray, *, needs: list[bool],
    eps: float, mean: DeviceArray, var: DeviceArray,
) -> Any:  # fmt: skip
    """The same behind a ReLU, which passed the gradient where the output is positive."""
    return _backward(g, y, x, weight, needs, eps, mean, var, True)


@kernel("nn.running_statistics", "cuda")
def running_statistics(
    running_mean: DeviceArray, running_var: DeviceArray, mean: DeviceArray, var: DeviceArray, *, momentum: float,
    unbias: float,
) -> tuple[DeviceArray, DeviceArray, bool]:  # fmt: skip
    """(1 − momentum) · running + momentum · batch of mean and unbias · variance, (C,); the old ones, if not finite.

    Whether they are finite stays on the device, as to ask would be to wait: the answer here is always True.
    """
    if not running_mean.shape == running_var.shape == mean.shape == var.shape:
        raise ValueError(f"running statistics {running_mean.shape}, {running_var.shape} are not those of {mean.shape}")
    dtype = running_mean.dtype
    new_mean, new_var = (DeviceArray(running_mean.shape, dtype) for _ in range(2))
    arrays = [a.astype(dtype, copy=False) for a in (running_mean, running_var, mean, var)]
    numbers = *u4(mean.size), running_mean.number(momentum), running_mean.number(unbias)
    launch(RUNNING, 1, *arrays, new_mean, new_var, *numbers)
    return new_mean, new_var, True
