"""Updates of the optimisers in one pass over memory. They are not differentiable.

Each takes arrays of one shape (N,), returns the new parameter as a new array, since a graph may hold the old one, and
updates its state in place.
"""

from typing import Any

import numpy as np

from tinygrad_bn_kernels import kernel
from tinygrad_bn_kernels.cpu.arrays import Array, expect_one_shape
from tinygrad_bn_kernels.cpu.jit import njit
from tinygrad_bn_kernels.cpu.memory import empty_like
from tinygrad_bn_kernels.cpu.threads import split

# Elements of a block, which a loop processes in two passes: with five arrays in one pass LLVM needs too many overlap
# checks and does not vectorise.
BLOCK = 1024


@njit(allocates=False, fastmath={"contract"})
def _adam(p, g, m, v, beta1, one_beta1, beta2, one_beta2, step_size, root_scale, eps, shrink, decay, out, start, stop):
    for first in range(start, stop, BLOCK):
        last = first + BLOCK if first + BLOCK < stop else stop
        ps, gs, ms, vs, outs = p[first:last], g[first:last], m[first:last], v[first:last], out[first:last]
        for i in range(ps.size):
            gi = gs[i] + (decay * ps[i] if decay != 0 else decay)  # 0 · ∞ would be NaN
            ms[i] = beta1 * ms[i] + one_beta1 * gi
            vs[i] = beta2 * vs[i] + one_beta2 * gi * gi
        for i in range(ps.size):
            outs[i] = shrink * ps[i] - step_size * ms[i] / (np.sqrt(vs[i]) * root_scale + eps)


@kernel("adam", "cpu")
def adam(
    p: Array,
    g: Array,
    m: Array,
    v: Array,
    *,
    beta1: float,
    beta2: float,
    step_size: float,
    root_scale: float,
    eps: float,
    shrink: float,
    decay: float,
) -> Array:
    """The new p = shrink · p − step_size · m / (root_scale · √v + eps), after updating m and v by g + decay · p."""
    if p.dtype.char not in "fd":
        return NotImplemented
    expect_one_shape(p, g, m, v)
    out = empty_like(p)
    numbers = (beta1, 1 - beta1, beta2, 1 - beta2, step_size, root_scale, eps, shrink, decay)
    split(_adam, p.size, p.size, p, g, m, v, *map(p.dtype.type, numbers), out)
    return out


@njit(allocates=False, fastmath={"contract"})
def _sgd(p, g, v, lr, momentum, one_dampening, decay, nesterov, out, start, stop):
    # p decreases by a · (g + decay · p) + b · v.
    a, b = (lr, lr * momentum) if nesterov else (lr - lr, lr)
    p, g, v, out = p[start:stop], g[start:stop], v[start:stop], out[start:stop]
    for i in range(p.size):
        gi = g[i] + (decay * p[i] if decay != 0 else decay)  # 0 · ∞ would be NaN
        v[i] = momentum * v[i] + one_dampening * gi
        out[i] = p[i] - (a * gi + b * v[i])


@kernel("sgd", "cpu")
def sgd(
    p: Array, g: Array, v: Array | None, *, lr: float, momentum: float, dampening: float, decay: float, nesterov: bool
) -> Any:
    """The new p = p − lr · v, or with Nesterov p − lr · (g + momentum · v), after updating v by g + decay · p."""
    if v is None or p.dtype.char not in "fd":
        return NotImplemented
    expect_one_shape(p, g, v)
    out = empty_like(p)
    cast = p.dtype.type
    numbers = cast(lr), cast(momentum), cast(1 - dampening), cast(decay), bool(nesterov)
    split(_sgd, p.size, p.size, p, g, v, *numbers, out)
    return out
