"""Elementwise functions that NumPy has not, or has only in several passes over memory."""

import math
from typing import Any

import numpy as np
from numba import prange
from numpy.typing import NDArray

from tinygrad_bn_kernels import kernel
from tinygrad_bn_kernels.cpu.arrays import compiled
from tinygrad_bn_kernels.cpu.jit import njit
from tinygrad_bn_kernels.cpu.threads import use_threads

Array = NDArray[Any]


@njit()
def _relu_vjp_serial(g, y, out):
    zero = g.dtype.type(0)
    for i in range(g.size):
        out[i] = g[i] if y[i] > 0 else zero


@njit(parallel=True)
def _relu_vjp_parallel(g, y, out):
    zero = g.dtype.type(0)
    for i in prange(g.size):
        out[i] = g[i] if y[i] > 0 else zero


@kernel("relu.vjp", "cpu")
def relu_vjp(g: Array, y: Array, x: Array) -> tuple[Array]:
    """g where the output was positive, 0 elsewhere."""
    g, y = compiled(g), compiled(y)
    out = np.empty_like(g)
    (_relu_vjp_parallel if use_threads(g.size) else _relu_vjp_serial)(g.reshape(-1), y.reshape(-1), out.reshape(-1))
    return (out,)


@njit()
def _erf(x: Array, out: Array) -> None:
    for i in range(x.size):
        out[i] = math.erf(x[i])


@kernel("erf", "cpu")
def erf(x: Array) -> Array:
    """The error function."""
    source = compiled(x)
    out = np.empty_like(source)
    _erf(source.reshape(-1), out.reshape(-1))
    return out.astype(np.result_type(x, np.float16), copy=False)
