"""The base of the optimisers: parameter groups, their options, a step, and saved state."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from tinygrad_bn.arguments import expect_flags, expect_integer, expect_number, full_name, shown
from tinygrad_bn.backend import Array, join, move, to_numpy
from tinygrad_bn.keywords import Named, unknown
from tinygrad_bn.optim.flat import Group, Run, State, lay_out, state_array
from tinygrad_bn.optim.gradients import expect_tensors, gradient_of, listed
from tinygrad_bn.tensor import Tensor

if TYPE_CHECKING:
    from tinygrad_bn.nn.module import Module


class Optimizer(Named):
    """Base of the optimisers: parameter groups, their options, and the state kept for each parameter.

    A subclass defines `_initial_state` and `_update`, the new parameters as an elementwise function of parameters,
    gradients and state. A step replaces a parameter's array, so a graph that still needs the old values notices.

    Options in `param_groups` may change between steps. The state of one that is turned on later begins then, as at the
    first step.

    Args:
        params: tensors; or groups, `{"params": tensors, option: value, ...}`, whose options override `defaults`.
        defaults: the options of every group.

    Raises:
        ValueError: no parameters, one that is given twice, an unknown option, or one that is out of range.
        TypeError: params that are not tensors, or an option of the wrong type.
    """

    def __init__(self, params: Iterable[Tensor] | Iterable[Mapping[str, Any]], **defaults: Any) -> None:
        self.defaults = defaults
        given = listed(params)
        groups = given if any(isinstance(g, Mapping) for g in given) else [{"params": given}]
        if not all(isinstance(g, Mapping) and "params" in g for g in groups):
            wrong = next(g for g in groups if not (isinstance(g, Mapping) and "params" in g))
            got = f"a group of {', '.join(map(str, wrong))}" if isinstance(wrong, Mapping) else full_name(wrong)
            raise ValueError(f'each group is a dictionary with "params", such as {{"params": tensors}}; got {got}')
        self.param_groups: list[Group] = [{**defaults, **g, "params": listed(g["params"])} for g in groups]
        self.state: dict[Tensor, State] = {}
        self._runs: list[Run] = []
        everything = [p for group in self.param_groups for p in group["params"]]
        expect_tensors(everything)
        if not everything:
            raise ValueError(f"{type(self).__name__} got params without a tensor: there are no parameters to optimise")
        if len(set(everything)) < len(everything):
            twice = next(p for i, p in enumerate(everything) if p in set(everything[:i]))
            raise ValueError(
                f"a parameter of shape {twice.shape} is given more than once; name each once, in one group"
            )
        if not all(p.is_leaf for p in everything):
            raise ValueError("a parameter is the result of an op, so an update would not last; give leaves")
        for p in everything:
            if p.dtype.kind != "f":
                raise TypeError(
                    f"parameters are floating-point tensors; got one of shape {p.shape} and dtype {p.dtype}"
                )
        for group in self.param_groups:
            for option in group:
                if option not in defaults and option not in ("params", "initial_lr"):
                    wrong = unknown(option, defaults)
                    raise ValueError(f"{type(self).__name__} has no option {wrong}; it has {', '.join(defaults)}")
            _check_options(group)

    def __setattr__(self, name: str, value: object) -> None:
        """Set an attribute. Raises AttributeError for an option, which each group has for itself."""
        if name in vars(self).get("defaults", ()):
            raise AttributeError(
                f"{name} is an option of the groups: for group in optimizer.param_groups: group[{name!r}] = {value!r}"
            )
        object.__setattr__(self, name, value)

    def zero_grad(self) -> None:
        """Forget the gradients of all parameters."""
        for p in self._params():
            p.zero_grad()

    def step(self) -> None:
        """Update every parameter that has a gradient.

        Raises ValueError or TypeError, and changes no parameter, if an option, a gradient or a state does not fit.
        """
        params = self._params()
        for group in self.param_groups:
            if missing := self.defaults.keys() - group.keys():
                raise ValueError(f"a group in param_groups has no {', '.join(sorted(missing))}")
            _check_options(group)
        gradients = {p: g for p in params if (g := gradient_of(p)) is not None and p._requires_grad}
        self._runs = lay_out(self.param_groups, gradients, self.state, self._initial_state, self._runs)
        with np.errstate(over="ignore", invalid="ignore"):  # a step that is too large ends in inf
            for run in self._runs:
                values, gradient = run.values(), run.gradient(gradients)
                options = SimpleNamespace(step=run.next_step(), new=run.new, **run.group)
                run.assign(self._update(values, gradient, run.state, options))

    def _undoing(self) -> Callable[[], None]:
        """A function that takes back all steps from now on. They replace parameters, but overwrite their state."""
        arrays = [(p, p._data) for p in self._params()]
        state = {p: dict(own) for p, own in self.state.items()}
        options = [(group, dict(group)) for group in self.param_groups]
        runs = [(run, [join([a]) for a in run.state.values()]) for run in self._runs]

        def undo() -> None:
            kept = {id(old): new for run, copies in runs for old, new in run.state_as(copies)}
            for p, array in arrays:
                p._data = array
            for group, old in options:
                group.update(old)
            self.state = {p: {k: kept.get(id(v), v) for k, v in own.items()} for p, own in state.items()}

        return undo

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_runs": []}  # a copy has other parameters

    def _initial_state(self, group: Group) -> dict[str, float]:
        """Names of the state arrays, and the value that each is full of before the first step."""
        return {}

    def _update(self, p: Array, g: Array, state: State, o: SimpleNamespace) -> Array:
        """The new values of p; overwrites the arrays of `state`. All arrays are flat and of one size.

        `o` has the group's options; `step`, the number of this step, from 1; and `new`, the names of the state that
        starts with this step.
        """
        raise TypeError(f"{type(self).__name__} defines no _update")

    def _params(self) -> list[Tensor]:
        try:
            params = [p for group in self.param_groups for p in group["params"]]
        except (TypeError, KeyError):
            params = [None]
        if not all(isinstance(p, Tensor) for p in params):
            raise TypeError(
                'param_groups is a list of dictionaries with a list of tensors under "params"; one was changed to '
                f"something else: {self.param_groups!r:.200}"
            )
        return params

    def state_dict(self) -> dict[str, Any]:
        """Options and state, keyed by the position of the parameter: enough to resume exactly.

        Arrays are NumPy's, on whichever device the parameters are.
        """
        position = {p: i for i, p in enumerate(self._params())}
        return {
            "state": {
                i: {k: v if isinstance(v, int) else to_numpy(v) for k, v in self.state[p].items()}
                for p, i in position.items()
                if p in self.state
            },
            "param_groups": [{**g, "params": [position[p] for p in g["params"]]} for g in self.param_groups],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a `state_dict`; arrays may have become lists, and integer keys strings, as in JSON.

        Raises ValueError or TypeError, and changes nothing, if the groups, options, names or shapes do not fit.
        """
        if not _is_state(state):
            raise ValueError(
                "a state is what state_dict() gives: {'state': {position: {...}}, 'param_groups': [...]}; got "
                + shown(state)
            )
        if len(state["param_groups"]) != len(self.param_groups):
            raise ValueError(f"{len(state['param_groups'])} parameter groups for {len(self.param_groups)}")
        position = {p: i for i, p in enumerate(self._params())}
        groups = [
            self._loaded_group(group, saved, [position[p] for p in group["params"]])
            for group, saved in zip(self.param_groups, state["param_groups"], strict=True)
        ]
        needed = [(p, self._initial_state(group)) for group in groups for p in group["params"]]
        loaded: dict[Tensor, State] = {}
        for i, saved in state["state"].items():
            if not (str(i).isdecimal() and int(i) < len(needed)):
                raise ValueError(f"there is a saved state of parameter {i}, for {len(needed)} parameters")
            p, names = needed[int(i)]
            if p in loaded:
                raise ValueError(f"there are two saved states of parameter {i}")
            if missing := {"step", *names} - saved.keys():
                raise ValueError(f"the saved state of parameter {i} has no {', '.join(sorted(missing))}")
            expect_integer(f"the step of parameter {i}", saved["step"], 0)
            arrays = {k: move(_loaded_array(p, k, v), p.device) for k, v in saved.items() if k != "step"}
            loaded[p] = {"step": int(saved["step"]), **copy.deepcopy(arrays)}
        for group, new in zip(self.param_groups, groups, strict=True):
            group.update(new)
        self.state = loaded

    def _loaded_group(self, group: Group, saved: Mapping[str, Any], positions: list[int]) -> Group:
        """The group with the saved options, checked; `positions` are those of its parameters."""
        others = {"params", "initial_lr"}  # the second only under a schedule
        if saved.keys() - others != group.keys() - others:
            own, got = (", ".join(k for k in g if k not in {*others, "params"}) for g in (group, saved))
            raise ValueError(f"the saved options {got} are not those of {type(self).__name__}: {own}")
        if (params := saved.get("params", positions)) not in (positions, tuple(positions)):
            raise ValueError(f"a group has the parameters at {positions}; the saved one has params={params!r}")
        new = {**group, **saved, "params": group["params"]}
        _check_options(new)
        return new


