"""The chain rule, and nothing else.

An `Op` has a forward on arrays and one gradient rule per operand. `apply` runs it and leaves a `Node` on the
result: which op, on which operands. `backward` and `grad` walk the nodes from the result to the leaves.

Rules are written in arithmetic that arrays and tensors share. In a plain backward pass they get arrays, so no
tensor is built; with `create_graph` they get tensors, so that the gradient has a graph of its own.
"""

from __future__ import annotations

import operator
import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ContextDecorator, contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass
from functools import cached_property, wraps
from inspect import Parameter, signature
from typing import Any, ParamSpec, Self, TypeAlias, overload

import numpy as np

from tinygrad_bn.device import as_array, device_of, expect_one_device, find_kernel, full, has_own_memory
from tinygrad_bn.sample import Sample
from tinygrad_bn.tensor import Array, Axis, Tensor

P = ParamSpec("P")
Operand: TypeAlias = Any  # a Tensor, an array or a number; a Tensor comes out, or an array if no operand is a Tensor
Rule: TypeAlias = Callable[..., Any]

OPS: dict[str, Op] = {}

# What is a tensor to an op, or is made one: the arithmetic of a matrix, for one, is not that of arrays.
TENSORS = Tensor, list, tuple, np.matrix, np.ma.MaskedArray

_recording: ContextVar[bool] = ContextVar("recording", default=True)
_debugging: ContextVar[bool] = ContextVar("debugging", default=False)


# ---- declaring ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Op:
    """A primitive or fused operation, as `primitive` declares it."""

    name: str
    forward: Callable[..., Array]  # arrays to array, in NumPy: the reference on every device
    rules: tuple[Rule | None, ...]  # one per operand: (g, y, *operands, **params) to its gradient
    each: Rule | None  # or, for any number of operands, one rule that is told which: (i, g, y, *operands)
    fuses: Callable[..., Any] | None  # or the composition that this op computes in one go
    saves: tuple[str, ...]  # what a fused forward gives beside its result, by the names its `.vjp` takes them under
    formula: str
    sample: Sample

    @cached_property
    def differentiable(self) -> bool:
        return bool(self.each or self.fuses or any(self.rules))

    @cached_property
    def vjp(self) -> str:
        """The name of the kernel that may compute the gradients."""
        return f"{self.name}.vjp"


def primitive(
    *rules: Rule | None,
    formula: str,
    sample: Sample,
    each: Rule | None = None,
    fuses: Callable[..., Any] | None = None,
    saves: tuple[str, ...] = (),
) -> Callable[[Callable[P, Any]], Callable[P, Tensor]]:
    """Declare an op: the decorated function is its forward, from arrays to an array.

    Args:
        rules: the gradient for each operand, `(g, y, *operands, **params) -> gradient`, in arithmetic on
            tensors; None where the op is not differentiable. Sums over broadcast axes, casts and
            accumulation are the engine's work, not the rule's.
        formula: the op in symbols, for people.
        sample: what the tests feed the op; see `tinygrad_bn.sample`.
        each: instead of `rules`, for ops of any number of operands: `(i, g, y, *operands, **params)`.
        fuses: instead of `rules`: the composition that defines this op. Its gradients, of every order, are
            the composition's; a kernel `NAME.vjp` may compute the first order faster.
        saves: names of constants that a fused forward gives after its result, `(y, *saved)`. `run` gives them too, and
            the kernel `NAME.vjp` gets them by name; no composition sees them, as they are constants.

    Raises:
        ValueError: an op of this name exists, the function has no name, there is not one rule for each operand, or
            it is not exactly one of `rules`, `each` and `fuses`.
    """
    if sum(map(bool, (rules, each, fuses))) != 1:
        raise ValueError("an op needs exactly one of: a rule for each operand, `each`, or `fuses`")

    def register(forward: Callable[P, Any]) -> Callable[P, Tensor]:
        name = forward.__name__
        if name in OPS or not name.isidentifier():
            raise ValueError(f"{name!r} is no name for an op" + " as there is one already" * (name in OPS))
        parameters = signature(forward).parameters.values()
        count = len([p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)])
        if rules and len(rules) != count:
            raise ValueError(f"{name!r} has {count} operands and {len(rules)} rules; give None for no gradient")
        op = OPS[name] = Op(name, forward, rules, each, fuses, saves, formula, sample)
        options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        defaults = {option: default for option, default in options.items() if default is not Parameter.empty}

        @wraps(forward)
        def call(*operands: Any, **params: Any) -> Any:
            if 0 < count < len(operands):
                given = dict(zip(options, operands[count:], strict=False))  # such as axis in sum(x, 0)
                if len(operands) == count + len(given) and not given.keys() & params.keys():
                    operands, params = operands[:count], {**given, **params}
            if (count and len(operands) != count) or (params and not params.keys() <= options.keys()):
                by_name = ", ".join(options) or "nothing"
                raise TypeError(f"{name}() takes {count or 'its'} operands by position, and by name: {by_name}")
            for option, value in params.items():
                if isinstance(value, Tensor):
                    raise TypeError(f"{name}(): {option} is an option and gets no gradient; pass a number (.item())")
            if "axis" in params:
                params["axis"] = _plain_axis(name, params["axis"])
            return run(op, operands, {**defaults, **params} if params else defaults)[0]

        call.__doc__ = f"{forward.__doc__}\n\n{formula}"
        return call

    return register


