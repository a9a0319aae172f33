"""Optimisers and gradient clipping, with PyTorch's names, defaults and results; the schedules are in `schedules`.

An optimiser is one function of parameters, their gradients and their state to new values, elementwise, and so one for
many parameters at once: small ones of a group lie one after the other in one flat array, of which each is a view. An
array of parameters is replaced, never written into, so a graph that still needs the old values notices.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any, TypeAlias

import numpy as np

from tinygrad_bn.device import as_array, expect_one_device, kernel_or, move, to_numpy
from tinygrad_bn.flat import FlatParameters, State, lay_out, state_array
from tinygrad_bn.nn.module import Module
from tinygrad_bn.ops import clip
from tinygrad_bn.schedules import CosineAnnealingLR, Schedule, StepLR, WarmupLR
from tinygrad_bn.tensor import Array, Tensor

__all__ = [
    "SGD", "Adagrad", "Adam", "AdamW", "CosineAnnealingLR", "Optimizer", "RMSprop", "Schedule", "StepLR", "WarmupLR",
    "clip_grad_norm_", "clip_grad_value_", "param_groups",
]  # fmt: skip

Group: TypeAlias = dict[str, Any]


class Optimizer:
    """Base of the optimisers: parameter groups, their options, and the state kept for each parameter.

    Args:
        params: tensors; or groups, `{"params": tensors, option: value, ...}`, whose options override `defaults`.
        defaults: the options of every group.

    Raises:
        ValueError: no parameters, one that is given twice, an unknown option, or one that is out of range.
        TypeError: params that are no tensors, or an option that is no number.
    """

    def __init__(self, params: Iterable[Tensor] | Iterable[Mapping[str, Any]], **defaults: Any) -> None:
        given: list[Any] = [params] if isinstance(params, Tensor) else list(params)
        groups = given if given and isinstance(given[0], Mapping) else [{"params": given}]
        self.param_groups: list[Group] = [
            {**defaults, **g, "params": [g["params"]] if isinstance(g["params"], Tensor) else list(g["params"])}
            for g in groups
        ]
        self.state: dict[Tensor, State] = {}
        self._flats: dict[tuple[int, ...], list[FlatParameters]] = {}  # by the identity of the parameters
        everything = [p for g in self.param_groups for p in g["params"]]
        if not all(isinstance(p, Tensor) for p in everything):
            raise TypeError("params are tensors, as model.parameters() gives them, or groups of tensors")
        if not everything:
            raise ValueError("there are no parameters to optimise")
        if len(set(everything)) < len(everything):
            raise ValueError("a parameter is given more than once")
        if not all(p.is_leaf for p in everything):
            raise ValueError("a parameter is the result of an op, so an update would not last; give leaves")
        for group in self.param_groups:
            for option in group:
                if option not in defaults and option != "params":
                    raise ValueError(f"{type(self).__name__} has no option {option!r}; it has {', '.join(defaults)}")
            self._check(group)

    def zero_grad(self) -> None:
        """Forget the gradients of all parameters."""
        for group in self.param_groups:
            for p in group["params"]:
                p.zero_grad()

    def step(self) -> None:
        """Update every parameter that has a gradient.

        Raises ValueError or TypeError, and changes nothing, for an option or a gradient that does not fit.
        """
        for group in self.param_groups:
            self._check(group)
        gradients = {p: g for group in self.param_groups for p in group["params"] if (g := _gradient(p)) is not None}
        laid: dict[tuple[int, ...], list[FlatParameters]] = {}
        work: list[tuple[Group, FlatParameters]] = []
        for group in self.param_groups:
            params, kept = [p for p in group["params"] if p in gradients and p._requires_grad], self._kept(group)
            key = tuple(map(id, params))
            flats = self._flats.get(key, [])
            if not flats or not all(flat.holds(self.state, kept) for flat in flats):
                flats = lay_out(params, self.state, kept)
            laid[key] = flats
            work += [(group, flat) for flat in flats]
        for group, flat in work:
            values, g = flat.values(), flat.gradients(gradients)
            flat.replace(self._update(values, g, flat.state, step=flat.count(), **group))
        self._flats = laid  # any other way of being laid out is over

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_flats": {}}  # a copy has other parameters

    def _check(self, group: Group) -> None:
        """Raise ValueError for options that are out of range, and TypeError for what is no number."""
        for option in ("lr", "weight_decay", "eps", "momentum", "alpha", "lr_decay"):
            value = group.get(option, 0)
            if type(value) is not float and not isinstance(value, Real):  # which takes ten times as long to ask
                raise TypeError(f"{option} has to be a number; got {value!r}")
            if not float(value) >= 0:  # nor NaN
                raise ValueError(f"{option} has to be 0 or more; got {value}")
        if group.get("nesterov") and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError("Nesterov momentum needs momentum > 0 and dampening = 0")
        betas = group.get("betas", (0, 0))
        two = isinstance(betas, tuple | list) and len(betas) == 2
        if not two or not all(isinstance(beta, Real) and 0 <= float(beta) < 1 for beta in betas):
            raise ValueError(f"betas have to be two numbers in [0, 1); got {betas!r}")

    def _kept(self, group: Group) -> dict[str, float]:
        """Names of the arrays that are kept for a parameter, and what they are full of before the first step."""
        return {}

    def _update(self, p: Array, g: Array, state: State, *, step: int, **options: Any) -> Array:
        """The new values of p, which is flat like g and the arrays of `state`; those are written in place."""
        raise TypeError(f"{type(self).__name__} defines no _update")

    def state_dict(self) -> dict[str, Any]:
        """Options and state, with parameters by their place: enough to go on exactly where this one stands.

        Arrays are NumPy's, wherever the parameters live.
        """
        everything = [p for group in self.param_groups for p in group["params"]]
        return {
            "state": {
                i: {k: v if isinstance(v, int) else to_numpy(v) for k, v in self.state[p].items()}
                for i, p in enumerate(everything)
                if p in self.state
            },
            "param_groups": [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, which may have been lists meanwhile, as in JSON.

        Raises ValueError, and changes nothing, if the groups, the names or the shapes do not fit.
        """
        if len(state["param_groups"]) != len(self.param_groups):
            raise ValueError(f"{len(state['param_groups'])} parameter groups for {len(self.param_groups)}")
        groups = [{**group, **options} for group, options in zip(self.param_groups, state["param_groups"], strict=True)]
        for group, options in zip(self.param_groups, state["param_groups"], strict=True):
            if options.keys() != group.keys() - {"params"}:
                raise ValueError(f"the saved options {', '.join(options)} are not those of {type(self).__name__}")
        everything = [(p, self._kept(group)) for group in groups for p in group["params"]]
        loaded: dict[Tensor, State] = {}
        for i, saved in state["state"].items():
            if not 0 <= int(i) < len(everything):
                raise ValueError(f"there is a saved state of parameter {i}, for {len(everything)} parameters")
            p, kept = everything[int(i)]
            if missing := {"step", *kept} - saved.keys():
                raise ValueError(f"the saved state of parameter {i} has no {', '.join(sorted(missing))}")
            arrays = {name: move(state_array(p, name, saved[name]), p.device) for name in kept}
            loaded[p] = copy.deepcopy({**saved, **arrays})
        for group, options in zip(self.param_groups, state["param_groups"], strict=True):
            group.update(options)
        self._flats, self.state = {}, loaded