def _is_state(state: Any) -> bool:
    """Whether it has the form of a `state_dict`."""
    own, groups = (state.get("state"), state.get("param_groups")) if isinstance(state, Mapping) else (None, None)
    if not (isinstance(own, Mapping) and isinstance(groups, list | tuple)):
        return False
    return all(isinstance(part, Mapping) for part in (*own.values(), *groups))


SQUARES = frozenset({"exp_avg_sq", "square_avg", "sum"})  # state that is the root's operand


def _loaded_array(p: Tensor, name: str, value: Any) -> Array:
    """Saved state as an array. Raises ValueError if it has another shape, or numbers that no step can leave."""
    array = to_numpy(state_array(p, name, value))
    right = array >= 0 if name in SQUARES else np.isfinite(array)  # squares may have overflowed
    if not right.all():
        wanted = "not negative" if name in SQUARES else "finite"
        raise ValueError(f"the saved state {name} of a parameter of shape {p.shape} has to be {wanted}, as {p.dtype}")
    return array


RANGES = dict.fromkeys(
    ("lr", "initial_lr", "weight_decay", "eps", "lr_decay", "initial_accumulator_value"), (0, math.inf)
) | {"alpha": (0, 1), "momentum": (0, 1), "dampening": (-math.inf, math.inf)}  # fmt: skip


