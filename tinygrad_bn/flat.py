"""Parameters laid out one after the other in flat arrays, so that an optimiser updates many in one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np

from tinygrad_bn.device import as_array, device_of, expect_one_device, full, join
from tinygrad_bn.tensor import Array, Tensor

State: TypeAlias = dict[str, Any]

# A parameter of so many elements is worth a call of its own; laying it beside others would only copy it.
LARGE = 1 << 16


class FlatParameters:
    """Some parameters, one after the other in one array, and their state likewise.

    Each parameter's array is a view of it, and whoever keeps one keeps them all; `np.array(p)` is a copy.
    """

    def __init__(self, params: list[Tensor], state: Mapping[Tensor, State], kept: Iterable[str]) -> None:
        self.params, self.states = params, [state[p] for p in params]
        self.stops = np.cumsum([p.size for p in params])[:-1].tolist()
        self.state = {  # always a copy, as it is written into
            name: join([state_array(p, name, state[p][name]) for p in params]) for name in kept
        }
        self.state_parts = {name: self._parts(array) for name, array in self.state.items()}
        for name, parts in self.state_parts.items():
            for p, part in zip(params, parts, strict=True):
                state[p][name] = part
        self.replace(_joined([p._data for p in params]))

    def holds(self, state: Mapping[Tensor, State], kept: Mapping[str, float]) -> bool:
        """Whether one call still updates them all, and this is their state: nobody has assigned another."""
        step, kind = self.states[0].get("step"), (self.whole.dtype, device_of(self.whole))
        if step is None or self.state.keys() != kept.keys():
            return False
        for i, (p, own) in enumerate(zip(self.params, self.states, strict=True)):
            if state.get(p) is not own or own.get("step") != step:
                return False
            if p._data is not self.parts[i] and (p.dtype, p.device) != kind:
                return False
            for name, parts in self.state_parts.items():
                if own.get(name) is not parts[i]:
                    return False
        return True

    def count(self) -> int:
        """One step more: its number, from 1 on."""
        for own in self.states:
            own["step"] += 1
        return int(self.states[0]["step"])

    def values(self) -> Array:
        """The parameters, in the precision of the update; gathered anew if somebody assigned to one."""
        if any(p._data is not part for p, part in zip(self.params, self.parts, strict=True)):
            self.replace(_joined([p._data for p in self.params]))
        return self.whole.astype(wide(self.whole.dtype), copy=False)

    def gradients(self, gradients: Mapping[Tensor, Array]) -> Array:
        """Those of these parameters, in the precision of the update."""
        expect_one_device((self.whole, *self.state.values()))
        joined = _joined([gradients[p] for p in self.params])
        return joined.astype(wide(self.whole.dtype), copy=False)

    def replace(self, whole: Array) -> None:
        """Give the parameters new values."""
        self.whole = whole.astype(self.params[0].dtype, copy=False)
        self.parts = self._parts(self.whole)
        for p, part in zip(self.params, self.parts, strict=True):
            p._data = part

    def _parts(self, whole: Array) -> list[Array]:
        bounds = zip([0, *self.stops], [*self.stops, whole.size], self.params, strict=True)
        return [whole[start:stop].reshape(p._data.shape) for start, stop, p in bounds]


def lay_out(params: Iterable[Tensor], state: dict[Tensor, State], kept: Mapping[str, float]) -> list[FlatParameters]:
    """The parameters by what one call can update, with their state, or a first one: `kept` says what it is full of."""
    alike: dict[tuple[Any, ...], list[Tensor]] = {}
    for p in params:
        own = state.setdefault(p, {})
        own.setdefault("step", 0)
        for name, first in kept.items():
            if name not in own:
                own[name] = full(p.shape, first, wide(p.dtype), p.device)
        alone = id(p) if p.size >= LARGE else None
        alike.setdefault((p.dtype, own["step"], p.device, alone), []).append(p)
    return [FlatParameters(some, state, kept) for some in alike.values()]


def state_array(p: Tensor, name: str, value: Any) -> Array:
    """State of a parameter as an array in the precision of the update. Raises ValueError if it has another shape."""
    array = as_array(value).astype(wide(p.dtype), copy=False)
    if array.shape != p.shape:
        raise ValueError(f"the state {name} of a parameter of shape {p.shape} has the shape {array.shape}")
    return array


def wide(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The precision that parameters of `dtype` are updated in: half could not hold squares, nor an eps."""
    return np.result_type(dtype, np.float32)


def _joined(arrays: list[Array]) -> Array:
    return join(arrays) if len(arrays) > 1 else arrays[0].reshape(-1)
