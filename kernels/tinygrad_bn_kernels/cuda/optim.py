"""Optimiser updates: one launch for all parameters in a flat array."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tinygrad_bn_kernels import kernel
from tinygrad_bn_kernels.cuda import maps
from tinygrad_bn_kernels.cuda.array import DeviceArray
from tinygrad_bn_kernels.cuda.launch import blocks, launch, program, u4
from tinygrad_bn_kernels.cuda.shim import cuda, uint32


@program("adam", "f4* f4* f4* f4* f4* u4 f4 f4 f4 f4 f4 f4 f4 f4 f4")
def ADAM(T: Any) -> Callable[..., None]:
    """Adam; m and v are updated in place."""

    def adam(p, g, m, v, out, n, beta1, one_beta1, beta2, one_beta2, step_size, root_scale, eps, shrink, decay):
        i = uint32(cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x)
        while i < n:
            pi = p[i]
            gi = g[i]
            if decay != 0:  # 0 · ∞ would be NaN
                gi += decay * pi
            mi = beta1 * m[i] + one_beta1 * gi
            vi = beta2 * v[i] + one_beta2 * gi * gi
            m[i], v[i] = mi, vi
            out[i] = shrink * pi - step_size * mi / (math.sqrt(vi) * root_scale + eps)
            i = uint32(i + cuda.gridDim.x * cuda.blockDim.x)

    return adam


@program("sgd", "f4* f4* f4* f4* u4 f4 f4 f4 f4 f4")
def SGD(T: Any) -> Callable[..., None]:
    """SGD: subtract a · (g + decay · p) + b · v; v is updated in place. a is 0 without Nesterov momentum."""

    def sgd(p, g, v, out, n, a, b, momentum, one_dampening, decay):
        i = uint32(cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x)
        while i < n:
            pi = p[i]
            gi = g[i]
            if decay != 0:  # 0 · ∞ would be NaN
                gi += decay * pi
            vi = momentum * v[i] + one_dampening * gi
            v[i] = vi
            out[i] = pi - (a * gi + b * vi)
            i = uint32(i + cuda.gridDim.x * cuda.blockDim.x)

    return sgd


@kernel("adam", "cuda")
def adam(
    p: DeviceArray, g: DeviceArray, m: DeviceArray, v: DeviceArray, *, beta1: float, beta2: float, step_size: float,
    root_scale: float, eps: float, shrink: float, decay: float,
) -> DeviceArray:  # fmt: skip
    """p = shrink · p − step_size · m / (root_scale · √v + eps), after updating m and v with g + decay · p."""
    maps.check(p, g, m, v)
    out = DeviceArray(p.shape, p.dtype)
    numbers = (beta1, 1 - beta1, beta2, 1 - beta2, step_size, root_scale, eps, shrink, decay)
    if p.size:
        launch(ADAM, blocks(p.size), p, g, m, v, out, *u4(p.size), *map(p.number, numbers))
    return out


@kernel("sgd", "cuda")
def sgd(
    p: DeviceArray, g: DeviceArray, v: DeviceArray | None, *, lr: float, momentum: float, dampening: float,
    decay: float, nesterov: bool,
) -> Any:  # fmt: skip
    """p − lr · v, or with Nesterov p − lr · (g + momentum · v), after updating v with g + decay · p."""
    if v is None:
        return NotImplemented
    maps.check(p, g, v)
    out = DeviceArray(p.shape, p.dtype)
    a, b = (lr, lr * momentum) if nesterov else (0.0, lr)
    if p.size:
        numbers = map(p.number, (a, b, momentum, 1 - dampening, decay))
        launch(SGD, blocks(p.size), p, g, v, out, *u4(p.size), *numbers)
    return out