def _plain_axis(name: str, axis: Any) -> Axis:
    """An axis, or several, as Python's integers; any other kind of integers is not known to kernels."""
    if axis is None or type(axis) is int:
        return axis
    given = axis if isinstance(axis, tuple) else (axis,)
    if all(type(a) is int for a in given):
        return axis
    if any(isinstance(a, bool | np.bool_) or not hasattr(a, "__index__") or np.ndim(a) for a in given):
        raise TypeError(f"{name}(): axis is an integer, a tuple of integers, or None; got {axis!r}")
    plain = tuple(map(operator.index, given))
    return plain if isinstance(axis, tuple) else plain[0]


# ---- recording ------------------------------------------------------------------------------------------


@dataclass(eq=False, slots=True)
class Node:
    """How a tensor was computed: the op, its operands, and the arrays that the forward pass saw."""

    op: Op
    inputs: Sequence[Any]  # Tensors, and Python's numbers
    needs: Sequence[bool]  # which of them required a gradient at the time; thawing one later does not count
    arrays: Sequence[Any]
    output: Array
    saved: tuple[Any, ...]
    params: dict[str, Any]
    caller: str | None  # where the op was called, in debug mode

    def free(self) -> None:
        self.inputs = self.needs = self.arrays = self.saved = ()
        self.params = {}


class recording(ContextDecorator):
    """Remember, or do not, how tensors are computed in this block, or in a decorated function.

    A class, as a generator would take three times as long to enter and leave, for every backward pass.
    """

    def __init__(self, on: bool) -> None:
        self.on, self.tokens = on, list[Token[bool]]()  # several, if it is entered again inside itself

    def __enter__(self) -> None:
        self.tokens.append(_recording.set(self.on))

    def __exit__(self, *error: object) -> None:
        _recording.reset(self.tokens.pop())

    def _recreate_cm(self) -> Self:
        return type(self)(self.on)  # contextlib asks for one at each call of a decorated function: threads share none


def is_recording() -> bool:
    """Whether ops remember how their results were computed."""
    return _recording.get()


def no_grad() -> recording:
    """Inside `with no_grad():`, or a function under `@no_grad()`, no graph is built, and `+=` changes a tensor."""
    return recording(False)


@contextmanager
def debug() -> Iterator[None]:
    """Inside this block every op remembers where it was called, and an error in its backward pass says so."""
    token = _debugging.set(True)
    try:
        yield
    finally:
        _debugging.reset(token)


def apply(op: Op, operands: Sequence[Any], params: dict[str, Any]) -> Any:
    """The result of `run`, without what it saves."""
    return run(op, operands, params)[0]


