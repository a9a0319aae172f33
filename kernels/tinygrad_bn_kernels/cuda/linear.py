"""Matrix products by tiles in shared memory, and the affine map of a layer.

A block computes 64 × 64 elements, 16 in each thread, from strips in shared memory of 16 elements of the inner axis.
Either factor may be transposed in memory, so gradients need no transposed copies. Large products use cuBLAS if it is
installed: see `blas`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tinygrad_bn_kernels import kernel
from tinygrad_bn_kernels.cuda import maps
from tinygrad_bn_kernels.cuda.array import DeviceArray
from tinygrad_bn_kernels.cuda.blas import multiply
from tinygrad_bn_kernels.cuda.launch import PROGRAMS, launch, program, u4
from tinygrad_bn_kernels.cuda.layout import broadcast_to
from tinygrad_bn_kernels.cuda.reduce import sum_
from tinygrad_bn_kernels.cuda.shim import cuda, device, uint32

GRID_LIMIT = 65535  # most blocks along the second and third axis of a grid
SIDE = 64  # of the tile that a block computes
DEPTH = 16  # of a strip
PITCH = SIDE + 2  # of a strip in shared memory: 16 × 2 neighbours then lie in 32 different banks
STRIP = DEPTH * PITCH


def _loader(T: Any, along_depth: bool) -> Callable[..., Any]:
    """A device function that copies (64, 16) elements of a factor to shared memory.

    Adjacent threads read adjacent elements: along the inner axis, or across it if the factor is transposed in memory.
    """
    zero = T(0)

    @device
    def load(source, start, rows, depth, row, k, strip, thread):
        for part in range(4):
            if along_depth:
                i, j = uint32((thread >> uint32(4)) + uint32(16 * part)), uint32(thread & uint32(15))
            else:
                i, j = uint32(thread & uint32(63)), uint32((thread >> uint32(6)) + uint32(4 * part))
            value = zero
            if row + i < rows and k + j < depth:
                at = (row + i) * depth + k + j if along_depth else (k + j) * rows + row + i
                value = source[uint32(start + at)]
            strip[uint32(j * uint32(PITCH) + i)] = value

    return load


def _product(a_along: bool, b_along: bool, with_bias: bool) -> Callable[[Any], Callable[..., None]]:
    """`a_along`, `b_along`: the inner axis is the last one of a, of b, in memory. `with_bias`: add a row."""

    def build(T: Any) -> Callable[..., None]:
        load_a, load_b = _loader(T, a_along), _loader(T, b_along)

        def product(a, b, bias, out, rows, columns, depth, a_step, b_step):
            strip_a, strip_b = cuda.shared.array(STRIP, T), cuda.shared.array(STRIP, T)
            x, y = uint32(cuda.threadIdx.x), uint32(cuda.threadIdx.y)
            thread = uint32(y * uint32(16) + x)
            row, column = uint32(cuda.blockIdx.y * uint32(SIDE)), uint32(cuda.blockIdx.x * uint32(SIDE))
            batch = uint32(cuda.blockIdx.z)
            a_start, b_start = uint32(batch * a_step), uint32(batch * b_step)
            c00 = c01 = c02 = c03 = c10 = c11 = c12 = c13 = T(0)
            c20 = c21 = c22 = c23 = c30 = c31 = c32 = c33 = T(0)
            k = uint32(0)
            while k < depth:
                load_a(a, a_start, rows, depth, row, k, strip_a, thread)
                load_b(b, b_start, columns, depth, column, k, strip_b, thread)
                cuda.syncthreads()
                for j in range(DEPTH):
                    i = uint32(uint32(j) * uint32(PITCH) + y)
                    a0, a1 = strip_a[i], strip_a[uint32(i + uint32(16))]
                    a2, a3 = strip_a[uint32(i + uint32(32))], strip_a[uint32(i + uint32(48))]
                    i = uint32(uint32(j) * uint32(PITCH) + x)
                    b0, b1 = strip_b[i], strip_b[uint32(i + uint32(16))]
                    b2, b3 = strip_b[uint32(i + uint32(32))], strip_b[uint32(i + uint32(48))]
                    c00, c01, c02, c03 = c00 + a0 * b0, c01 + a0 * b1, c02 + a0 * b2, c03 + a0 * b3
                    c10, c11, c12, c13 = c10 + a1 * b0, c11 + a1 * b1, c12 + a1 * b2, c13 + a1 * b3
                    c20, c21, c22, c23 = c20 + a2 * b0, c21 + a2 * b1, c22 + a2 * b2, c23 + a2 * b3
                    c30, c31, c32, c33 = c30 + a3 * b0, c31 + a3 * b1, c32 + a3 * b2, c33 + a3 * b3
                cuda.syncthreads()
                k = uint32(k + uint32(DEPTH))
            start = uint32(batch * rows * columns)
            for part in range(4):
                j = uint32(column + x + uint32(16 * part))
                if j < columns:
                    top = bias[j] if with_bias else T(0)
                    v0 = c00 if part == 0 else c01 if part == 1 else c02 if part == 2 else c03
                    v1 = c10 if part == 0 else c11 if part == 1 else c12 if part == 2 else c13
                    v2 = c20 if part == 0 else c21 if part == 1 else c22 if part == 2 else c23
                    v3 = c30 if part == 0 else c31 if part == 1 else c32 if part == 2 else c33
                    i = uint32(row + y)
                    if i < rows:
                        out[uint32(start + i * columns + j)] = v0 + top
                    i = uint32(i + uint32(16))
                    if i < rows:
                        out[uint32(start + i * columns + j)] = v1 + top
                    i = uint32(i + uint32(16))
                    if i < rows:
                        out[uint32(start + i * columns + j)] = v2 + top
                    i = uint32(i + uint32(16))
                    if i < rows:
                        out[uint32(start + i * columns + j)] = v3 + top

        return product

    return build


# Letters for a and b: n, as in the formula; t, transposed in memory.
for _name, _a, _b, _bias in (
    ("product.nn", True, False, False),
    ("product.nt", True, True, False),
    ("product.tn", False, False, False),
    ("product.nt.bias", True, True, True),
):
    program(_name, "f4* f4* f4* f4* u4 u4 u4 u4 u4", block=(16, 16), registers=64, shared=8 * STRIP)(
        _product(_a, _b, _bias)
    )


def product(
    a: DeviceArray, b: DeviceArray, rows: int, columns: int, depth: int, how: str = "nn", bias: Any = None
) -> DeviceArray:
    """Products of matrices (rows, depth) and (depth, columns), (count, rows, columns).

    `how` has a letter for a and one for b: n, stored as in the formula, or t, stored transposed. Either may be one
    matrix for all products. A `bias` (columns,) is added; it is supported for "nt".
    """
    count_a, count_b = (x.size // max(size, 1) for x, size in ((a, rows * depth), (b, depth * columns)))
    count = max(count_a, count_b)
    out = DeviceArray((count, rows, columns), a.dtype)
    if not out.size:
        return out
    if not depth:
        return maps.fill(out, 0) if bias is None else broadcast_to(bias, shape=out.shape)
    if multiply(a, b, bias, out, depth, how):
        return out
    steps = rows * depth if count_a > 1 else 0, depth * columns if count_b > 1 else 0
    name = f"product.{how}" + ("" if bias is None else ".bias")
    height, together = (GRID_LIMIT * SIDE, 1) if rows > GRID_LIMIT * SIDE else (rows, GRID_LIMIT)
    if height < rows and how[0] == "t":
        raise ValueError(
            f"a product of {rows:,} rows, transposed in memory, exceeds one launch: at most {GRID_LIMIT * SIDE:,} rows"
        )
    for batch in range(0, count, together):
        for row in range(0, rows, height):
            here, some = min(height, rows - row), min(together, count - batch)
            parts = (batch * steps[0] + row * depth, batch * steps[1], (batch * rows + row) * columns)
            left, right, to = (x.view((x.size - at,), at) for x, at in zip((a, b, out), parts, strict=True))
            grid = -(-columns // SIDE), -(-here // SIDE), some
            numbers = u4(here, columns, depth, *steps)
            launch(PROGRAMS[name], grid, left, right, left if bias is None else bias, to, *numbers)
    return out


def _batched(a: DeviceArray, b: DeviceArray, lead: tuple[int, ...]) -> tuple[DeviceArray, DeviceArray]:
    """Both factors with one matrix, or with one for each product of the batch."""
    enough = 1, math.prod(lead)
    a, b = (x if math.prod(x.shape[:-2]) in enough else broadcast_to(x, shape=(*lead, *x.shape[-2:])) for x in (a, b))
    return a, b


@kernel("matmul", "cuda")
def matmul(a: DeviceArray, b: DeviceArray) -> DeviceArray:
    """(..., n, k) @ (..., k, m), with broadcasting of leading axes; 1-d arrays as in NumPy."""
    a, b = maps.same_dtype(a, b)
    if not a.ndim or not b.ndim or a.shape[-1] != b.shape[max(b.ndim - 2, 0)]:
        raise ValueError(f"a matrix product of shapes {a.shape} and {b.shape} is not defined: inner lengths differ")
    left, right = a.reshape((1, *a.shape)) if a.ndim == 1 else a, b.reshape((*b.shape, 1)) if b.ndim == 1 else b
    lead = np.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    rows, depth, columns = left.shape[-2], left.shape[-1], right.shape[-1]
    shape = (*lead, *((rows,) if a.ndim > 1 else ()), *((columns,) if b.ndim > 1 else ()))
    if not math.prod(shape):
        return DeviceArray(shape, a.dtype)
    if not depth:
        return maps.fill(DeviceArray(shape, a.dtype), 0)
    return product(*_batched(left, right, lead), rows, columns, depth).reshape(shape)


@kernel("matmul.vjp", "cuda")
def matmul_vjp(g: DeviceArray, y: DeviceArray, a: DeviceArray, b: DeviceArray, *, needs: list[bool]) -> Any:
    """g bᵀ and aᵀ g, without transposed copies. NotImplemented for 1-d and empty arrays: the rules handle them."""
    if a.ndim < 2 or b.ndim < 2 or not g.size or not a.size or not b.size:
        return NotImplemented
    (rows, columns), depth, lead = g.shape[-2:], a.shape[-1], g.shape[:-2]
    g, a, b = maps.same_dtype(g, a, b)
    ga = gb = None
    if needs[0]:
        ga = product(*_batched(g, b, lead), rows, depth, columns, "nt").reshape((*lead, rows, depth))
    if needs[1]:
        gb = product(*_batched(a, g, lead), depth, columns, rows, "tn").reshape((*lead, depth, columns))
    return ga, gb


@kernel("linear", "cuda")
def linear(x: DeviceArray, weight: DeviceArray, bias: DeviceArray | None) -> DeviceArray:
    """x (..., in) times weight (out, in) transposed, plus bias (out,) unless it is None."""
    x, weight, *added = maps.same_dtype(x, weight, *(() if bias is None else (bias,)))
    if x.shape[-1:] != weight.shape[1:] or any(b.shape != weight.shape[:1] for b in added):
        shape = bias if bias is None else bias.shape
        raise ValueError(f"x (..., in) {x.shape}, weight (out, in) {weight.shape} and bias (out,) {shape} do not match")
    rows, (columns, depth) = math.prod(x.shape[:-1]), weight.shape
    return product(x, weight, rows, columns, depth, "nt", *added).reshape((*x.shape[:-1], columns))


@kernel("linear.vjp", "cuda")
def linear_vjp(
    g: DeviceArray, y: DeviceArray, x: DeviceArray, weight: DeviceArray, bias: DeviceArray | None, *, needs: list[bool]
) -> Any:
    """g W, gᵀ x and Σ g; None where `needs` is false."""
    rows, (columns, depth) = math.prod(x.shape[:-1]), weight.shape
    if not rows or len({g.dtype, x.dtype, weight.dtype}) > 1:
        return NotImplemented
    gx = product(g, weight, rows, depth, columns).reshape(x.shape) if needs[0] else None
    gweight = product(g, x, columns, depth, rows, "tn").reshape(weight.shape) if needs[1] else None
    gbias = sum_(g.reshape((rows, columns)), axis=0) if needs[2] and bias is not None else None
    return gx, gweight, gbias
