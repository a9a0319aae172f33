"""Elementwise functions that NumPy lacks, or computes in several passes over memory.

A loop indexes slices from 0, and not arrays from `start`: otherwise LLVM does not vectorise most of them.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tinygrad_bn_kernels import kernel
from tinygrad_bn_kernels.cpu.arrays import Array, compiled, expect_one_shape
from tinygrad_bn_kernels.cpu.exponential import exp
from tinygrad_bn_kernels.cpu.jit import inlined, njit
from tinygrad_bn_kernels.cpu.memory import empty_like
from tinygrad_bn_kernels.cpu.threads import ERF_COST, EXP_COST, PHILOX_COST, split

SQRT_HALF = math.sqrt(0.5)
NORMAL = 1 / math.sqrt(2 * math.pi)  # the density of the standard normal distribution at 0

# Beyond these limits σ and Φ are 0 or 1 in float64, and a product with an infinite x would be NaN.
SILU_LIMIT = 750.0
GELU_LIMIT = 40.0
WHERE_FROM = 1 << 12  # elements: NumPy is as fast below it
GELU_LINEAR = 1e-4  # nearer to 0 than this, Φ is a straight line to 13 digits, and float16 has few digits


def _mapped(loop: Callable[..., Any], cost: int, *arrays: Array) -> Array:
    """The result of an elementwise loop, in the shape and dtype of the last array; in a floating-point dtype."""
    expect_one_shape(*arrays)
    x = arrays[-1]
    read = [compiled(a) for a in arrays]
    out = empty_like(read[-1])
    split(loop, x.size, cost * x.size, *(a.reshape(-1) for a in (*read, out)))
    return out.astype(x.dtype, copy=False) if x.dtype.kind == "f" else out


@njit(allocates=False)
def _relu_vjp(g, y, out, start, stop):
    zero = g.dtype.type(0)
    g, y, out = g[start:stop], y[start:stop], out[start:stop]
    for i in range(g.size):
        passed = g[i]
        out[i] = zero if y[i] <= 0 else passed


@kernel("relu.vjp", "cpu")
def relu_vjp(g: Array, y: Array, x: Array, *, needs: list[bool]) -> tuple[Array]:
    """0 where the output is 0, g elsewhere: also at NaN."""
    expect_one_shape(g, y)
    g, y = compiled(g), compiled(y)
    out = empty_like(g)
    split(_relu_vjp, g.size, g.size, g.reshape(-1), y.reshape(-1), out.reshape(-1))
    return (out,)


@njit(allocates=False)
def _where(condition, a, b, out, start, stop):
    condition, a, b, out = condition[start:stop], a[start:stop], b[start:stop], out[start:stop]
    for i in range(out.size):
        first, second = a[i], b[i]
        out[i] = first if condition[i] else second


@njit(allocates=False)
def _where_number(condition, x, wanted, other, out, start, stop):
    condition, x, out = condition[start:stop], x[start:stop], out[start:stop]
    for i in range(out.size):
        chosen = x[i]
        out[i] = chosen if condition[i] == wanted else other


@kernel("where", "cpu")
def where(condition: Array, a: Any, b: Any) -> Any:
    """a where condition, else b: of large arrays of one shape and dtype, or such an array and a number.

    NumPy's is 20 times slower if the condition varies at random, as behind a ReLU.
    """
    x, other = (a, b) if isinstance(a, np.ndarray) else (b, a)
    if not isinstance(x, np.ndarray) or x.shape != condition.shape or x.size < WHERE_FROM or x.dtype.char not in "fd":
        return NotImplemented
    mask, read = compiled(condition, bool), compiled(x)
    out = empty_like(read)
    if type(other) in (int, float):
        number = read.dtype.type(other)
        split(_where_number, x.size, x.size, mask.reshape(-1), read.reshape(-1), x is a, number, out.reshape(-1))
    elif isinstance(other, np.ndarray) and other.shape == x.shape and other.dtype == x.dtype:
        split(_where, x.size, x.size, *(array.reshape(-1) for array in (mask, read, compiled(other), out)))
    else:
        return NotImplemented
    return out


@njit(allocates=False)
def _erf(x, out, start, stop):
    for i in range(start, stop):
        out[i] = math.erf(x[i])


@njit(allocates=False)
def _erfc(x, out, start, stop):
    for i in range(start, stop):
        out[i] = math.erfc(x[i])


@kernel("erf", "cpu")
def erf(x: Array) -> Array:
    """The error function."""
    return _mapped(_erf, ERF_COST, x)


@kernel("erfc", "cpu")
def erfc(x: Array) -> Array:
    """1 − erf x."""
    return _mapped(_erfc, ERF_COST, x)


# ---- SiLU and GELU, in float64 -------------------------------------------------------------------------


@inlined(fastmath={"contract"})
def _limited(x, limit):
    """x within ±limit; NaN for NaN."""
    return limit if x > limit else -limit if x < -limit else x


@njit(allocates=False, fastmath={"contract"})
def _silu(x, out, start, stop):
    for i in range(start, stop):
        v = np.float64(x[i])
        e = exp(-abs(v))
        y = v * ((1.0 if v >= 0 else e) / (1 + e))
        out[i] = 0.0 if v < -SILU_LIMIT else y


@njit(allocates=False, fastmath={"contract"})
def _silu_gradient(g, y, x, out, start, stop):
    """g · σ(x) · (1 + x · σ(−x))"""
    g, y, x, out = g[start:stop], y[start:stop], x[start:stop], out[start:stop]
    for i in range(x.size):
        v = _limited(np.float64(x[i]), SILU_LIMIT)
        e = exp(-abs(v))
        s, r = (1.0 if v >= 0 else e) / (1 + e), (e if v >= 0 else 1.0) / (1 + e)
        out[i] = np.float64(g[i]) * (s * (1 + v * r))


@njit(allocates=False, fastmath={"contract"})
def _gelu(x, out, start, stop):
    for i in range(start, stop):
        v = np.float64(x[i])
        out[i] = 0.0 if v < -GELU_LIMIT else v * math.erfc(-SQRT_HALF * v) * 0.5


@njit(allocates=False, fastmath={"contract"})
def _gelu_gradient(g, y, x, out, start, stop):
    """g · (Φ(x) + x · φ(x)), with Φ(x) = y / x; near 0, where y loses digits or is 0, Φ(x) = ½ + x · φ(0)."""
    g, y, x, out = g[start:stop], y[start:stop], x[start:stop], out[start:stop]
    for i in range(x.size):
        v = np.float64(x[i])
        c = _limited(v, GELU_LIMIT)
        inside = 0.5 + v * NORMAL if abs(v) < GELU_LINEAR else np.float64(y[i]) / v
        cdf = 1.0 if v > GELU_LIMIT else 0.0 if v < -GELU_LIMIT else inside
        out[i] = np.float64(g[i]) * (cdf + c * (NORMAL * exp(-0.5 * c * c)))


@kernel("silu", "cpu")
def silu(x: Array) -> Any:
    """x · σ(x)."""
    return _mapped(_silu, EXP_COST, x) if x.dtype.kind == "f" else NotImplemented


@kernel("silu.vjp", "cpu")
def silu_vjp(g: Array, y: Array, x: Array, *, needs: list[bool]) -> tuple[Array]:
    """The gradient of x."""
    return (_mapped(_silu_gradient, EXP_COST, g, y, x),)


@kernel("gelu", "cpu")
def gelu(x: Array) -> Any:
    """x · Φ(x)."""
    return _mapped(_gelu, ERF_COST, x) if x.dtype.kind == "f" else NotImplemented


@kernel("gelu.vjp", "cpu")
def gelu_vjp(g: Array, y: Array, x: Array, *, needs: list[bool]) -> tuple[Array]:
    """The gradient of x."""
    return (_mapped(_gelu_gradient, EXP_COST, g, y, x),)


# ---- slopes of sigmoid and tanh --------------------------------------------------------------------------
# y · (1 − y) and 1 − y² would lose their digits where |y| is near 1.


@njit(allocates=False, fastmath={"contract"})
def _sigmoid_gradient(g, x, out, start, stop):
    g, x, out = g[start:stop], x[start:stop], out[start:stop]
    for i in range(x.size):
        e = exp(-abs(np.float64(x[i])))
        out[i] = np.float64(g[i]) * (e / ((1 + e) * (1 + e)))


@njit(allocates=False, fastmath={"contract"})
def _tanh_gradient(g, x, out, start, stop):
    g, x, out = g[start:stop], x[start:stop], out[start:stop]
    for i in range(x.size):
        e = exp(-2 * abs(np.float64(x[i])))
        out[i] = np.float64(g[i]) * (4 * e / ((1 + e) * (1 + e)))


@kernel("sigmoid.vjp", "cpu")
def sigmoid_vjp(g: Array, y: Array, x: Array, *, needs: list[bool]) -> tuple[Array]:
    """g · e⁻ˣ / (1 + e⁻ˣ)²"""
    return (_mapped(_sigmoid_gradient, EXP_COST, g, x),)


@kernel("tanh.vjp", "cpu")
def tanh_vjp(g: Array, y: Array, x: Array, *, needs: list[bool]) -> tuple[Array]:
    """g / cosh² x"""
    return (_mapped(_tanh_gradient, EXP_COST, g, x),)


# ---- dropout ---------------------------------------------------------------------------------------------


@njit(allocates=False)
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


@njit(allocates=False)
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