def run(op: Op, operands: Sequence[Any], params: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    """Run `op` and, if one of its operands requires a gradient, remember how on the result."""
    for o in operands:
        if type(o) is not np.ndarray and isinstance(o, TENSORS):  # the type is asked for first as it takes a tenth
            break
    else:
        return _execute(op, operands, params)
    inputs = [o if isinstance(o, Tensor) else _constant(o) for o in operands]
    arrays = [o._data if isinstance(o, Tensor) else o for o in inputs]
    result, saved = _execute(op, arrays, params)
    y = Tensor._of(as_array(result))
    if _recording.get() and op.differentiable and y._data.dtype.kind == "f":
        needs = [isinstance(o, Tensor) and o._requires_grad for o in inputs]
        if True in needs:
            caller = _caller() if _debugging.get() else None
            y._requires_grad, y.node = True, Node(op, inputs, needs, arrays, y._data, saved, params, caller)
    return y, saved


def _constant(operand: Any) -> Any:
    """Numbers stay Python numbers, which take the dtype of the other operand; anything else is copied in."""
    if isinstance(operand, np.generic) and operand.dtype.kind in "fiub":
        return operand.item()
    return operand if isinstance(operand, bool | int | float) else Tensor(operand)


def _caller() -> str:
    """The innermost lines of the program outside this package."""
    frames = [f for f in traceback.extract_stack() if not f.filename.startswith(os.path.dirname(__file__))]
    return "".join(traceback.format_list(frames[-2:]))


def _execute(op: Op, arrays: Sequence[Any], params: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    kernel = _kernel(op.name, arrays)
    try:
        result = NotImplemented if kernel is None else kernel(*arrays, **params)
        if result is NotImplemented:
            result = op.forward(*arrays, **params)
        return (result[0], tuple(result[1:])) if op.saves else (result, ())
    except (IndexError, ValueError, TypeError, AttributeError) as error:
        expect_one_device(arrays)
        kind = next(k for k in (IndexError, ValueError, TypeError, AttributeError) if isinstance(error, k))
        raise kind(f"{describe(op, arrays, params)}: {error}") from error


def _kernel(name: str, arrays: Sequence[Any]) -> Any:
    """The kernel for these operands, if there is one: numbers, lists and exotic dtypes are the reference's."""
    first = arrays[0] if arrays else None
    if isinstance(first, np.ndarray):
        return find_kernel(name, "cpu") if first.dtype.isnative and first.dtype.char != "g" else None
    for other in arrays:
        if (device := device_of(other)) != "cpu":
            return find_kernel(name, device)
    return None


def describe(op: Op, operands: Iterable[Any], params: dict[str, Any]) -> str:
    """A call in words: `sum(float32 (3, 4), axis=5)`."""
    words = [f"{_place(o)}{o.dtype} {o.shape}" if hasattr(o, "dtype") else repr(o) for o in operands]
    return f"{op.name}({', '.join(words + [f'{k}={v!r}' for k, v in params.items()])})"


def _place(operand: Any) -> str:
    device = device_of(operand)
    return "" if device == "cpu" else f"{device} "


# ---- differentiating ------------------------------------------------------------------------------------


def backward(y: Tensor, g: object = None, *, retain_graph: bool | None = None, create_graph: bool = False) -> None:
    """See `Tensor.backward`."""
    cotangent = _cotangent(y, g)
    order = _topological(y)
    wanted = [t for t in order if (t.node is None and t._requires_grad) or t._retains_grad]
    keep = create_graph if retain_graph is None else retain_graph
    with recording(create_graph):
        grads = _backprop(y, cotangent, order, wanted, create_graph, free=not keep)
        for t, gt in _separate({t: grads[t] for t in wanted if t in grads}, cotangent).items():
            t.grad = gt if t.grad is None else t.grad + gt


@overload
def grad(y: Tensor, xs: Tensor, g: object = None, create_graph: bool = False) -> Tensor: ...
@overload
def grad(y: Tensor, xs: Sequence[Tensor], g: object = None, create_graph: bool = False) -> list[Tensor]: ...
def grad(
    y: Tensor, xs: Tensor | Sequence[Tensor], g: object = None, create_graph: bool = False
) -> Tensor | list[Tensor]:
    """The vector-Jacobian product g · ∂y/∂x for each x of `xs`; no tensor's `grad` is touched.

    The graph stays, as long as `y` does. Only what lies between `y` and `xs` is computed.

    Args:
        y: the tensor to differentiate.
        xs: the tensors to differentiate by, at any place of the graph; one tensor gives one gradient.
        g: the cotangent, of `y`'s shape; may be left out (one) if `y` has one element.
        create_graph: make the gradients differentiable themselves, for derivatives of higher order.

    Returns:
        The gradient of each x, in its shape and dtype; zeros for an x that `y` does not depend on.

    Raises:
        RuntimeError: `y`, or one of `xs`, does not require a gradient; or see `Tensor.backward`.
        TypeError: `y` or one of `xs` is no tensor.
        ValueError: `g` is missing or has the wrong shape.

    >>> x = Tensor(3.0, requires_grad=True)
    >>> dx = grad(x**4, x, create_graph=True)
    >>> dx.item(), grad(dx, x).item()
    (108.0, 108.0)
    """
    wanted = [xs] if isinstance(xs, Tensor) else list(xs)
    if not all(isinstance(t, Tensor) for t in (y, *wanted)):
        raise TypeError("grad() differentiates a tensor by tensors")
    for i, x in enumerate(wanted):
        if not x.requires_grad:
            raise RuntimeError(f"xs[{i}], of shape {x.shape}, does not require a gradient")
    cotangent = _cotangent(y, g)
    with recording(create_graph):
        grads = _separate(_backprop(y, cotangent, _topological(y), wanted, create_graph), cotangent)
    out = [grads[x] if x in grads else Tensor._of(full(x.shape, 0, x.dtype, x.device)) for x in wanted]
    return out[0] if isinstance(xs, Tensor) else out


def _separate(grads: dict[Tensor, Any], cotangent: Tensor) -> dict[Tensor, Tensor]:
    """The gradients as tensors that share no memory with each other or with the cotangent."""
    out: dict[Tensor, Tensor] = {}
    taken = {id(cotangent._data)}
    for t, g in grads.items():
        gt = _to_tensor(g)
        if not has_own_memory(gt._data) or id(gt._data) in taken:
            gt = gt + 0 if gt._requires_grad else Tensor(gt)
        taken.add(id(gt._data))
        out[t] = gt
    return out


def _cotangent(y: Tensor, g: object) -> Tensor:
    if not y.requires_grad:
        raise RuntimeError(
            f"this tensor of shape {y.shape} has no gradient to give: nothing it was computed from has "
            "requires_grad=True, or it was computed under no_grad()"
        )
    if g is None:
        if y.size != 1:
            raise ValueError(f"a tensor of shape {y.shape} needs a cotangent g of that shape; only a scalar has one")
        return Tensor._of(full(y.shape, 1, y.dtype, y.device))
    g = g if isinstance(g, Tensor) else Tensor(g)
    if g.shape != y.shape:
        raise ValueError(f"the cotangent has shape {g.shape}, the tensor {y.shape}; they must be equal")
    expect_one_device((y._data, g._data))
    return g if g.dtype == y.dtype else g.astype(y.dtype)


def _topological(y: Tensor, stop: Iterable[Tensor] = ()) -> list[Tensor]:
    """What `y` was computed from, operands first, `y` last; not looking behind `stop`.

    Iterative, since a graph may be far deeper than Python's stack. A tensor must come after everything that uses
    it: had `b = a + a; c = b + b` been walked in any other order, `b` would pass on only half of its gradient.
    """
    order: list[Tensor] = []
    seen = set(stop)
    todo = [(y, False)]
    while todo:
        t, finished = todo.pop()
        if finished:
            order.append(t)
        elif t not in seen:
            seen.add(t)
            if t.node is None:
                order.append(t)
                continue
            if not t.node.inputs:
                raise RuntimeError(
                    f"the graph behind this result of {t.node.op.name!r} was freed by an earlier backward(); "
                    "call that one with retain_graph=True to walk it again"
                )
            todo.append((t, True))
            for x, need in zip(t.node.inputs, t.node.needs, strict=True):
                if need and x not in seen:
                    todo.append((x, False))
    return order


def _backprop(
    y: Tensor, g: Tensor, order: list[Tensor], wanted: Iterable[Tensor], create_graph: bool, free: bool = False
) -> dict[Tensor, Any]:
    """The gradient of every wanted tensor: arrays, or tensors with `create_graph`. Eats up `order`.

    To be called while `recording(create_graph)`.
    """
    wanted = set(wanted)
    leads = set(wanted)  # the tensors on a way from y to something wanted
    for t in order:
        if (node := t.node) is not None:
            for x, need in zip(node.inputs, node.needs, strict=True):
                if need and x in leads:
                    leads.add(t)
                    _expect_unchanged(t, node)  # before anything is computed, or freed
                    break
    grads: dict[Tensor, Any] = {y: g if create_graph else g._data}
    while order:
        t = order.pop()
        if (node := t.node) is None or t not in leads or t not in grads:
            continue
        gt = grads[t] if t in wanted else grads.pop(t)
        needs = [need and x._requires_grad and x in leads for x, need in zip(node.inputs, node.needs, strict=True)]
        if True in needs:
            try:
                gxs = _pull(t, node, gt, needs, create_graph)
            except Exception as error:
                _add_notes(error, node)
                raise
            for x, gx in zip(node.inputs, gxs, strict=True):
                if gx is not None:
                    gx = _fit(gx, x)
                    grads[x] = grads[x] + gx if x in grads else gx
        leads.discard(t)  # so that it can go, with its array, as soon as its gradient has been passed on
        if free:
            node.free()
    return {t: grads[t] for t in wanted if t in grads}


def _fit(gx: Any, x: Tensor) -> Any:
    """Undo what broadcasting and promotion did to the operand `x`: its gradient gets its shape and dtype."""
    if type(gx) is not np.ndarray and not isinstance(gx, Tensor):
        gx = as_array(gx)
    if gx.shape != x._data.shape:
        gx = apply(OPS["sum_to"], (gx,), {"shape": x.shape})
    return gx if gx.dtype == x._data.dtype else gx.astype(x.dtype)


def _to_tensor(g: Any) -> Tensor:
    return g if isinstance(g, Tensor) else Tensor._of(as_array(g))


def _expect_unchanged(t: Tensor, node: Node) -> None:
    for x, seen in ((t, node.output), *zip(node.inputs, node.arrays, strict=True)):
        if x is not seen and x._data is not seen:  # a number is its own array
            error = RuntimeError(
                f"{node.op.name!r} needs a tensor of shape {x.shape} for its backward pass, and that was changed "
                "(by an update, +=, or an assignment to data) since the forward pass; call backward() first"
            )
            _add_notes(error, node)
            raise error


def _add_notes(error: Exception, node: Node) -> None:
    """Tell of the op and, in debug mode, of its place in the program."""
    error.add_note(f"in the backward pass of {describe(node.op, node.arrays, node.params)}")
    if node.caller:
        error.add_note(f"whose forward pass was called here:\n{node.caller}")


def _pull(t: Tensor, node: Node, g: Any, needs: list[bool], create_graph: bool) -> Sequence[Any]:
    """One step back from `t`: for each operand of its op the gradient, or None where none is needed."""
    op, params = node.op, node.params
    fast = None if create_graph else _kernel(op.vjp, node.arrays)
    if fast:  # nobody will differentiate this gradient
        saved = dict(zip(op.saves, node.saved, strict=True)) if op.saves else {}
        gxs = fast(g, t._data, *node.arrays, needs=needs, **params, **saved)
        if gxs is not NotImplemented:
            return [gx if need else None for gx, need in zip(gxs, needs, strict=True)]
    if op.fuses:
        return _pull_composition(op.fuses, g, node.inputs, needs, params, create_graph)
    y, xs = (t, node.inputs) if create_graph else (t._data, node.arrays)
    if op.each:
        return [op.each(i, g, y, *xs, **params) if need else None for i, need in enumerate(needs)]
    return [rule(g, y, *xs, **params) if rule and need else None for rule, need in zip(op.rules, needs, strict=True)]


def _pull_composition(
    composition: Callable[..., Tensor],
    g: Any,
    xs: Sequence[Any],
    needs: list[bool],
    params: dict[str, Any],
    create_graph: bool,
) -> list[Any]:
    """Differentiate what a fused op fuses, with respect to handles of its operands.

    Each operand gets a handle of its own, and the walk ends there. Otherwise a tensor passed twice, or a weight
    computed from x, would be counted twice.
    """
    with recording(True):
        handles = [apply(OPS["reshape"], (x,), {"shape": x.shape}) if isinstance(x, Tensor) else x for x in xs]
        y = composition(*handles, **params)
    inside = [h for h, need in zip(handles, needs, strict=True) if need]
    order = _topological(y, stop=(h for h in handles if isinstance(h, Tensor)))
    grads = _backprop(y, _to_tensor(g), order, inside, create_graph)
    return [grads.get(h) if need else None for h, need in zip(handles, needs, strict=True)]
