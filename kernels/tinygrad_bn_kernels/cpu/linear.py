"""The affine map of a layer. BLAS multiplies; what is left is to touch memory and Python as little as possible."""

import numpy as np

from tinygrad_bn_kernels import kernel
from tinygrad_bn_kernels.cpu.arrays import Array
from tinygrad_bn_kernels.cpu.reduce import sum_


@kernel("linear.vjp", "cpu")
def linear_vjp(
    g: Array, y: Array, x: Array, weight: Array, bias: Array, *, needs: list[bool]
) -> tuple[Array | None, Array | None, Array | None]:
    """g (..., out), x (..., in), weight (out, in): those of g W, gᵀ x and Σ g that are needed."""
    by_x, by_weight, by_bias = needs
    gs = g.reshape(-1, g.shape[-1]) if g.size else np.zeros((0, g.shape[-1]), g.dtype)
    gx = gweight = gbias = None
    if by_x:
        gx = np.matmul(g, weight)
    if by_weight:
        gweight = np.matmul(gs.T, x.reshape(len(gs), x.shape[-1]))
    if by_bias:
        total = sum_(gs, axis=0)
        gbias = np.add.reduce(gs, 0, np.float64) if total is NotImplemented else total
    return gx, gweight, gbias
