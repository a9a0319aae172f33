"""Hooks: functions of the user that are called in a backward pass with a gradient, or around a module's forward.

Names and meaning are PyTorch's. Without hooks `HOOKS` is empty, and a backward pass tests only that.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from threading import RLock
from typing import Any

from tinygrad_bn_kernels import HELD_AT_FORKS

from tinygrad_bn.arguments import full_name, shown

Hook = Callable[..., Any]
# By the id of a tensor or a module that is alive: number, kind and function of each. Tuples are replaced whole, so a
# thread may read them at any time.
HOOKS: dict[int, tuple[tuple[int, str, Hook], ...]] = {}

_numbers = itertools.count()
_lock = RLock()  # re-entrant, as an owner may die in the middle of a change
_ends: dict[int, Any] = {}  # finalizers of the owners in HOOKS

HELD_AT_FORKS.append(_lock)


class Handle:
    """A registered hook. `remove()` takes it away; so does the end of a `with` block."""

    def __init__(self, owner: object, number: int) -> None:
        self._owner, self._number = id(owner), number

    def remove(self) -> None:
        """Take the hook away. Nothing happens if it is not there any more."""
        with _lock:
            hooks = HOOKS.get(self._owner, ())
            rest = tuple(hook for hook in hooks if hook[0] != self._number)
            if rest:
                HOOKS[self._owner] = rest
            elif hooks:
                _ends[self._owner].detach()
                _forget(self._owner)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def register(owner: Any, kind: str, hook: Hook) -> Handle:
    """Keep a hook for as long as its owner is alive. Raises TypeError unless it can be called."""
    if not callable(hook):
        raise TypeError(f"a hook is a function; got {shown(hook)}")
    with _lock:
        if id(owner) not in HOOKS:
            _ends[id(owner)] = weakref.finalize(owner, _forget, id(owner))
            _ends[id(owner)].atexit = False
        number = next(_numbers)
        HOOKS[id(owner)] = (*HOOKS.get(id(owner), ()), (number, kind, hook))
    return Handle(owner, number)


def _forget(owner: int) -> None:
    with _lock:
        HOOKS.pop(owner, None)
        _ends.pop(owner, None)


def _of(owner: object, kind: str) -> list[Hook]:
    return [hook for _, k, hook in HOOKS.get(id(owner), ()) if k == kind]


class TensorWithHooks:
    """The part of a tensor that has hooks."""

    __slots__ = ()

    def register_hook(self, hook: Hook) -> Handle:
        """Call `hook(gradient)` in each backward pass, when the gradient of this tensor is complete.

        It may return another gradient, of the same shape and dtype, to go on with. With `create_graph` the gradient has
        a graph, and what the hook computes is differentiated too.

        Returns:
            A handle: `handle.remove()` takes the hook away.

        Raises:
            RuntimeError: this tensor does not require a gradient.
            TypeError: `hook` is no function; or, in the backward pass, it returns anything but a tensor or None.

        >>> from tinygrad_bn import Tensor
        >>> x = Tensor([1.0, 2.0], requires_grad=True)
        >>> handle = x.register_hook(lambda g: g * 10)
        >>> (x * x).sum().backward()
        >>> x.grad.numpy().tolist()
        [20.0, 40.0]
        """
        own: Any = self
        if not own.requires_grad:
            raise RuntimeError(f"this tensor of shape {own.shape} gets no gradient that a hook could be called with")
        return register(own, "gradient", hook)


def call(t: Any, grads: dict[Any, Any], tensor_of: Callable[[Any], Any]) -> None:
    """Call the hooks of the tensor t with its gradient: a tensor, or an array that `tensor_of` makes one of."""
    for hook in _of(t, "gradient") if t in grads else ():
        before = grads[t]
        if hasattr(before, "level"):  # of `vmap`, or of the rows of a Jacobian, which are then computed one by one
            raise NotImplementedError("a hook is called with one gradient; here are the gradients of many samples")
        g = before if hasattr(before, "requires_grad") else tensor_of(before)
        after = hook(g)
        if after is None:
            continue
        if not hasattr(after, "requires_grad"):
            raise TypeError(f"a hook has to return a gradient, which is a tensor, or None; got {full_name(after)}")
        if (after.shape, after.dtype, after.device) != (g.shape, g.dtype, g.device):
            raise ValueError(
                f"a hook was given a gradient of {g.dtype} {g.shape} and returned {after.dtype} {after.shape}; they "
                "have to be equal"
            )
        grads[t] = after if before is g else after._data


def before_forward(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a module's forward, after its hooks for them."""
    for hook in _of(module, "before"):
        changed = hook(module, args)
        if changed is not None:
            args = changed if isinstance(changed, tuple) else (changed,)
    return args


def after_forward(module: Any, args: tuple[Any, ...], y: Any) -> Any:
    """The result of a module's forward, after its hooks for it."""
    for hook in _of(module, "after"):
        changed = hook(module, args, y)
        y = y if changed is None else changed
    return y