def _check_options(group: Group) -> None:
    """Make the numbers among the options Python's own.

    Raises ValueError for an option that is out of range, and TypeError for one of the wrong type.
    """
    for option, (least, most) in RANGES.items():
        value = group.get(option, 0.0)
        if not (type(value) is float and 0 <= value < 1):  # the usual case, as every step asks
            value = expect_number(option, value, least, most)
            if option in group:
                group[option] = value  # a scalar of NumPy would round the arithmetic of the step
    expect_flags(nesterov=group.get("nesterov", False), centered=group.get("centered", False))
    if group.get("nesterov") and (group["momentum"] <= 0 or group["dampening"] != 0):
        got = f"momentum={group['momentum']}, dampening={group['dampening']}"
        raise ValueError(f"Nesterov momentum needs momentum > 0 and dampening = 0; got {got}")
    betas = group.get("betas", (0, 0))
    two = isinstance(betas, tuple | list) and len(betas) == 2
    if not two or not all(isinstance(b, Real) and not isinstance(b, bool) and 0 <= float(b) < 1 for b in betas):
        raise ValueError(f"betas have to be two numbers in [0, 1); got {shown(betas)}")
    if "betas" in group and not all(type(b) is float for b in betas):
        group["betas"] = tuple(map(float, betas))


def param_groups(model: Module, decay: float) -> list[Group]:
    """Two groups for an optimiser: weights that decay by `decay`, and parameters that do not decay.

    Biases and the parameters of normalisations do not decay: shrinking them does not regularise, because the next
    normalisation undoes it. They have fewer than two axes, or belong to LayerNorm or RMSNorm. Raises TypeError or
    ValueError for a model that is no module, or a decay below 0.
    """
    if not hasattr(model, "modules"):
        raise TypeError(f"model has to be a module; got a {type(model).__name__}")
    decay = expect_number("decay", decay, 0)
    undecayed = {p for m in model.modules() if hasattr(m, "normalized_shape") for p in m.parameters()}
    undecayed |= {p for p in model.parameters() if p.ndim < 2}
    return [
        {"params": [p for p in model.parameters() if p not in undecayed], "weight_decay": decay},
        {"params": [p for p in model.parameters() if p in undecayed], "weight_decay": 0.0},
    ]