def _gradient(p: Tensor) -> Any:
    """The array of a parameter's gradient, or None. Raises if somebody has assigned what cannot be its gradient."""
    if p.grad is None:
        return None
    if not isinstance(p.grad, Tensor):
        raise TypeError(
            f"a parameter of shape {p.shape} has a gradient of type {type(p.grad).__name__}; assign a Tensor"
        )
    array = p.grad._data
    if array.shape != p._data.shape:
        raise ValueError(f"a parameter of shape {p.shape} has a gradient of shape {array.shape}")
    if type(array) is not type(p._data):
        expect_one_device((p._data, array))
    return array


class SGD(Optimizer):
    """Stochastic gradient descent, with momentum, dampening and Nesterov's variant as in PyTorch."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        super().__init__(
            params, lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov
        )

    def _kept(self, group: Group) -> dict[str, float]:
        return {"momentum_buffer": 0.0} if group["momentum"] else {}

    def _update(self, p: Array, g: Array, state: State, *, step: int, **o: Any) -> Array:
        if not o["momentum"]:
            return p - o["lr"] * (g + o["weight_decay"] * p if o["weight_decay"] else g)
        return kernel_or(
            _sgd,
            "optim.sgd",
            p,
            g,
            state["momentum_buffer"],
            lr=o["lr"],
            momentum=o["momentum"],
            dampening=o["dampening"] if step > 1 else 0.0,  # the first gradient counts in full
            decay=o["weight_decay"],
            nesterov=o["nesterov"],
        )


def _sgd(
    p: Array, g: Array, v: Array, *, lr: float, momentum: float, dampening: float, decay: float, nesterov: bool
) -> Array:
    """The new p = p − lr · v, or p − lr · (g + momentum · v), after v has taken in g + decay · p."""
    g = g + decay * p
    v[...] = momentum * v + (1 - dampening) * g
    return p - lr * (g + momentum * v if nesterov else v)


class Adam(Optimizer):
    """Adam (Kingma & Ba 2015); weight decay is added to the gradient."""

    decoupled = False

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def _kept(self, group: Group) -> dict[str, float]:
        return {"exp_avg": 0.0, "exp_avg_sq": 0.0}

    def _update(self, p: Array, g: Array, state: State, *, step: int, **o: Any) -> Array:
        beta1, beta2 = o["betas"]
        return kernel_or(
            _adam,
            "optim.adam",
            p,
            g,
            state["exp_avg"],
            state["exp_avg_sq"],
            beta1=beta1,
            beta2=beta2,
            step_size=o["lr"] / (1 - beta1**step),
            root_scale=1 / math.sqrt(1 - beta2**step),
            eps=o["eps"],
            shrink=1 - o["lr"] * o["weight_decay"] if self.decoupled else 1.0,
            decay=0.0 if self.decoupled else o["weight_decay"],
        )


def _adam(
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
    g = g + decay * p
    m[...] = beta1 * m + (1 - beta1) * g
    v[...] = beta2 * v + (1 - beta2) * (g * g)
    return shrink * p - step_size * m / (np.sqrt(v) * root_scale + eps)


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019): the decay shrinks the weight itself."""

    decoupled = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)


