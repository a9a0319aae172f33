"""Sums of BatchNorm over x (N, C, S), in two launches: over the parts of each channel, then over parts.

A block of threads processes a part of one channel (S > 1, *planes*), or of 32 adjacent channels (S = 1, *rows*): first
its mean, then squares about that mean, in a second read that comes from the cache. So the variance is accurate at any
mean, without float64. Parts are combined in a fixed order, so results do not change from run to run.

The rounding error of a mean is kept in a second number, `low`: x − mean is computed as (x − m) − low.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tinygrad_bn_kernels.cuda.launch import program
from tinygrad_bn_kernels.cuda.shim import cuda, device, load4, uint32
from tinygrad_bn_kernels.cuda.warps import THREADS, WARPS, block_reduce, plus

Scalar = Callable[..., None]

LANES, GROUPS = 32, 8  # shape of a block for rows: adjacent columns, and rows of threads
TILE = LANES * GROUPS

# ---- planes ----------------------------------------------------------------------------------------------
# A thread loops over the elements of a channel in steps of the block. Its sample n and position s are updated without a
# division: a step is `step_n` samples and `step_s` positions. With `wide`, for planes whose size is a multiple of 4,
# `size`, `count` and `part` count groups of four adjacent elements.


def _plane_moments(wide: bool) -> Callable[[Any], Scalar]:
    """For each part and channel: a mean m, its rounding error, and the sum of squares about both, (parts, 3, C)."""

    def build(T: Any) -> Scalar:
        total = block_reduce(plus)

        def plane_moments(x, moments, work, channels, size, count, part, step_n, step_s):
            shared = cuda.shared.array(WARPS, T)
            block = uint32(cuda.blockIdx.x)
            while block < work:
                p = uint32(block // channels)
                c = uint32(block - p * channels)
                first = uint32(p * part)
                last = uint32(min(uint32(first + part), count))
                number = T(uint32(last - first) << uint32(2)) if wide else T(last - first)
                n = uint32(first // size)
                at = uint32((n * channels + c) * size + (first - n * size))
                m, rest, squares = x[uint32(at << uint32(2)) if wide else at], T(0), T(0)
                for again in range(2):
                    start = uint32(first + cuda.threadIdx.x)
                    n = uint32(start // size)
                    s = uint32(start - n * size)
                    rest, squares = T(0), T(0)
                    while start < last:
                        at = uint32((n * channels + c) * size + s)
                        if wide:
                            x0, x1, x2, x3 = load4(x, uint32(at << uint32(2)))
                            d0, d1, d2, d3 = x0 - m, x1 - m, x2 - m, x3 - m
                            rest += (d0 + d1) + (d2 + d3)
                            squares += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)
                        else:
                            d = x[at] - m
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

    return build


def relu_gradient(relu: bool) -> Callable[[Any], Callable[..., Any]]:
    """A device function: the gradient g of an output y; with ReLU, 0 where y is 0."""
    return lambda T: device((lambda g, y: T(0) if y <= T(0) else g) if relu else (lambda g, y: g))


def _plane_sums(wide: bool, relu: bool) -> Callable[[Any], Scalar]:
    """For each part and channel: Σ g, Σ g · (x − m) and Σ (x − m), (parts, 3, C)."""

    def build(T: Any) -> Scalar:
        total, passed = block_reduce(plus), relu_gradient(relu)(T)

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
                    if wide:
                        i = uint32(i << uint32(2))
                        x0, x1, x2, x3 = load4(x, i)
                        g0, g1, g2, g3 = load4(g, i)
                        if relu:
                            y0, y1, y2, y3 = load4(y, i)
                            g0, g1, g2, g3 = passed(g0, y0), passed(g1, y1), passed(g2, y2), passed(g3, y3)
                        d0, d1, d2, d3 = x0 - m, x1 - m, x2 - m, x3 - m
                        s0 += (g0 + g1) + (g2 + g3)
                        s1 += (g0 * d0 + g1 * d1) + (g2 * d2 + g3 * d3)
                        s2 += (d0 + d1) + (d2 + d3)
                    else:
                        d = x[i] - m
                        gi = passed(g[i], y[i]) if relu else g[i]
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
    """The results of `plane_moments`, for x (N, C)."""

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
    """The results of `plane_sums`, for x (N, C)."""

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


for _wide, _word in ((False, "plane"), (True, "plane4")):
    program(
        f"batch_norm.{_word}_moments", "f4* f4* u4 u4 u4 u4 u4 u4 u4", block=THREADS, shared=4 * WARPS, shuffles=24,
        vector=_wide,
    )(_plane_moments(_wide))  # fmt: skip
    for _relu in (False, True):
        program(
            f"batch_norm.{_word}_sums{'_relu' * _relu}", "f4* f4* f4* f4* f4* u4 u4 u4 u4 u4 u4 u4", block=THREADS,
            shared=4 * WARPS, shuffles=24, vector=_wide, registers=64,
        )(_plane_sums(_wide, _relu))  # fmt: skip
for _relu in (False, True):
    program(
        f"batch_norm.row_sums{'_relu' * _relu}", "f4* f4* f4* f4* f4* u4 u4 u4 u4 u4", block=(LANES, GROUPS),
        shared=12 * TILE, registers=64,
    )(_row_sums(_relu))  # fmt: skip

# ---- combining parts -------------------------------------------------------------------------------------


@program("batch_norm.finish", "f4* f4* f4* f4* f4* u4 u4 u4 u4 f4")
def FINISH(T: Any) -> Scalar:
    """Mean and variance of each channel from its parts (Chan et al. 1983); m, low and scale for the output."""

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


@program("batch_norm.gradients", "f4* f4* f4* f4* f4* f4* f4* u4 u4 u4 f4")
def GRADIENTS(T: Any) -> Scalar:
    """Gradients of weight and bias from the sums of parts; low, scale, mean of g and slope for the gradient of x."""

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
