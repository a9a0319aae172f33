"""Optimisers' updates in one pass over memory. They are not ops: no gradient flows through them.

Each gives the new parameter as a new array (a graph may still hold the old one) and writes its state in place.
"""

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
def _adam(p, g, m, v, out, i, beta1, one_beta1, beta2, one_beta2, step_size, root_scale, eps, shrink, decay):
    gi = g[i] + decay * p[i]
    m[i] = beta1 * m[i] + one_beta1 * gi
    v[i] = beta2 * v[i] + one_beta2 * gi * gi
    out[i] = shrink * p[i] - step_size * m[i] / (np.sqrt(v[i]) * root_scale + eps)


@njit()
def _adam_serial(p, g, m, v, out, beta1, one_beta1, beta2, one_beta2, step_size, root_scale, eps, shrink, decay):
    for i in range(p.size):
        _adam(p, g, m, v, out, i, beta1, one_beta1, beta2, one_beta2, step_size, root_scale, eps, shrink, decay)


@njit(parallel=True)
def _adam_parallel(p, g, m, v, out, beta1, one_beta1, beta2, one_beta2, step_size, root_scale, eps, shrink, decay):
    for i in prange(p.size):
        _adam(p, g, m, v, out, i, beta1, one_beta1, beta2, one_beta2, step_size, root_scale, eps, shrink, decay)


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
    kind = p.dtype.type
    p, g = compiled(p), compiled(g, p.dtype)
    out = np.empty_like(p)
    numbers = (beta1, 1 - beta1, beta2, 1 - beta2, step_size, root_scale, eps, shrink, decay)
    run = _adam_parallel if use_threads(p.size) else _adam_serial
    run(p.reshape(-1), g.reshape(-1), m.reshape(-1), v.reshape(-1), out.reshape(-1), *map(kind, numbers))
    return out
