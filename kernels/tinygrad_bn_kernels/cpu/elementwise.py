"""Elementwise functions that NumPy lacks, or computes in several passes over memory."""

import math

import numpy as np

from tinygrad_bn_kernels import kernel
from tinygrad_bn_kernels.cpu.arrays import Array, compiled, expect_one_shape
from tinygrad_bn_kernels.cpu.jit import njit
from tinygrad_bn_kernels.cpu.memory import empty_like
from tinygrad_bn_kernels.cpu.threads import ERF_COST, PHILOX_COST, split


@njit()
def _relu_vjp(g, y, out, start, stop):
    zero = g.dtype.type(0)
    for i in range(start, stop):
        out[i] = g[i] if y[i] > 0 else zero


@kernel("relu.vjp", "cpu")
def relu_vjp(g: Array, y: Array, x: Array, *, needs: list[bool]) -> tuple[Array]:
    """g where the output is positive, 0 elsewhere."""
    expect_one_shape(g, y)
    g, y = compiled(g), compiled(y)
    out = empty_like(g)
    split(_relu_vjp, g.size, g.size, g.reshape(-1), y.reshape(-1), out.reshape(-1))
    return (out,)


@njit()
def _erf(x, out, start, stop):
    for i in range(start, stop):
        out[i] = math.erf(x[i])


@kernel("erf", "cpu")
def erf(x: Array) -> Array:
    """The error function."""
    source = compiled(x)
    out = empty_like(source)
    split(_erf, source.size, ERF_COST * source.size, source.reshape(-1), out.reshape(-1))
    return out.astype(np.result_type(x, np.float16), copy=False)


# ---- dropout ---------------------------------------------------------------------------------------------


@njit()
def _philox(counter, key):
    """Philox4x32-10 (Salmon et al. 2011): four words of 32 random bits for each counter."""
    low = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = counter & low, counter >> np.uint64(32), np.uint64(0), np.uint64(0)
    k0, k1 = key & low, key >> np.uint64(32)
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (p1 >> np.uint64(32)) ^ c1 ^ k0, p1 & low, (p0 >> np.uint64(32)) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return c0, c1, c2, c3


@njit()
def _dropout(x, threshold, scale, key, out, start, stop):
    zero = x.dtype.type(0)
    for block in range(start, stop):
        words = _philox(np.uint64(block), key)
        i = 4 * block
        if i + 4 <= x.size:
            out[i] = x[i] * scale if words[0] >= threshold else zero
            out[i + 1] = x[i + 1] * scale if words[1] >= threshold else zero
            out[i + 2] = x[i + 2] * scale if words[2] >= threshold else zero
            out[i + 3] = x[i + 3] * scale if words[3] >= threshold else zero
        else:
            for j in range(x.size - i):
                out[i + j] = x[i + j] * scale if words[j] >= threshold else zero


@kernel("dropout_by_key", "cpu")
def dropout_by_key(x: Array, *, p: float, key: int) -> Array:
    """x / (1 − p) where the element's 32 random bits are at least p · 2³², else 0."""
    source = compiled(x)
    out = empty_like(source)
    scale = source.dtype.type(1 / (1 - p) if p < 1 else 0)
    args = source.reshape(-1), np.uint64(round(p * 2**32)), scale, np.uint64(key), out.reshape(-1)
    split(_dropout, -(-source.size // 4), PHILOX_COST * source.size, *args)
    return out.astype(x.dtype, copy=False)
