"""The optimisers: each is a function from parameters p, gradients g and state to new parameters."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np

from tinygrad_bn.device import kernel_or
from tinygrad_bn.optim.flat import Group, State
from tinygrad_bn.optim.optimizer import Optimizer
from tinygrad_bn.tensor import Array


class SGD(Optimizer):
    """Stochastic gradient descent, with momentum, dampening and Nesterov's variant as in PyTorch."""

    def __init__(
        self, params: Any, lr: float = 1e-3, momentum: float = 0.0, dampening: float = 0.0, weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(
            params, lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov
        )

    def _initial_state(self, group: Group) -> dict[str, float]:
        return {"momentum_buffer": 0.0} if group["momentum"] else {}

    def _update(self, p: Array, g: Array, state: State, o: SimpleNamespace) -> Array:
        if not o.momentum:
            return p - o.lr * _decayed(g, p, o)
        return kernel_or(
            _sgd, "optim.sgd", p, g, state["momentum_buffer"], lr=o.lr, momentum=o.momentum,
            dampening=o.dampening if o.step > 1 else 0.0,  # the first gradient counts in full
            decay=o.weight_decay, nesterov=o.nesterov,
        )  # fmt: skip


def _sgd(
    p: Array, g: Array, v: Array, *, lr: float, momentum: float, dampening: float, decay: float, nesterov: bool
) -> Array:
    """Updates the velocity v with g + decay · p; p − lr · v, or p − lr · (g + decay · p + momentum · v)."""
    g = g + decay * p
    v[...] = momentum * v + (1 - dampening) * g
    return p - lr * (g + momentum * v if nesterov else v)


class Adam(Optimizer):
    """Adam (Kingma & Ba 2015); weight decay is added to the gradient."""

    decoupled = False

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def _initial_state(self, group: Group) -> dict[str, float]:
        return {"exp_avg": 0.0, "exp_avg_sq": 0.0}

    def _update(self, p: Array, g: Array, state: State, o: SimpleNamespace) -> Array:
        beta1, beta2 = o.betas
        return kernel_or(
            _adam, "optim.adam", p, g, state["exp_avg"], state["exp_avg_sq"], beta1=beta1, beta2=beta2, eps=o.eps,
            step_size=o.lr / (1 - beta1**o.step),  # corrects the bias of exp_avg towards 0
            root_scale=1 / math.sqrt(1 - beta2**o.step),  # and that of exp_avg_sq
            shrink=1 - o.lr * o.weight_decay if self.decoupled else 1.0,
            decay=0.0 if self.decoupled else o.weight_decay,
        )  # fmt: skip


def _adam(
    p: Array, g: Array, m: Array, v: Array, *,
    beta1: float, beta2: float, step_size: float, root_scale: float, eps: float, shrink: float, decay: float,
) -> Array:  # fmt: skip
    """Updates m and v with g + decay · p; shrink · p − step_size · m / (root_scale · √v + eps)."""
    g = g + decay * p
    m[...] = beta1 * m + (1 - beta1) * g
    v[...] = beta2 * v + (1 - beta2) * (g * g)
    return shrink * p - step_size * m / (np.sqrt(v) * root_scale + eps)


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019): the decay shrinks the weight itself."""

    decoupled = True

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:  # fmt: skip
        super().__init__(params, lr, betas, eps, weight_decay)


class RMSprop(Optimizer):
    """RMSprop (Hinton 2012, lecture 6), with momentum and the centred variant as in PyTorch."""

    def __init__(
        self, params: Any, lr: float = 1e-2, alpha: float = 0.99, eps: float = 1e-8, weight_decay: float = 0.0,
        momentum: float = 0.0, centered: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(
            params, lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum, centered=centered
        )

    def _initial_state(self, group: Group) -> dict[str, float]:
        names = ["square_avg", *["grad_avg"] * group["centered"], *["momentum_buffer"] * bool(group["momentum"])]
        return dict.fromkeys(names, 0.0)

    def _update(self, p: Array, g: Array, state: State, o: SimpleNamespace) -> Array:
        g = _decayed(g, p, o)
        v = state["square_avg"]
        v[...] = o.alpha * v + (1 - o.alpha) * (g * g)
        if o.centered:
            mean = state["grad_avg"]
            mean[...] = o.alpha * mean + (1 - o.alpha) * g
            v = v - mean * mean
        update = g / (v**0.5 + o.eps)
        if o.momentum:
            buffer = state["momentum_buffer"]
            buffer[...] = o.momentum * buffer + update
            update = buffer
        return p - o.lr * update


class Adagrad(Optimizer):
    """Adagrad (Duchi et al. 2011)."""

    def __init__(
        self, params: Any, lr: float = 1e-2, lr_decay: float = 0.0, weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0, eps: float = 1e-10,
    ) -> None:  # fmt: skip
        super().__init__(
            params, lr=lr, lr_decay=lr_decay, weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value, eps=eps,
        )  # fmt: skip

    def _initial_state(self, group: Group) -> dict[str, float]:
        return {"sum": group["initial_accumulator_value"]}

    def _update(self, p: Array, g: Array, state: State, o: SimpleNamespace) -> Array:
        g = _decayed(g, p, o)
        total = state["sum"]
        total += g * g
        lr = o.lr / (1 + (o.step - 1) * o.lr_decay)
        return p - lr * g / (total**0.5 + o.eps)


def _decayed(g: Array, p: Array, o: SimpleNamespace) -> Array:
    """The gradient with that of weight decay added."""
    return g + o.weight_decay * p if o.weight_decay else g