class RMSprop(Optimizer):
    """RMSprop (Hinton 2012, lecture 6), with momentum and the centred variant as in PyTorch."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
    ) -> None:
        super().__init__(
            params, lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum, centered=centered
        )

    def _kept(self, group: Group) -> dict[str, float]:
        names = ["square_avg", *["grad_avg"] * group["centered"], *["momentum_buffer"] * bool(group["momentum"])]
        return dict.fromkeys(names, 0.0)

    def _update(self, p: Array, g: Array, state: State, *, step: int, **o: Any) -> Array:
        g = g + o["weight_decay"] * p if o["weight_decay"] else g
        v = state["square_avg"]
        v[...] = o["alpha"] * v + (1 - o["alpha"]) * (g * g)
        if o["centered"]:
            mean = state["grad_avg"]
            mean[...] = o["alpha"] * mean + (1 - o["alpha"]) * g
            v = v - mean * mean
        update = g / (v**0.5 + o["eps"])
        if o["momentum"]:
            buffer = state["momentum_buffer"]
            buffer[...] = o["momentum"] * buffer + update
            update = buffer
        return p - o["lr"] * update


class Adagrad(Optimizer):
    """Adagrad (Duchi et al. 2011)."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            lr_decay=lr_decay,
            weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value,
            eps=eps,
        )

    def _kept(self, group: Group) -> dict[str, float]:
        return {"sum": group["initial_accumulator_value"]}

    def _update(self, p: Array, g: Array, state: State, *, step: int, **o: Any) -> Array:
        g = g + o["weight_decay"] * p if o["weight_decay"] else g
        total = state["sum"]
        total += g * g
        lr = o["lr"] / (1 + (step - 1) * o["lr_decay"])
        return p - lr * g / (total**0.5 + o["eps"])


# ---- parameter groups and clipping ----------------------------------------------------------------------


def param_groups(model: Module, decay: float) -> list[Group]:
    """Two groups for an optimiser: weights that decay by `decay`, and those that should not.

    Biases and the weights of normalisations are not decayed: shrinking them does not regularise, as a
    normalisation undoes the scale of what comes before it. They are the parameters of one axis, and all
    parameters of LayerNorm and RMSNorm.
    """
    undecayed = {p for m in model.modules() if hasattr(m, "normalized_shape") for p in m.parameters()}
    undecayed |= {p for p in model.parameters() if p.ndim < 2}
    return [
        {"params": [p for p in model.parameters() if p not in undecayed], "weight_decay": decay},
        {"params": [p for p in model.parameters() if p in undecayed], "weight_decay": 0.0},
    ]


def _listed(params: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [params] if isinstance(params, Tensor) else list(params)


def _sum_of_squares(g: Array) -> float:
    return float(kernel_or(lambda g: np.sum(np.square(g, dtype=np.float64)), "optim.sum_of_squares", g))


def clip_grad_norm_(params: Tensor | Iterable[Tensor], max_norm: float) -> float:
    """Scale all gradients together so that their common 2-norm is at most `max_norm`; gives the norm before.

    A norm that is not finite leaves the gradients as they are, so that the fault shows. Raises ValueError for a
    `max_norm` below 0.
    """
    if not max_norm >= 0:
        raise ValueError(f"max_norm has to be 0 or more; got {max_norm}")
    graded = [(p, g) for p in _listed(params) if (g := _gradient(p)) is not None]
    norm = math.sqrt(sum(_sum_of_squares(g) for _, g in graded))
    if math.isfinite(norm) and norm > max_norm:
        for p, g in graded:
            p.grad = Tensor._of(as_array(g * (max_norm / (norm + 1e-6))))
    return norm


def clip_grad_value_(params: Tensor | Iterable[Tensor], clip_value: float) -> None:
    """Limit every element of every gradient to [−clip_value, clip_value]; ValueError for a limit below 0."""
    if not clip_value >= 0:
        raise ValueError(f"clip_value has to be 0 or more; got {clip_value}")
    for p in _listed(params):
        if (g := _gradient(p)) is not None:
            p.grad = Tensor._of(as_array(clip(g, min=-clip_value, max=clip_value)))
