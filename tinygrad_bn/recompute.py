"""Results that are computed again in the backward pass instead of being kept (Chen et al. 2016)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinygrad_bn import backend
from tinygrad_bn.arguments import full_name
from tinygrad_bn.batching import Batched, pulled_back
from tinygrad_bn.hooks import listening
from tinygrad_bn.modes import is_recording, recording, repeating
from tinygrad_bn.ops import reshape
from tinygrad_bn.random import drawing, drawn_again
from tinygrad_bn.tensor import Node, Op, Tensor


@dataclass(eq=False)
class _Recomputed(Op):
    """An op whose gradients are those of a function that runs again."""

    part: Callable[..., Tensor] = lambda *_: Tensor(0)
    given: Sequence[bool] = ()  # whether each operand that the function is given was a tensor
    read: Sequence[Tensor] = ()  # the other operands, which it reads from elsewhere
    keys: Sequence[int] = ()

    def pull(self, g: Any, y: Any, xs: Sequence[Any], needs: Sequence[bool], params: dict[str, Any]) -> list[Any]:
        """The gradients of all operands by one run of the function."""
        with recording(True), repeating(), drawn_again(self.keys):
            handles = [_handle(x, need) if t else x for x, need, t in zip(xs, needs, self.given, strict=False)]
            again = self.part(*handles)
            _expect_same(again, y)
            wanted = [t for t, need in zip([*handles, *self.read], needs, strict=True) if need]
            cotangent = g if isinstance(g, Tensor) else Tensor._of(g)
            # The walk ends at what was read: the pass that this is a part of goes on from there, and calls its hooks.
            ends = [*(h for h in handles if isinstance(h, Tensor)), *self.read]
            pulled = iter(pulled_back(again, wanted, cotangent, isinstance(g, Tensor), ends))
        pairs = [next(pulled) if need else None for need in needs]
        return pairs if isinstance(g, Tensor) else [None if t is None else t._data for t in pairs]


def checkpoint(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """`function(*args)`, whose intermediate results are not kept: the backward pass computes them again.

    So a backward pass takes one more forward pass, and the memory of one such part at a time. Values and first
    gradients have the same bits; those of higher order differ in the order of sums. Running statistics move once, and
    dropout drops the same elements again.

    Args:
        function: it takes `args` and returns one tensor, and gives the same result when it is called again. A module
            may be one. Tensors that it reads from elsewhere, such as parameters, get their gradients too.
        args: tensors, or anything else.

    Raises:
        TypeError: it returns something else.
        RuntimeError, in the backward pass: it gave other values when it was called again.

    >>> x = Tensor([1.0, 2.0], requires_grad=True)
    >>> checkpoint(lambda x: (x * x).exp().sum(), x).backward()
    >>> x.grad.numpy().astype(int).tolist()
    [5, 218]
    """
    if not is_recording() or any(isinstance(a, Batched) for a in args):  # vmap differentiates the tensors behind
        return function(*args)
    made = _Made()
    outer = _running.get()
    before = _running.set((*outer, made))
    try:
        with drawing() as keys, listening(made):
            handles = [_handle(a, a.requires_grad) if isinstance(a, Tensor) else a for a in args]
            y = function(*handles)
    finally:
        _running.reset(before)
    if isinstance(y, Batched):  # of what the function reads; its graph is there
        return y
    if not isinstance(y, Tensor):
        raise TypeError(f"a function to compute again has to return one tensor; it returned {full_name(y)}")
    if not y.requires_grad:
        return y
    read = made.read_by(y, {h for h in handles if isinstance(h, Tensor)})
    name = getattr(function, "__name__", type(function).__name__)
    op = _Recomputed(
        f"checkpoint of {name}", function, (lambda *_: None,), None, False, (), (), "y = f(x)", lambda _: ((), {}),
        exact=True, part=function, given=[isinstance(a, Tensor) for a in args], read=read, keys=keys,
    )  # fmt: skip
    inputs = [*args, *read]
    needs = [isinstance(t, Tensor) and t.requires_grad for t in inputs]
    arrays = [t._data if isinstance(t, Tensor) else t for t in inputs]
    result = Tensor._of(y._data)
    result._requires_grad, result.node = True, Node(op, inputs, needs, arrays, y._data, (), {}, None)
    for around in outer:
        around.ids.add(id(result))
    return result


def _expect_same(again: Any, y: Any) -> None:
    """Raise RuntimeError unless the function gave the result y of the forward pass again."""
    first, second = (backend.numpy_view(v._data if isinstance(v, Tensor) else v) for v in (y, again))
    if not np.array_equal(first, second, equal_nan=True):
        raise RuntimeError(
            "the function of a checkpoint gave other values when it ran again: a mode, a buffer, an array or a random "
            "number has changed since the forward pass"
        )


class _Made:
    """A listener of `hooks` that knows what a function made, by identity, and so what it read from elsewhere."""

    def __init__(self) -> None:
        self.ids: set[int] = set()

    def apply(self, run: Callable[..., Any], op: Op, operands: Sequence[Any], params: dict[str, Any]) -> Any:
        y, saved = run(op, operands, params)
        self.ids.add(id(y))
        return y, saved

    def read_by(self, y: Tensor, handles: set[Tensor]) -> list[Tensor]:
        """The tensors that y was computed from and that were there before, but for the handles."""
        found: dict[Tensor, None] = {}
        seen, todo = set(handles), [y]
        while todo:
            t = todo.pop()
            if t in seen or not t.requires_grad:
                continue
            seen.add(t)
            if t.node is None or id(t) not in self.ids:
                found[t] = None
            else:
                todo += [x for x in t.node.inputs if isinstance(x, Tensor)]
        return list(found)


_running: ContextVar[tuple[_Made, ...]] = ContextVar("running", default=())  # one in another


def _handle(x: Any, need: bool) -> Tensor:
    """A tensor that stands for an operand, a tensor or its array: the graph that is walked ends there."""
    if isinstance(x, Tensor):
        return reshape(x, shape=x.shape) if need else x.detach()
    handle = Tensor._of(x)
    handle._requires_grad = need
    return handle
