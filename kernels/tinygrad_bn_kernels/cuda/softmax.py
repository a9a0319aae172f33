"""Softmax cross-entropy: one warp for each row of logits, which reads the row twice; no intermediate (M, C) array.

A block also sums the losses and weights of its rows, and a second launch sums over blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tinygrad_bn_kernels import kernel
from tinygrad_bn_kernels.cuda import maps
from tinygrad_bn_kernels.cuda.array import DeviceArray
from tinygrad_bn_kernels.cuda.launch import blocks, launch, program, u4
from tinygrad_bn_kernels.cuda.scalars import SAME
from tinygrad_bn_kernels.cuda.shim import cuda, device, int64, uint32
from tinygrad_bn_kernels.cuda.warps import THREADS, WARPS, block_reduce, plus, warp_reduce

LANES, GROUPS = 32, 8  # a block is 8 warps


@program(
    "cross_entropy", "f4* i8* f4* f4* f4* f4* u4 u4 u4 i8 f4", block=(LANES, GROUPS), shuffles=25, registers=64,
    shared=8 * GROUPS,
)  # fmt: skip
def CROSS_ENTROPY(T: Any) -> Callable[..., None]:
    """Sums of losses and of the targets' weights, (2, blocks); losses of rows if `each`; normalizers of rows.

    The normalizers of a row are its largest logit and the log of its sum of exponentials. A target that is not a class
    gives NaN.
    """
    larger = device(SAME["maximum"](T))
    total, largest = warp_reduce(plus), warp_reduce(larger)
    nan, least = T(math.nan), T(-math.inf)

    def cross_entropy(x, target, weight, loss, sums, normalizer, rows, classes, each, ignored, smoothing):
        shared_losses, shared_masses = cuda.shared.array(GROUPS, T), cuda.shared.array(GROUPS, T)
        losses, masses = T(0), T(0)
        row = uint32(cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y)
        while row < rows:
            t = int64(target[row])
            start = uint32(row * classes)
            top = least
            c = uint32(cuda.threadIdx.x)
            while c < classes:
                top = larger(top, x[uint32(start + c)])
                c = uint32(c + uint32(LANES))
            top = largest(top)
            others, equal, smooth, weights = T(0), T(0), T(0), T(0)
            c = uint32(cuda.threadIdx.x)
            while c < classes:
                d = x[uint32(start + c)] - top
                if d == T(0):
                    equal += T(1)
                else:
                    others += math.exp(d)
                weights += weight[c]
                if smoothing > T(0):
                    smooth += weight[c] * d
                c = uint32(c + uint32(LANES))
            log_sum = math.log1p(total(others) + (total(equal) - T(1)))  # exact where it is near 0
            smooth, weights = total(smooth), total(weights)
            if cuda.threadIdx.x == 0:
                one, own = nan, nan
                if t == ignored:
                    one, own = T(0), T(0)
                elif t >= 0 and t < classes:
                    own = weight[uint32(t)]
                    one = -(T(1) - smoothing) * own * ((x[uint32(start + uint32(t))] - top) - log_sum)
                    if smoothing > T(0):
                        one -= smoothing / T(classes) * (smooth - weights * log_sum)
                losses, masses = losses + one, masses + own
                if each:
                    loss[row] = one
                normalizer[uint32(row + row)] = top
                normalizer[uint32(row + row + uint32(1))] = log_sum
            row = uint32(row + cuda.gridDim.x * cuda.blockDim.y)
        if cuda.threadIdx.x == 0:
            shared_losses[cuda.threadIdx.y], shared_masses[cuda.threadIdx.y] = losses, masses
        cuda.syncthreads()
        if cuda.threadIdx.x == 0 and cuda.threadIdx.y == 0:
            for g in range(1, GROUPS):
                losses, masses = losses + shared_losses[g], masses + shared_masses[g]
            sums[cuda.blockIdx.x], sums[uint32(cuda.gridDim.x + cuda.blockIdx.x)] = losses, masses

    return cross_entropy


@program("cross_entropy.total", "f4* f4* f4* u4 u4", block=THREADS, shuffles=16, shared=4 * WARPS)
def TOTAL(T: Any) -> Callable[..., None]:
    """The sum of losses, divided by the sum of weights if `mean`, and the sum of weights."""
    total, last = block_reduce(plus), block_reduce(plus, reuse=False)

    def add_up(sums, loss, mass, count, mean):
        shared = cuda.shared.array(WARPS, T)
        losses, masses = T(0), T(0)
        i = uint32(cuda.threadIdx.x)
        while i < count:
            losses += sums[i]
            masses += sums[uint32(count + i)]
            i = uint32(i + uint32(THREADS))
        losses, masses = total(losses, shared), last(masses, shared)
        if cuda.threadIdx.x == 0:
            loss[0] = losses / masses if mean else losses
            mass[0] = masses

    return add_up


@program(
    "cross_entropy.vjp", "f4* f4* f4* i8* f4* f4* f4* u4 u4 u4 i8 f4", block=(LANES, GROUPS), shuffles=5, registers=64
)
def CROSS_ENTROPY_VJP(T: Any) -> Callable[..., None]:
    """gᵢ · (softmax(xᵢ)_c · Σ_k q_ik w_k − q_ic w_c) / `whole`; `each` is 0 if g is one number."""
    total = warp_reduce(plus)

    def cross_entropy_vjp(g, whole, x, target, weight, normalizer, gx, rows, classes, each, ignored, smoothing):
        row = uint32(cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y)
        while row < rows:
            t = int64(target[row])
            start = uint32(row * classes)
            weights = T(0)
            c = uint32(cuda.threadIdx.x)
            while c < classes:
                weights += weight[c]
                c = uint32(c + uint32(LANES))
            spread = smoothing / T(classes) * total(weights)
            gi = g[uint32(row * each)] / whole[0]
            inside = t >= 0 and t < classes
            own = T(0)
            if inside:
                own = (T(1) - smoothing) * weight[uint32(t)]
            top, log_sum = normalizer[uint32(row + row)], normalizer[uint32(row + row + uint32(1))]
            c = uint32(cuda.threadIdx.x)
            while c < classes:
                v = T(0)
                if t != ignored:
                    log_p = (x[uint32(start + c)] - top) - log_sum
                    v = spread * math.exp(log_p) - smoothing / T(classes) * weight[c]
                    v += own * (math.expm1(log_p) if c == t else math.exp(log_p))  # p − 1 has no digits near p = 1
                    v = gi * v
                gx[uint32(start + c)] = v
                c = uint32(c + uint32(LANES))
            row = uint32(row + cuda.gridDim.x * cuda.blockDim.y)

    return cross_entropy_vjp


def _prepared(x: DeviceArray, target: DeviceArray, weight: DeviceArray | None) -> tuple[DeviceArray, DeviceArray]:
    """Targets as int64, and weights in the dtype of x; None is all ones."""
    maps.check(x, target, *(() if weight is None else (weight,)))
    shape = x.shape[1:] if weight is None else weight.shape
    if target.dtype.kind not in "iu":
        raise TypeError(f"targets are class indices, of an integer dtype; got {target.dtype}")
    if target.shape != x.shape[:1] or shape != x.shape[1:] or not x.shape[1]:
        raise ValueError(f"logits (M, C) {x.shape} need targets (M,) and weights (C,); got {target.shape} and {shape}")
    return target.astype(np.int64, copy=False), maps.vector_or(1, weight, x.shape[1], x.dtype)


@kernel("softmax_cross_entropy", "cuda")
def softmax_cross_entropy(
    x: DeviceArray, target: DeviceArray, weight: DeviceArray | None, *, smoothing: float, ignore_index: int,
    reduction: str,
) -> tuple[DeviceArray, DeviceArray, DeviceArray]:  # fmt: skip
    """x (M, C) logits, target (M,) classes, weight (C,) or None: the loss, saved values of rows, Σ weights of targets.

    The loss has shape (M,) for the reduction "none", else (). It is NaN where a target is not a class. Saved for the
    gradient are the largest logit of each row, and the log of its sum of exponentials.
    """
    target, weight = _prepared(x, target, weight)
    (rows, classes), each = x.shape, reduction == "none"
    grid = blocks(rows, GROUPS)
    loss, normalizer, sums, whole, total = (
        DeviceArray(shape, x.dtype) for shape in ((rows * each,), (rows, 2), (2, grid), (), ())
    )
    numbers = *u4(rows, classes, each), np.int64(ignore_index), x.number(smoothing)
    launch(CROSS_ENTROPY, grid, x, target, weight, loss, sums, normalizer, *numbers)
    launch(TOTAL, 1, sums, whole, total, *u4(grid, reduction == "mean"))
    return loss if each else whole, normalizer, total


@kernel("softmax_cross_entropy.vjp", "cuda")
def softmax_cross_entropy_vjp(
    g: DeviceArray, y: DeviceArray, x: DeviceArray, target: DeviceArray, weight: DeviceArray | None, *,
    needs: list[bool], smoothing: float, ignore_index: int, reduction: str, normalizer: DeviceArray,
    total: DeviceArray,
) -> Any:  # fmt: skip
    """The gradient with respect to the logits. The composition computes that of the weights."""
    if needs[2]:
        return NotImplemented
    target, weight = _prepared(x, target, weight)
    gx, (rows, classes) = DeviceArray(x.shape, x.dtype), x.shape
    if gx.size:
        whole = total if reduction == "mean" else maps.fill(DeviceArray((), x.dtype), 1)
        numbers = *u4(rows, classes, reduction == "none"), np.int64(ignore_index), x.number(smoothing)
        launch(CROSS_ENTROPY_VJP, blocks(rows, GROUPS), g, whole, x, target, weight, normalizer, gx, *numbers)
    return gx, None, None
