"""`vmap`: a function of one sample becomes one of many, and each of its ops runs once, on the whole batch.

A function under `vmap` sees tensors of one sample (`Batched`). An op on them runs once on the tensors behind, whose
first axis is the batch: `batching_rules` says how. These are ordinary tensors with an ordinary graph, so derivatives
around vmap need nothing more. Derivatives inside of it are those of the tensors behind: a sample depends on itself
alone, so the gradient of the sum over the batch is the gradient of each sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import wraps
from typing import Any, ClassVar, NoReturn

import numpy as np

from tinygrad_bn import autograd, backend
from tinygrad_bn.arguments import expect_integer, full_name, shown
from tinygrad_bn.batching_rules import REFUSED, rule_of
from tinygrad_bn.captured.nests import mapped
from tinygrad_bn.hooks import listening
from tinygrad_bn.modes import COMPOSED, call_recording
from tinygrad_bn.ops import broadcast_to, transpose
from tinygrad_bn.standin import StandIn
from tinygrad_bn.tensor import Op, Tensor

_levels: ContextVar[tuple[Level, ...]] = ContextVar("levels", default=())


class Level:
    """One call of a function under `vmap`, which listens to every op in it."""

    def __init__(self, size: int) -> None:
        self.size = size

    def apply(self, run: Callable[..., Any], op: Op, operands: Sequence[Any], params: dict[str, Any]) -> Any:
        """Run an op once for all samples, if one of its operands is batched here; otherwise as it is."""
        if not any(self.holds(o) for o in (*operands, *_parts(params.get("index")))):
            return run(op, operands, params)
        operands = [Tensor(o) if isinstance(o, list | tuple) else o for o in operands]
        rule = None if op.fused and COMPOSED.get() else rule_of(op)
        if rule is None and not op.fused:
            cure = REFUSED.get(op.name, "call the function once for each sample")
            raise NotImplementedError(f"vmap has no rule for the op {op.name!r}: {cure}")
        if rule is None:
            y, saved = op.split(op.forward(*operands, **params))
            return y, saved
        y, saved = rule(self, op, operands, params)
        return Batched(y, self), [Batched(s, self) for s in saved]

    def holds(self, x: object) -> bool:
        """Whether x has a value for each sample of this call."""
        return isinstance(x, Batched) and x.level is self

    def full(self, x: Any) -> Any:
        """The values for all samples, (B, *shape), of a tensor or an array; repeated if they are all the same."""
        if self.holds(x):
            return x.value
        return broadcast_to(x if isinstance(x, Tensor) else Tensor(x), shape=(self.size, *x.shape))


def _parts(index: object) -> Sequence[Any]:
    return index if isinstance(index, tuple) else (index,)


class Batched(StandIn):
    """A tensor of one sample under `vmap`. Behind it is `value`, whose first axis is that of the samples."""

    __slots__ = ("level",)
    unreadable: ClassVar = (
        TypeError,
        "under vmap a tensor has a value for each sample, so Python cannot read it or branch on it; use "
        "functional.where(condition, a, b), or return the tensor",
    )

    def __init__(self, value: Tensor, level: Level) -> None:
        self.value, self.level = value if isinstance(value, Tensor) else Tensor(value), level
        self.grad, self._retains_grad = None, False

    @property
    def _data(self) -> Any:  # type: ignore[override]
        """Compositions read values as constants: a tensor that has no graph stands for the array."""
        if self.level not in _levels.get():
            raise RuntimeError("a tensor of a function under vmap was used after the call; return it from the function")
        return self.detach()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape[1:]

    @property
    def _requires_grad(self) -> bool:  # type: ignore[override]
        return self.value.requires_grad

    @property
    def node(self) -> Any:  # type: ignore[override]
        raise RuntimeError("inside vmap, differentiate with tinygrad_bn.transforms: grad, vjp or jvp")

    @property
    def is_leaf(self) -> bool:
        """False: an update of it makes a new tensor."""
        return False

    def register_hook(self, *_: Any) -> NoReturn:
        """Hooks and kept gradients would belong to the tensors of all samples."""
        raise NotImplementedError("under vmap a tensor has no hooks and keeps no gradient; ask tensors outside of it")

    retain_grad = register_hook

    def detach(self) -> Tensor:
        return Batched(self.value.detach(), self.level)

    def __repr__(self) -> str:
        return f"Tensor(shape={self.shape}, dtype={self.dtype}, under vmap of {self.level.size})"


# ---- the transformation ---------------------------------------------------------------------------------


def vmap(function: Callable[..., Any], in_axes: Any = 0, out_axes: Any = 0) -> Callable[..., Any]:
    """A function of batches from a function of one sample; each op runs once, on the whole batch.

    Inside, tensors have the shape of one sample. It composes with the other transformations in any order: `vmap` of
    `grad` gives the gradient of each sample.

    Args:
        function: of tensors, or of nests of tensors in tuples, lists and dictionaries; it returns the same. Arguments
            by keyword are the same for all samples.
        in_axes: which axis of each argument is that of the samples; None for an argument that is the same for all.
            One for all arguments; or one for each, in a tuple, and in the form of the argument if that is a nest.
        out_axes: where that axis is to be in the results; one for all, or in the form of the results.

    Raises, when called:
        ValueError: the numbers of samples differ; there are none; or axes that do not fit.
        NotImplementedError: an op has no rule for batches, such as dropout; the error names it. An op of your own that
            is not fused runs once for each sample.
        TypeError: Python reads a value of a sample, as in `if x > 0`; or a result is no tensor.

    >>> from tinygrad_bn.transforms import grad
    >>> x = np.array([[1.0, 2.0], [3.0, 4.0]])
    >>> vmap(grad(lambda x: (x * x).sum()))(x).numpy().tolist()
    [[2.0, 4.0], [6.0, 8.0]]
    """

    @wraps(function)
    def batched(*args: Any, **options: Any) -> Any:
        if isinstance(in_axes, list):
            raise TypeError(f"in_axes of several arguments is a tuple; got the list {shown(in_axes)}")
        axes = in_axes if type(in_axes) is tuple else (in_axes,) * len(args)
        if len(axes) != len(args):
            raise ValueError(f"in_axes has {len(axes)} axes for {len(args)} arguments")
        given: list[tuple[str, Tensor]] = []
        level = Level(0)

        def first(x: Any, axis: Any, name: str) -> Any:
            if axis is None:
                return x
            x = x if isinstance(x, Tensor) else Tensor(x)
            given.append((name, moved := _moved(x, axis, 0, f"{name} of shape {x.shape}")))
            return Batched(moved, level)

        inside = [_zipped(first, x, axis, f"argument {i}") for i, (x, axis) in enumerate(zip(args, axes, strict=True))]
        if not given:
            raise ValueError("vmap needs an argument with an axis of samples; in_axes has None for all")
        if len({len(x) for _, x in given}) > 1:
            raise ValueError(f"the numbers of samples differ: {', '.join(f'{n} has {len(x)}' for n, x in given)}")
        level.size = len(given[0][1])
        before = _levels.set((*_levels.get(), level))
        try:
            with listening(level):
                result = function(*inside, **options)
                return _zipped(lambda y, axis, name: _result(y, axis, name, level), result, out_axes, "a result")
        finally:
            _levels.reset(before)

    return batched


def _result(y: Any, axis: Any, name: str, level: Level) -> Tensor:
    y = Tensor(y) if isinstance(y, np.ndarray) else y
    if not isinstance(y, Tensor):
        raise TypeError(f"a function under vmap has to return tensors; it returned {full_name(y)}")
    if axis is None:
        if level.holds(y):
            raise ValueError(f"{name} differs from sample to sample, so out_axes cannot be None")
        return y
    return _moved(level.full(y), 0, axis, f"{name} of shape {y.shape}, with that of the samples")


def _zipped(function: Callable[[Any, Any, str], Any], nest: Any, axes: Any, name: str) -> Any:
    """The nest with `function` of each leaf and its axis, where `axes` is one for all or has the form of the nest."""
    if not isinstance(axes, tuple | list | dict):
        return mapped(lambda x: function(x, axes, name), nest)
    keys: Any = axes.keys() if isinstance(axes, dict) else range(len(axes))
    own: Any = nest.keys() if isinstance(nest, dict) else range(len(nest)) if isinstance(nest, tuple | list) else None
    if type(axes) is not type(nest) or keys != own:
        raise ValueError(f"axes {shown(axes)} do not have the form of {name}")
    if isinstance(axes, dict):
        return {k: _zipped(function, nest[k], axis, f"{name}[{k!r}]") for k, axis in axes.items()}
    pairs = zip(nest, axes, strict=True)
    parts = [_zipped(function, x, axis, f"{name}[{i}]") for i, (x, axis) in enumerate(pairs)]
    return type(nest)(*parts) if hasattr(nest, "_fields") else type(nest)(parts)


def _moved(x: Tensor, start: Any, stop: Any, name: str) -> Tensor:
    """x with the axis `start` at `stop`; one of the two is 0."""
    places = [expect_integer("an axis of samples", axis) for axis in (start, stop)]
    if any(not -x.ndim <= p < x.ndim for p in places):
        raise ValueError(f"{name} has no axis {places[0] or places[1]}" if x.ndim else f"{name} has no axis of samples")
    source, target = (p % x.ndim for p in places)
    if source == target:
        return x
    order = [i for i in range(x.ndim) if i != source]
    order.insert(target, source)
    y: Tensor = transpose(x, axes=tuple(order))
    return y


# ---- derivatives inside of it ---------------------------------------------------------------------------


def levels_of(x: Tensor) -> list[Level]:
    """The calls that x has values for each sample of, the outermost first."""
    found: list[Level] = []
    while isinstance(x, Batched):
        found.append(x.level)
        x = x.value
    return found[::-1]


def behind(x: Tensor) -> Tensor:
    """The ordinary tensor behind a batched one; any other tensor itself."""
    while isinstance(x, Batched):
        x = x.value
    return x


def leaf(x: Tensor) -> Tensor:
    """A tensor to differentiate by, of its own for each sample of every call that is going on."""
    return Batched(leaf(x.value), x.level) if isinstance(x, Batched) else Tensor(x, requires_grad=True)


def spread(x: Tensor) -> Tensor:
    """The tensor, with a value for each sample of every call that is going on."""
    return _spread(x, _levels.get())


def _spread(x: Tensor, levels: Sequence[Level]) -> Tensor:
    if not levels:
        return x
    *outer, last = levels
    if last.holds(x):
        return Batched(_spread(x.value, outer), last)  # type: ignore[attr-defined]
    inner = _spread(x, outer)
    return Batched(broadcast_to(inner, shape=(last.size, *inner.shape)), last)


def unwrapped(x: Tensor, levels: Sequence[Level]) -> Tensor:
    """x without these calls: their samples are its first axes. It stays batched in calls inside of them."""
    if isinstance(x, Batched) and x.level not in levels:
        inside = unwrapped(x.value, levels)
        return Batched(_moved(inside, len(levels), 0, "x"), x.level)
    x = _spread(x, levels)
    for _ in levels:
        x = x.value  # type: ignore[attr-defined]
    return x


def wrapped(x: Tensor, levels: Sequence[Level]) -> Tensor:
    """The reverse of `unwrapped`."""
    if isinstance(x, Batched) and x.level not in levels:
        return Batched(wrapped(_moved(x.value, 0, len(levels), "x"), levels), x.level)
    for level in levels:
        x = Batched(x, level)
    return x


def gradients(y: Tensor, xs: Sequence[Tensor], g: Tensor, create_graph: bool) -> Sequence[Tensor]:
    """`autograd.grad` of tensors that may be batched: each of `xs` in the same calls, `y` in some of them."""
    levels = levels_of(xs[0])
    values, (cotangent, result) = [unwrapped(x, levels) for x in xs], (unwrapped(t, levels) for t in (g, y))
    if isinstance(cotangent, Batched):
        pulled = pulled_back(result, values, cotangent, create_graph)
    else:
        pulled = autograd.grad(result, values, cotangent, create_graph)
    return [wrapped(p, levels) for p in pulled]


def pulled_back(
    y: Tensor, xs: Sequence[Tensor], g: Tensor, create_graph: bool, stop: Sequence[Tensor] = ()
) -> list[Tensor]:
    """The gradients of `xs`, by a walk that ends at the tensors of `stop`; g may be batched, as a row of a Jacobian."""
    tensors = create_graph or isinstance(g, Batched)  # the rules run on tensors
    order = autograd._topological(y, stop)
    found = call_recording(tensors, autograd._backprop, y, g, order, xs, tensors)
    pulled = [found[x] if x in found else backend.full(x._data, 0) for x in xs]
    pulled = [p if isinstance(p, Tensor) else Tensor._of(p) for p in pulled]
    return pulled if create_graph else [p.detach() for p in pulled]
