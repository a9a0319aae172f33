"""The optimisers. Each is an op without gradients, from parameters p, gradients g and state to new parameters.

The ops overwrite their state. All arrays of a call have one shape.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

from tinygrad_bn.backend import Array
from tinygrad_bn.more_ops import maximum
from tinygrad_bn.optim.flat import Group, State
from tinygrad_bn.optim.optimizer import Optimizer
from tinygrad_bn.sample import POSITIVE, REAL, Domain, Draw, Drawn, Sample
from tinygrad_bn.tensor import Operand, primitive


def _sample(options: dict[str, Any], *state: Domain | list[Domain | None]) -> Sample:
    """Parameters, gradients and state of one shape. From a list one is chosen; state may be None."""

    def sample(d: Draw) -> Drawn:
        shape = d.shape(min_dims=1, max_dims=1)
        chosen = [d.choice(domain) if isinstance(domain, list) else domain for domain in (REAL, REAL, *state)]
        arrays = tuple(None if domain is None else d.array(domain, shape) for domain in chosen)
        return arrays, {k: d.choice(v) if isinstance(v, list) else v for k, v in options.items()}

    return sample


SMALL = Domain(-0.5, 0.5)  # averages of gradients whose squares stay below those of the sample


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
        dampening = 0.0 if "momentum_buffer" in o.new else o.dampening  # the first gradient counts in full
        return sgd(
            p, g, state.get("momentum_buffer"), lr=o.lr, momentum=o.momentum, dampening=dampening,
            decay=o.weight_decay, nesterov=bool(o.nesterov),
        )  # fmt: skip


@primitive(
    None, None, None, updates=("v",),
    formula="y = p − lr · v;  v = momentum · v + (1 − dampening) · (g + decay · p)",
    sample=_sample(
        {"lr": [0.1, 0.02], "momentum": [0.9, 0.5], "dampening": [0.2, 0.0], "decay": [0.1, 0.05],
         "nesterov": [False, True]}, [REAL, None],
    ),
)  # fmt: skip
def sgd(
    p: Operand, g: Operand, v: Operand, *, lr: float, momentum: float, dampening: float, decay: float, nesterov: bool
) -> Any:
    """Stochastic gradient descent with the velocity v, or None without momentum (Sutskever et al. 2013)."""
    g = g + decay * p if decay else g
    if v is None:
        return p - lr * g
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
        return adam(
            p, g, state["exp_avg"], state["exp_avg_sq"], beta1=beta1, beta2=beta2, eps=o.eps,
            step_size=o.lr / (1 - beta1**o.step),  # corrects the bias of exp_avg towards 0
            root_scale=1 / math.sqrt(1 - beta2**o.step),  # and that of exp_avg_sq
            shrink=1 - o.lr * o.weight_decay if self.decoupled else 1.0,
            decay=0.0 if self.decoupled else o.weight_decay,
        )  # fmt: skip


@primitive(
    None, None, None, None, updates=("m", "v"),
    formula="y = shrink · p − step_size · m / (root_scale · √v + eps);  m, v = averages of g and g²",
    sample=_sample(
        {"beta1": [0.9, 0.5], "beta2": [0.99, 0.9], "step_size": [0.1, 0.02], "root_scale": [1.1, 1.0],
         "eps": [1e-8, 0.1], "shrink": [1.0, 0.9], "decay": [0.0, 0.1]}, REAL, POSITIVE,
    ),
)  # fmt: skip
def adam(
    p: Operand, g: Operand, m: Operand, v: Operand, *,
    beta1: float, beta2: float, step_size: float, root_scale: float, eps: float, shrink: float, decay: float,
) -> Any:  # fmt: skip
    """Adam with the averages m of gradients and v of their squares (Kingma & Ba 2015, Algorithm 1)."""
    g = g + decay * p if decay else g
    m[...] = beta1 * m + (1 - beta1) * g
    v[...] = beta2 * v + (1 - beta2) * (g * g)
    return shrink * p - step_size * m / (v**0.5 * root_scale + eps)


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
        return rmsprop(
            p, g, state["square_avg"], state.get("grad_avg"), state.get("momentum_buffer"), lr=o.lr, alpha=o.alpha,
            eps=o.eps, decay=o.weight_decay, momentum=o.momentum,
        )  # fmt: skip


@primitive(
    None, None, None, None, None, updates=("square_avg", "grad_avg", "buffer"),
    formula="y = p − lr · g / (√square_avg + eps);  square_avg = average of g²",
    sample=_sample(
        {"lr": 0.1, "alpha": 0.9, "eps": 0.1, "decay": [0.0, 0.1], "momentum": 0.9},
        POSITIVE, [SMALL, None], [REAL, None],
    ),
)  # fmt: skip
def rmsprop(
    p: Operand, g: Operand, square_avg: Operand, grad_avg: Operand, buffer: Operand, *,
    lr: float, alpha: float, eps: float, decay: float, momentum: float,
) -> Any:  # fmt: skip
    """RMSprop; centred with grad_avg, and with momentum in buffer, unless these are None."""
    g = g + decay * p if decay else g
    square_avg[...] = v = alpha * square_avg + (1 - alpha) * (g * g)
    if grad_avg is not None:
        grad_avg[...] = alpha * grad_avg + (1 - alpha) * g
        v = maximum(v - grad_avg * grad_avg, 0)  # rounding may leave it below 0
    update = g / (v**0.5 + eps)
    if buffer is not None:
        buffer[...] = update = momentum * buffer + update
    return p - lr * update


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
        lr = o.lr / (1 + (o.step - 1) * o.lr_decay)
        return adagrad(p, g, state["sum"], lr=lr, eps=o.eps, decay=o.weight_decay)


@primitive(
    None, None, None, updates=("total",),
    formula="y = p − lr · g / (√total + eps);  total = total + g²",
    sample=_sample({"lr": 0.1, "eps": 1e-10, "decay": [0.0, 0.1]}, POSITIVE),
)  # fmt: skip
def adagrad(p: Operand, g: Operand, total: Operand, *, lr: float, eps: float, decay: float) -> Any:
    """Adagrad with the sum of squared gradients in total (Duchi et al. 2011)."""
    g = g + decay * p if decay else g
    total[...] = total + g * g
    return p - lr * g / (total**0.5 + eps)
