"""Layer, group, instance and RMS normalisation: statistics of each block of adjacent elements.

x is (N · G, P · S): a row is a group of a sample, P planes of S elements, with one weight and bias for each plane. A
block of threads processes a row: its mean, squares about that mean, then the output. Only the first read of the row
comes from memory, the others from a cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tinygrad_bn_kernels import kernel
from tinygrad_bn_kernels.cuda import maps
from tinygrad_bn_kernels.cuda.array import DeviceArray
from tinygrad_bn_kernels.cuda.launch import blocks as grid_of
from tinygrad_bn_kernels.cuda.launch import launch, program, u4
from tinygrad_bn_kernels.cuda.reduce import sum_
from tinygrad_bn_kernels.cuda.shim import cuda, uint32
from tinygrad_bn_kernels.cuda.warps import THREADS, WARPS, block_reduce, plus

Blocks = tuple[int, int, int, int]  # samples N, groups G, planes P, elements S


@program(
    "block_norm", "f4* f4* f4* f4* f4* f4* u4 u4 u4 u4 u4 u4 f4", block=THREADS, shared=4 * WARPS, shuffles=24,
    registers=64,
)  # fmt: skip
def BLOCK_NORM(T: Any) -> Callable[..., None]:
    """Statistics of each row, and the normalised row: one block of threads for each."""
    total = block_reduce(plus)

    def block_norm(x, weight, bias, y, mean, var, rows, groups, planes, size, step_p, step_s, eps):
        # The highest bit of `size` is set if the mean is not subtracted (RMS).
        shared = cuda.shared.array(WARPS, T)
        centered = size < uint32(0x80000000)
        size = uint32(size & uint32(0x7FFFFFFF))
        length = uint32(planes * size)
        number = T(length)
        row = uint32(cuda.blockIdx.x)
        while row < rows:
            start = uint32(row * length)
            m, rest, squares = T(0), T(0), T(0)
            if centered:
                m = x[start]
            for again in range(2):
                rest, squares = T(0), T(0)
                j = uint32(cuda.threadIdx.x)
                while j < length:
                    d = x[uint32(start + j)] - m
                    rest += d
                    squares += d * d
                    j = uint32(j + uint32(THREADS))
                rest = total(rest, shared) / number
                if centered and again == 0:
                    m = m + rest
            squares = total(squares, shared)
            low = rest if centered else T(0)
            variance = squares / number - low * low
            variance = T(0) if variance < T(0) else variance
            a = T(1) / math.sqrt(variance + eps)
            if cuda.threadIdx.x == 0:
                mean[row] = m + low
                var[row] = variance
            j = uint32(cuda.threadIdx.x)
            p = uint32(j // size)
            s = uint32(j - p * size)
            p = uint32(p + uint32(row % groups) * planes)
            while j < length:
                y[uint32(start + j)] = ((x[uint32(start + j)] - m) - low) * a * weight[p] + bias[p]
                j = uint32(j + uint32(THREADS))
                p, s = uint32(p + step_p), uint32(s + step_s)
                if s >= size:
                    p, s = uint32(p + uint32(1)), uint32(s - size)
            row = uint32(row + cuda.gridDim.x)

    return block_norm


@program(
    "block_norm.gradient", "f4* f4* f4* f4* f4* f4* f4* u4 u4 u4 u4 u4 u4 f4", block=THREADS, shared=4 * WARPS,
    shuffles=24, registers=64,
)  # fmt: skip
def GRADIENT(T: Any) -> Callable[..., None]:
    """The gradient with respect to x, and x̂ for those of weight and bias."""
    total = block_reduce(plus)

    def gradient(g, x, weight, mean, var, gx, xhat, rows, groups, planes, size, step_p, step_s, eps):
        shared = cuda.shared.array(WARPS, T)
        centered = size < uint32(0x80000000)
        size = uint32(size & uint32(0x7FFFFFFF))
        length = uint32(planes * size)
        number = T(length)
        row = uint32(cuda.blockIdx.x)
        while row < rows:
            start = uint32(row * length)
            m, a = mean[row], T(1) / math.sqrt(var[row] + eps)
            first = uint32(cuda.threadIdx.x)
            p0 = uint32(first // size)
            s0 = uint32(first - p0 * size)
            p0 = uint32(p0 + uint32(row % groups) * planes)
            s1, s2, s3 = T(0), T(0), T(0)
            j, p, s = first, p0, s0
            while j < length:
                gw, d = g[uint32(start + j)] * weight[p], x[uint32(start + j)] - m
                s1 += gw
                s2 += gw * d
                s3 += d
                j = uint32(j + uint32(THREADS))
                p, s = uint32(p + step_p), uint32(s + step_s)
                if s >= size:
                    p, s = uint32(p + uint32(1)), uint32(s - size)
            s1, s2, s3 = total(s1, shared), total(s2, shared), total(s3, shared)
            low = s3 / number if centered else T(0)
            slope = a * (s2 - low * s1) / number
            shift = s1 / number if centered else T(0)
            j, p, s = first, p0, s0
            while j < length:
                h = ((x[uint32(start + j)] - m) - low) * a
                xhat[uint32(start + j)] = h
                gx[uint32(start + j)] = a * (g[uint32(start + j)] * weight[p] - shift - h * slope)
                j = uint32(j + uint32(THREADS))
                p, s = uint32(p + step_p), uint32(s + step_s)
                if s >= size:
                    p, s = uint32(p + uint32(1)), uint32(s - size)
            row = uint32(row + cuda.gridDim.x)

    return gradient


def _numbers(sizes: Blocks, centered: bool) -> Any:
    n, groups, planes, size = sizes
    return u4(n * groups, groups, planes, size if centered else size | 0x80000000, THREADS // size, THREADS % size)


def _check_blocks(x: DeviceArray, weight: DeviceArray | None, bias: DeviceArray | None, sizes: Blocks) -> None:
    given = [v for v in (weight, bias) if v is not None]
    maps.check(x, *given)
    if x.size != math.prod(sizes) or any(v.size != sizes[1] * sizes[2] for v in given):
        shapes = [v.shape for v in given]
        raise ValueError(f"x {x.shape} with vectors of shapes {shapes} does not have blocks (N, G, P, S) of {sizes}")


@kernel("block_norm", "cuda")
def block_norm(
    x: DeviceArray, weight: DeviceArray | None, bias: DeviceArray | None, *, blocks: Blocks, eps: float,
    centered: bool,
) -> Any:  # fmt: skip
    """The output, in the shape of x, and mean and variance (N · G,) of each block; weight and bias may be None."""
    _check_blocks(x, weight, bias, blocks)
    rows = blocks[0] * blocks[1]
    y, mean, var = DeviceArray(x.shape, x.dtype), DeviceArray((rows,), x.dtype), DeviceArray((rows,), x.dtype)
    if x.size:
        vectors = [maps.vector_or(n, v, blocks[1] * blocks[2], x.dtype) for n, v in ((1, weight), (0, bias))]
        numbers = *_numbers(blocks, centered), x.number(eps)
        launch(BLOCK_NORM, grid_of(rows, 1), x, *vectors, y, mean, var, *numbers)
    return y, mean, var


@kernel("block_norm.vjp", "cuda")
def block_norm_vjp(
    g: DeviceArray, y: DeviceArray, x: DeviceArray, weight: DeviceArray | None, bias: DeviceArray | None, *,
    needs: list[bool], blocks: Blocks, eps: float, centered: bool, mean: DeviceArray, var: DeviceArray,
) -> Any:  # fmt: skip
    """Gradients with respect to x, weight and bias, from the saved statistics; None where `needs` is false."""
    if not x.size:
        return NotImplemented
    gx, xhat = DeviceArray(x.shape, x.dtype), DeviceArray(x.shape, x.dtype)
    shape, axes = (blocks[0], blocks[1] * blocks[2], blocks[3]), (0, 2)
    arrays = g, x, maps.vector_or(1, weight, shape[1], x.dtype), mean, var, gx, xhat
    launch(GRADIENT, grid_of(len(mean), 1), *arrays, *_numbers(blocks, centered), x.number(eps))
    gweight = gbias = None
    if weight is not None and needs[1]:
        gweight = sum_(maps.mul(g, xhat).reshape(shape), axis=axes).reshape(weight.shape)
    if bias is not None and needs[2]:
        gbias = sum_(g.reshape(shape), axis=axes).reshape(bias.shape)
    return gx, gweight, gbias
