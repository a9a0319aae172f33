"""Matrix products and the affine map of a layer: BLAS for small and thin matrices, `products` for large ones."""

import math
from typing import Any

import numpy as np

from tinygrad_bn_kernels import kernel, load
from tinygrad_bn_kernels.cpu.arrays import Array
from tinygrad_bn_kernels.cpu.reduce import sum_

# Up to this many multiplications OpenBLAS uses only the calling thread, and is as fast as `products`.
SMALL = 1 << 18
# With fewer rows of the left or columns of the right matrix, BLAS is faster at any size: it copies neither.
THIN = 8


def _product(a: Array, b: Array, bias: Array | None = None) -> Array:
    """a (M, K) times b (K, N), plus bias (N,). Raises ValueError for other shapes."""
    if a.shape[1] != len(b):
        raise ValueError(f"matrices of {a.shape} and {b.shape} cannot be multiplied")
    large = a.size * b.shape[1] > SMALL and min(len(a), b.shape[1]) >= THIN
    if large and a.dtype == b.dtype and a.dtype.char in "fd":
        products = load("tinygrad_bn_kernels.cpu.products")  # imports Numba
        return products.product(a, b, np.zeros(b.shape[1], a.dtype) if bias is None else bias)
    with np.errstate(invalid="ignore"):  # BLAS raises this flag on some processors only
        out = np.matmul(a, b)
    return out if bias is None else np.add(out, bias, out=out)


@kernel("matmul", "cpu")
def matmul(a: Array, b: Array) -> Any:
    """a (M, K) times b (K, N) of one dtype; NotImplemented for others."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != len(b) or a.dtype != b.dtype or a.dtype.char not in "fd":
        return NotImplemented
    return _product(a, b)


@kernel("linear", "cpu")
def linear(x: Array, weight: Array, bias: Array | None) -> Any:
    """x (..., in), weight (out, in), bias (out,) or None: x weightᵀ + bias (..., out)."""
    dtype = x.dtype
    if dtype != weight.dtype or dtype.char not in "fd" or not x.size or x.ndim < 2:
        return NotImplemented
    if weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        return NotImplemented
    if bias is not None and (bias.dtype != dtype or bias.shape != weight.shape[:1]):
        return NotImplemented
    if x.ndim == 2:
        return _product(x, weight.T, bias)
    return _product(x.reshape(-1, x.shape[-1]), weight.T, bias).reshape(*x.shape[:-1], len(weight))


@kernel("linear.vjp", "cpu")
def linear_vjp(
    g: Array, y: Array, x: Array, weight: Array, bias: Array | None, *, needs: list[bool]
) -> tuple[Array | None, Array | None, Array | None]:
    """g (..., out), x (..., in), weight (out, in): the gradients g weight, gᵀ x and Σ g, or None if not needed."""
    needs_x, needs_weight, needs_bias = needs
    flat = x.ndim == 2
    gs = g if flat else g.reshape(math.prod(g.shape[:-1]), g.shape[-1])
    gx = gweight = gbias = None
    if needs_x:
        gx = _product(gs, weight)
        gx = gx if flat else gx.reshape(x.shape)
    if needs_weight:
        gweight = _product(gs.T, x if flat else x.reshape(len(gs), x.shape[-1]))
    if needs_bias:
        total = sum_(gs, axis=0)
        gbias = np.add.reduce(gs, 0, np.float64).astype(g.dtype) if total is NotImplemented else total
    return gx, gweight, gbias
