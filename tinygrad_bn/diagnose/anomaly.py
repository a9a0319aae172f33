"""The first op that made a NaN or an infinity."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tinygrad_bn.backend import device_of, to_numpy
from tinygrad_bn.diagnose.seam import Call, Line, Place, Watcher, alone
from tinygrad_bn.hooks import listening
from tinygrad_bn.modes import recording
from tinygrad_bn.nn.paths import path_of
from tinygrad_bn.tensor import Op, Tensor
from tinygrad_bn.testing.diagnosis import names_of


@dataclass(frozen=True)
class Range:
    """An array in a few numbers: dtype, shape, the least and largest finite element, and how many are not finite."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    low: float
    high: float
    nans: int
    infs: int

    @classmethod
    def of(cls, name: str, array: Any) -> Range:
        """The range of an array of any device, or of a number."""
        values = to_numpy(array)
        finite = values[np.isfinite(values)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (math.nan, math.nan)
        nans, infs = int(np.isnan(values).sum()), int(np.isinf(values).sum())
        return cls(name, str(values.dtype), values.shape, low, high, nans, infs)

    def __str__(self) -> str:
        text = f"{self.name} {self.dtype} {self.shape}"
        if not math.isnan(self.low):
            text += f" from {self.low:.4g} to {self.high:.4g}"
        counts = [f"{n:,} {what}" for n, what in ((self.nans, "NaN"), (self.infs, "Inf")) if n]
        return text + (f", {' and '.join(counts)} of {math.prod(self.shape):,}" if counts else "")


@dataclass(frozen=True)
class Anomaly:
    """Where a NaN or an infinity comes from.

    `op` made it in the "forward" or "backward" pass; or, if `came_in`, it is the first that got it, from the samples or
    a parameter. `module` is the path of the module that called the op, "" outside of modules. `lines` are the lines of
    the caller's program that led there, the innermost last. `step` is the step of a fused op that made it, and `line`
    that step in the source of the composition.
    """

    kind: str  # "NaN" or "Inf"
    op: str
    phase: str  # "forward" or "backward"
    came_in: bool
    operands: tuple[Range, ...]
    result: Range
    module: str
    lines: tuple[Line, ...]
    line: Line | None
    step: Anomaly | None = None

    def __str__(self) -> str:
        made = f"{self.op} got {self.kind} that no op made" if self.came_in else f"{self.op} made {self.kind}"
        rows = [f"{made}, in the {self.phase} pass of {self.module or 'code outside of modules'}"]
        rows += [f"  operand  {operand}" for operand in self.operands] + [f"  result   {self.result}"]
        if self.step:
            rows.append(f"  its step {self.step.op}" + (f", {self.step.line}" if self.step.line else ""))
            rows += [f"    operand  {operand}" for operand in self.step.operands] + [f"    result   {self.step.result}"]
        elif self.line:
            rows.append(f"  at {self.line}")
        return "\n".join(rows + [f"  called in {line}" for line in self.lines])


class AnomalyError(FloatingPointError):
    """An op made a NaN or an infinity. `anomaly` says which, and where."""

    def __init__(self, anomaly: Anomaly) -> None:
        super().__init__(str(anomaly))
        self.anomaly = anomaly


class Watch(Watcher):
    """What `detect_anomaly` gives. `origin` is the first anomaly, None while there is none."""

    def __init__(self, stop: bool = True, forward: bool = True) -> None:
        self.origin: Anomaly | None = None
        self._stop, self._forward = stop, forward
        self._places: dict[int, tuple[Any, Place]] = {}  # of the results that are alive, by their identity

    # ---- what the seam reports --------------------------------------------------------------------------

    def saw(self, call: Call) -> None:
        if self.origin is not None:
            return
        place = call.place
        if place.node is not None and (known := self._place_of(place.node.output)):
            place = replace(place, modules=known.modules, outside=known.outside)
        for name, result in zip(("y", *call.op.saves), (call.result, *call.saved), strict=True):
            if self._forward and not place.recomputed and (kind := _kind([result])):
                given = [*call.arrays, *call.params.values()]
                self._judge(kind, given, call.op, call.arrays, call.params, (name, result), place)
            self._note(result, place)

    def saw_vjp(self, op: Op, g: Any, y: Any, arrays: Sequence[Any], params: dict[str, Any], gradients: Any) -> None:
        if self.origin is not None or gradients is NotImplemented:
            return
        place = replace(self._place_of(y) or Place(), backward=True)
        for name, gradient in zip(_names(op, arrays), gradients, strict=True):
            if gradient is not None and (kind := _kind([gradient])):
                self._judge(kind, [g, y, *arrays], op, arrays, params, (f"∂{name}", gradient), place, g)
            self._note(gradient, place)

    # ---- places of results ------------------------------------------------------------------------------

    def _note(self, array: Any, place: Place) -> None:
        key = id(array)
        if not place.recomputed:
            place = replace(place, node=None)  # which would keep the arrays of a graph alive
        if hasattr(array, "dtype") and not isinstance(array, np.generic):
            self._places[key] = weakref.ref(array, lambda _: self._places.pop(key, None)), place

    def _place_of(self, array: Any) -> Place | None:
        reference, place = self._places.get(id(array), (None, None))
        return place if reference is not None and reference() is array else None

    # ---- judging ----------------------------------------------------------------------------------------

    def _judge(
        self,
        kind: str,
        given: Sequence[Any],
        op: Op,
        arrays: Sequence[Any],
        params: dict[str, Any],
        result: tuple[str, Any],
        place: Place,
        g: Any = None,
    ) -> None:
        """Note an anomaly, unless an operand that an op made, or a number, is why the result is not finite."""
        before = _kind(given)
        came_in = kind == before == "NaN" and any(
            hasattr(a, "dtype") and _kind([a]) == "NaN" and self._place_of(a) is None for a in given
        )
        if before and not came_in and not (kind == "NaN" and before == "Inf"):
            return
        step = alone(_first_step, op, arrays, params, g) if op.fused and not came_in else None
        operands = self._ranges(op, arrays, place) + ((Range.of("g", g),) if g is not None else ())
        anomaly = Anomaly(
            kind, op.name, "backward" if place.backward else "forward", came_in, operands, Range.of(*result),
            path_of(place.modules), place.outside, place.inside, step,
        )  # fmt: skip
        if (node := place.node) is not None:  # a step of the gradient of another op
            anomaly = replace(
                anomaly, op=node.op.name, operands=self._ranges(node.op, node.arrays, place), step=anomaly
            )
        self.origin = anomaly
        if self._stop:
            raise AnomalyError(anomaly)

    def _ranges(self, op: Op, arrays: Sequence[Any], place: Place) -> tuple[Range, ...]:
        """The operands, each with its name and that of the parameter that it is."""
        keys = {id(t._data): f" = {key}" for key, t in (place.modules[0].named_tensors() if place.modules else ())}
        named = zip(_names(op, arrays), arrays, strict=True)
        return tuple(Range.of(name + keys.get(id(a), ""), a) for name, a in named if a is not None)


def _first_step(op: Op, arrays: Sequence[Any], params: dict[str, Any], g: Any) -> Anomaly | None:
    """The step of a fused op's composition that makes the anomaly; None if none of its steps does, but its kernel."""
    watch = Watch(stop=False, forward=g is None)
    with listening(watch), recording(g is not None):
        handles = [
            Tensor(a, requires_grad=g is not None and a.dtype.kind == "f") if hasattr(a, "dtype") else a for a in arrays
        ]
        y, _ = op.split(op.forward(*handles, **params))
        if g is not None:
            y.backward(Tensor(g))
    return watch.origin


def _names(op: Op, arrays: Sequence[Any]) -> list[str]:
    return [name.strip("'") for name in names_of(op.forward, len(arrays))]


def _kind(values: Sequence[Any]) -> str:
    """The first that holds: "NaN" if one of the values has a NaN, "Inf" if one has an infinity, ""."""
    found = ""
    for value in values:
        if isinstance(value, float) or (hasattr(value, "dtype") and value.dtype.kind == "f"):
            array = to_numpy(value) if device_of(value) != "cpu" else np.asarray(value)
            if not np.isfinite(array).all():
                if np.isnan(array).any():
                    return "NaN"
                found = "Inf"
    return found


@contextmanager
def detect_anomaly(*, stop: bool = True) -> Iterator[Watch]:
    """In this block, find the first op, forwards or backwards, that makes a NaN or an infinity.

    An op makes a NaN if none of its operands has one, and an infinity if all of its operands are finite. An infinity
    that is given as a number, as to mask scores, is no anomaly, but a NaN that it leads to is. For a fused op its
    composition runs again, to find the step. It works in `fit`, for derivatives of higher order, and on cuda.

    The cost: each result is read once more and the stack is walked, so a training step takes about twice as long where
    arrays are small, and a quarter longer where they are large. After the first anomaly nothing is looked at. Outside
    of the block there is no cost at all. What other threads do is not watched.

    Args:
        stop: raise `AnomalyError` at once. Otherwise the program goes on; the first anomaly is kept in `origin`, and
            becomes a note of a FloatingPointError that leaves the block, as `fit` raises it.

    >>> with detect_anomaly(stop=False) as watch:
    ...     y = (Tensor([1.0, -4.0]) * 2).log()
    >>> watch.origin.op, watch.origin.kind, str(watch.origin.operands[0])
    ('log', 'NaN', 'x float32 (2,) from -8 to 2')
    """
    watch = Watch(stop)
    try:
        with listening(watch):
            yield watch
    except FloatingPointError as error:
        if watch.origin is not None and not isinstance(error, AnomalyError):
            error.add_note(f"its origin: {watch.origin}")
        raise
