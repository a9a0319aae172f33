"""Optimisers' updates in one pass over memory. They are not ops: no gradient flows through them.

Each takes flat arrays, gives the new parameter as a new array (a graph may still hold the old one) and writes its
state in place.
"""

import numpy as np

from tinygrad_bn_kernels import kernel
from tinygrad_bn_kernels.cpu.arrays import Array, expect_one_shape
from tinygrad_bn_kernels.cpu.jit import njit
from tinygrad_bn_kernels.cpu.memory import empty_like
from tinygrad_bn_kernels.cpu.threads import split

# Elements that a loop takes at a time, in two passes: with five arrays in one pass the compiler would need so many
# checks for overlap that it gives up on vector registers.
BLOCK = 1024


@njit(fastmath={"contract"})
def _adam(p, g, m, v, beta1, one_beta1, beta2, one_beta2, step_size, root_scale, eps, shrink, decay, out, start, stop):
    for first in range(start, stop, BLOCK):
        last = min(first + BLOCK, stop)
        ps, gs, ms, vs, outs = p[first:last], g[first:last], m[first:last], v[first:last], out[first:last]
        for i in range(ps.size):
            gi = gs[i] + decay * ps[i]
            ms[i] = beta1 * ms[i] + one_beta1 * gi
            vs[i] = beta2 * vs[i] + one_beta2 * gi * gi
        for i in range(ps.size):
            outs[i] = shrink * ps[i] - step_size * ms[i] / (np.sqrt(vs[i]) * root_scale + eps)


@kernel("optim.adam", "cpu")
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
    """The new p = shrink · p − step_size · m / (root_scale · √v + eps), after m and v have taken in g + decay · p."""
    if p.dtype.char not in "fd":
        return NotImplemented
    expect_one_shape(p, g, m, v)
    out = empty_like(p)
    numbers = (beta1, 1 - beta1, beta2, 1 - beta2, step_size, root_scale, eps, shrink, decay)
    split(_adam, p.size, p.size, p, g, m, v, *map(p.dtype.type, numbers), out)
    return out


@njit(fastmath={"contract"})
def _sgd(p, g, v, lr, momentum, one_dampening, decay, nesterov, out, start, stop):
    # What is subtracted is a · (g + decay · p) + b · v: Nesterov looks one step of the momentum ahead.
    a, b = (lr, lr * momentum) if nesterov else (lr - lr, lr)
    for i in range(start, stop):
        gi = g[i] + decay * p[i]
        v[i] = momentum * v[i] + one_dampening * gi
        out[i] = p[i] - (a * gi + b * v[i])


@kernel("optim.sgd", "cpu")
def sgd(
    p: Array, g: Array, v: Array, *, lr: float, momentum: float, dampening: float, decay: float, nesterov: bool
) -> Array:
    """The new p = p − lr · v, or p − lr · (g + momentum · v), after v has taken in g + decay · p."""
    if p.dtype.char not in "fd":
        return NotImplemented
    expect_one_shape(p, g, v)
    out = empty_like(p)
    kind = p.dtype.type
    numbers = kind(lr), kind(momentum), kind(1 - dampening), kind(decay), bool(nesterov)
    split(_sgd, p.size, p.size, p, g, v, *numbers, out)
    return out
