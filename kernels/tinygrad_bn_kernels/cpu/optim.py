"""Optimisers' updates in one pass over memory. They are not ops: no gradient flows through them.

Each takes flat arrays, gives the new parameter as a new array (a graph may still hold the old one) and writes its
state in place.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinygrad_bn_kernels import kernel
from tinygrad_bn_kernels.cpu.jit import njit
from tinygrad_bn_kernels.cpu.threads import split

Array = NDArray[Any]


@njit()
def _adam(p, g, m, v, beta1, one_beta1, beta2, one_beta2, step_size, root_scale, eps, shrink, decay, out, start, stop):
    for i in range(start, stop):
        gi = g[i] + decay * p[i]
        m[i] = beta1 * m[i] + one_beta1 * gi
        v[i] = beta2 * v[i] + one_beta2 * gi * gi
        out[i] = shrink * p[i] - step_size * m[i] / (np.sqrt(v[i]) * root_scale + eps)


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
    out = np.empty_like(p)
    numbers = (beta1, 1 - beta1, beta2, 1 - beta2, step_size, root_scale, eps, shrink, decay)
    split(_adam, p.size, p.size, p, g, m, v, *map(p.dtype.type, numbers), out)
    return out


@njit()
def _sgd(p, g, v, lr, momentum, one_dampening, decay, nesterov, out, start, stop):
    for i in range(start, stop):
        gi = g[i] + decay * p[i]
        v[i] = momentum * v[i] + one_dampening * gi
        out[i] = p[i] - lr * (gi + momentum * v[i] if nesterov else v[i])


@kernel("optim.sgd", "cpu")
def sgd(
    p: Array, g: Array, v: Array, *, lr: float, momentum: float, dampening: float, decay: float, nesterov: bool
) -> Array:
    """The new p = p − lr · v, or p − lr · (g + momentum · v), after v has taken in g + decay · p."""
    if p.dtype.char not in "fd":
        return NotImplemented
    out = np.empty_like(p)
    kind = p.dtype.type
    numbers = kind(lr), kind(momentum), kind(1 - dampening), kind(decay), nesterov
    split(_sgd, p.size, p.size, p, g, v, *numbers, out)
    return out
