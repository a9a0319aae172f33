"""How parameters lie in memory: small ones side by side in flat arrays, so that one call updates many.

The arrays of such parameters, and those of their state, are views of the flat ones: keeping one keeps them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any, TypeAlias

import numpy as np

from tinygrad_bn.arguments import at_least_single
from tinygrad_bn.backend import Array, as_array, expect_one_place, full, join
from tinygrad_bn.tensor import Tensor

Group: TypeAlias = dict[str, Any]
State: TypeAlias = dict[str, Any]
InitialState: TypeAlias = Callable[[Group], dict[str, float]]
Gradients: TypeAlias = Mapping[Tensor, Array]

# A parameter of at least so many elements is a run of its own: gathering it would cost more than a call.
LARGE = 1 << 16


def lay_out(
    groups: list[Group], gradients: Gradients, state: dict[Tensor, State], initial: InitialState, before: list[Run]
) -> list[Run]:
    """Runs of all parameters that have a gradient; reuses those of `before` that are still valid.

    Raises ValueError or TypeError, before anything changes, if an assigned state does not fit its parameter.
    """
    result: list[Run] = []
    laid: list[Run] = []
    for group in groups:
        params, kept = [p for p in group["params"] if p in gradients], initial(group)
        runs = [run for run in before if run.group is group]
        same = {p for run in runs for p in run.params} == set(params)
        if not same or not all(run.is_valid(state, kept) for run in runs):
            laid += (runs := new_runs(group, params, state, kept))
        result += runs
    for run in laid:
        run.show_state(state)
    return result


def new_runs(group: Group, params: list[Tensor], state: Mapping[Tensor, State], kept: Mapping[str, float]) -> list[Run]:
    """A run for each dtype, device, step count and set of missing state, and for each large parameter."""
    alike: dict[tuple[Any, ...], list[Tensor]] = {}
    for p in params:
        own = state.get(p, {})
        alone = id(p) if p.size >= LARGE else None
        missing = frozenset(kept.keys() - own.keys())
        alike.setdefault((p.dtype, own.get("step", 0), p.device, missing, alone), []).append(p)
    return [Run(group, some, [state.get(p, {}) for p in some], kept) for some in alike.values()]


class Run:
    """Parameters of one group, dtype, device and step count in one flat array, and their state likewise.

    `new` are the names of the state that starts with the next step: that of an option that was turned on.
    """

    def __init__(self, group: Group, params: list[Tensor], states: list[State], kept: Mapping[str, float]) -> None:
        self.group, self.params, self.states = group, params, states
        self.dtype, self.device, self.wide = params[0].dtype, params[0].device, at_least_single(params[0].dtype)
        self.new = frozenset(kept.keys() - states[0].keys())
        ends = list(accumulate(p.size for p in params))
        self.slices = list(map(slice, [0, *ends], ends))
        self.state: State = {}
        for name, value in kept.items():
            if name in self.new:
                arrays = [full(p._data, value, self.wide) for p in params]
            else:
                arrays = [state_array(p, name, own[name]) for p, own in zip(params, states, strict=True)]
            expect_one_place([params[0]._data, *arrays])
            self.state[name] = join(arrays)  # a copy, as the update writes into it
        self.state_views: list[tuple[State, str, Any]] = [
            (own, name, view)
            for name, array in self.state.items()
            for own, view in zip(states, self._views(array), strict=True)
        ]
        self.array: Any = None
        self.views: list[Any] = [None] * len(params)

    def show_state(self, state: dict[Tensor, State]) -> None:
        """Put views of the flat arrays into the state of the parameters."""
        for p, own in zip(self.params, self.states, strict=True):
            own.setdefault("step", 0)
            state[p] = own
        for own, name, view in self.state_views:
            own[name] = view

    def is_valid(self, state: Mapping[Tensor, State], kept: Mapping[str, float]) -> bool:
        """Whether one call can still update all parameters, and their state is still this run's."""
        step = self.states[0].get("step")
        if step is None or self.state.keys() != kept.keys():
            return False
        for p, own, view in zip(self.params, self.states, self.views, strict=True):
            if state.get(p) is not own or own.get("step") != step:
                return False
            if p._data is not view and (p.dtype, p.device) != (self.dtype, self.device):
                return False
        return all(own.get(name) is view for own, name, view in self.state_views)

    def state_as(self, arrays: list[Array]) -> list[tuple[Array, Array]]:
        """Each array in the state of a parameter, and the one that it would be if the flat arrays were `arrays`."""
        others = [view for array in arrays for view in self._views(array)]
        return [(view, other) for (_, _, view), other in zip(self.state_views, others, strict=True)]

    def values(self) -> Array:
        """The parameters, in the precision of the update."""
        if any(p._data is not view for p, view in zip(self.params, self.views, strict=True)):  # one was assigned to
            self.array = joined([p._data for p in self.params])
        return self.array.astype(self.wide, copy=False)

    def gradient(self, gradients: Gradients) -> Array:
        """The gradients of the parameters, in the precision of the update."""
        return joined([gradients[p] for p in self.params]).astype(self.wide, copy=False)

    def next_step(self) -> int:
        """Count a step; the first is 1."""
        step = int(self.states[0]["step"]) + 1
        for own in self.states:
            own["step"] = step
        return step

    def assign(self, values: Array) -> None:
        """Replace the parameters' arrays; the old ones keep their values."""
        self.array = values.astype(self.dtype, copy=False)
        self.views = self._views(self.array)
        for p, view in zip(self.params, self.views, strict=True):
            p._data = view
        self.new = frozenset()

    def _views(self, array: Array) -> list[Array]:
        return [array[part].reshape(p._data.shape) for part, p in zip(self.slices, self.params, strict=True)]


def state_array(p: Tensor, name: str, value: Any) -> Array:
    """State of a parameter as an array in the precision of the update.

    Raises ValueError if it has another shape, TypeError if it holds no real numbers.
    """
    try:
        array = as_array(value)
    except ValueError as error:  # lists of different lengths
        raise ValueError(f"the state {name} of a parameter of shape {p.shape} is no array: {error}") from None
    if array.dtype.kind not in "fiub":
        raise TypeError(f"the state {name} of a parameter of shape {p.shape} has the dtype {array.dtype}")
    if array.shape != p.shape:
        raise ValueError(f"the state {name} of a parameter of shape {p.shape} has the shape {array.shape}")
    with np.errstate(over="ignore"):
        return array.astype(at_least_single(p.dtype), copy=False)


def joined(arrays: list[Array]) -> Array:
    """All elements in one flat array; a view of a single array."""
    return join(arrays) if len(arrays) > 1 else arrays[0].reshape(-1)
