"""Writing down what a step does, while it runs as always."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tinygrad_bn import backend, hooks
from tinygrad_bn.batching import Batched
from tinygrad_bn.captured.effects import Effects
from tinygrad_bn.captured.nests import Place, mapped, slots_in
from tinygrad_bn.captured.program import NOWHERE, Forward, Host, Vjp, array_of, set_grad
from tinygrad_bn.captured.watched import Argument, Number, is_array, plain
from tinygrad_bn.nn.module import Module
from tinygrad_bn.nn.sequential import BatchNormReLU
from tinygrad_bn.tensor import Op, Tensor


class Recorder:
    """Looks on while a step runs (see `hooks`), and writes its lines."""

    def __init__(self, inputs: Sequence[Any]) -> None:
        self.lines: list[Any] = []
        self.values: list[Any] = []  # of each slot, which keep their identities; the inputs are the first
        self.constants: set[int] = set()  # slots
        self.modules: list[Module] = []
        self.effects = Effects(self.modules)
        self.fresh: list[Tensor] = []  # had no gradient, and were not cleared, when a backward pass gave them one
        self._cleared: set[Tensor] = set()
        self._handed_out: list[Any] = []  # arguments and numbers that tell when they are read
        self._known: dict[int, int] = {}  # the slot of a value, by its identity
        self._memory: dict[int, int] = {}  # likewise, by the address of a contiguous array
        self._state: dict[int, tuple[Tensor, Any]] = {}  # tensors that outlive the step, by identity of their array
        self._held: dict[Tensor, tuple[Any, Any]] = {}  # these, with array and gradient as recorded calls left them
        self._names: dict[Tensor, str] = {}
        self._paths: dict[Module, str] = {}
        self._path = ""  # of the module that is running
        self._made_in: dict[int, str] = {}  # paths, by slot
        for value in inputs:
            self._define(value)

    def argument(self, value: Any) -> Any:
        """What the step gets for an argument."""
        if not isinstance(value, np.ndarray):
            return value
        watched = value.view(np.ndarray).view(Argument)
        watched.recorder, watched.array = self, value
        self._handed_out.append(watched)
        return watched

    def release(self) -> None:
        """The step is over: what it has been given keeps no record alive."""
        for watched in self._handed_out:
            watched.recorder = None

    def place_of(self, value: Any) -> Any:
        """The place of a tensor or of an array in a result."""
        if isinstance(value, Tensor):
            return Place(self._use(value._data).slot, tensor=True)
        if type(value) is Number:
            return Place(self._known[id(value)])
        if value is not None and not is_array(value):
            self.refuse(f"it returns a {type(value).__name__}, which a program would not compute again")
        return None if value is None else self._use(plain(value))

    def _define(self, value: Any) -> int:
        slot = self._known[id(value)] = len(self.values)
        self.values.append(value)
        if type(value) is np.ndarray and value.flags.c_contiguous:
            self._memory[value.ctypes.data] = slot
        return slot

    def _use(self, array: Any) -> Place:
        """The place of an array: new for that of a parameter, for a reshaped view of a known one, for a constant."""
        if (slot := self._known.get(id(array))) is not None:
            return Place(slot)
        if id(array) in self._state:
            tensor, _ = self._state[id(array)]
            return Place(self._add_host("read", array_of, (tensor,), array, self._names.get(tensor, "")))
        if type(array) is np.ndarray and array.size and array.flags.c_contiguous:
            slot = self._memory.get(array.ctypes.data)
            whole = None if slot is None else self.values[slot]
            if whole is not None and (whole.size, whole.dtype) == (array.size, array.dtype):
                return Place(self._add_host("reshape", np.reshape, (whole, array.shape), array))
        self.constants.add(slot := self._define(array))
        return Place(slot)

    def _placed(self, value: Any) -> Any:
        """A place instead of an array, of a result of this step, or of a number that the host computed in it."""
        if isinstance(value, Tensor):
            if type(value) is Batched:
                self.refuse(
                    "vmap inside of a step is not captured; capture the function that vmap is given, or neither"
                )
                return value
            own = value.node is not None and id(value._data) in self._known
            return self._use(value._data) if own else value
        if is_array(value):
            return self._use(value)
        return Place(self._known[id(value)]) if _is_own(value) and id(value) in self._known else plain(value)

    def _add_host(
        self, name: str, function: Callable[..., Any], args: Sequence[Any], result: Any, of: str = "",
        options: dict[str, Any] | None = None,
    ) -> int:  # fmt: skip
        if options:
            self.refuse(f"{name} is called with names of arguments ({', '.join(options)}); give them by position")
        placed = tuple(map(self._placed, args))
        slot = self._define(result) if is_array(result) or _is_own(result) else NOWHERE
        self.lines.append(Host(name, of or self._path, placed, (slot,), function))
        return slot

    def _add_op(self, kind: Any, name: str, args: Sequence[Any], results: Sequence[Any], *more: Any) -> None:
        op, params, *others = more
        placed, options = tuple(map(self._placed, args)), mapped(self._placed, params)
        outs = tuple([NOWHERE if a is None else self._define(a) for a in results])
        moving = any(True for _ in slots_in(options))
        where = self._path if kind is Forward else self._made_in.get(placed[1].slot, "")
        self._made_in |= dict.fromkeys(outs, where)
        self.lines.append(kind(name, where, placed, outs, op, options, moving, *others))

    def _remember(self, t: Tensor) -> None:
        if id(t._data) not in self._known:
            self._state.setdefault(id(t._data), (t, t._data))
            self._held.setdefault(t, (t._data, t.grad))

    def expect_unassigned(self) -> None:
        """Refuse the step if it has assigned an array or a gradient, except in calls that are recorded."""
        for t, (array, gradient) in self._held.items():
            if t._data is not array or t.grad is not gradient:
                what = "gradient" if t._data is array else "data"
                self.refuse(f"the step assigns the {what} of {self._names.get(t, f'a tensor {t.shape}')}")

    def _hold(self) -> None:
        self._held = {t: (t._data, t.grad) for t in self._held}

    @property
    def refusal(self) -> str:
        """Why the step cannot be captured; "" if it can."""
        return self.effects.refusal

    def refuse(self, reason: str) -> None:
        """Note why the step cannot be captured; the first reason stays."""
        self.effects.refuse(reason)  # which has no way back to this record: in a cycle its arrays would stay

    # What `hooks` calls, each around the function of the engine.

    def module(self, run: Callable[..., Any], module: Module, *args: Any, **options: Any) -> Any:
        """A module's forward. Its tensors outlive the step; a `BatchNormReLU` does not, but the layer in it."""
        above, kept = self._path, module.norm if type(module) is BatchNormReLU else module
        if kept not in self._paths:
            self.modules += [m for m in kept.modules() if m not in self._paths]
            for path, child in kept.named_modules():
                self._paths.setdefault(child, path)
            for name, t in kept.named_tensors():
                self._names.setdefault(t, name)
                self._remember(t)
        self._path = self._paths[kept]
        try:
            return run(module, *args, **options)
        finally:
            self._path = above

    def apply(self, run: Callable[..., Any], op: Op, operands: Sequence[Any], params: dict[str, Any]) -> Any:
        """An op on tensors: leaves that the step did not make outlive it."""
        for o in operands:
            if isinstance(o, Tensor) and o.node is None:
                self._remember(o)
        return run(op, list(map(plain, operands)), params)

    def forward(self, run: Callable[..., Any], op: Op, arrays: Sequence[Any], params: dict[str, Any]) -> Any:
        """An op on arrays."""
        if op.updates:
            self.refuse(f"{op.name} overwrites an array outside of an optimizer")
        y, saved = self.effects.aside(run, op, arrays, params)
        kernel = backend._kernel(op.name, arrays)
        self._add_op(Forward, op.name, arrays, (y, *saved), op, params, kernel, y.dtype)
        return y, saved

    def vjp(self, run: Callable[..., Any], op: Op, g: Any, y: Any, arrays: Any, params: Any, *more: Any) -> Any:
        """The gradients of an op, as arrays."""
        gxs = self.effects.aside(run, op, g, y, arrays, params, *more)
        if gxs is NotImplemented:  # the engine goes on with the composition
            return gxs
        gxs, (needs, saved) = [None if gx is None else backend.as_array(gx) for gx in gxs], more
        self._add_op(Vjp, op.vjp, (g, y, *arrays, *saved), gxs, op, params, list(needs))
        return gxs

    def accumulate(self, run: Callable[..., Any], y: Tensor, g: Tensor, create_graph: bool, free: bool) -> None:
        """A backward pass: the gradients that it leaves in leaves."""
        if create_graph:
            self.refuse("a backward pass has create_graph=True")
        self.expect_unassigned()
        leaves_before = [
            (t, t.grad, t.grad is not None and id(t.grad._data) in self._known)
            for t, _ in self._state.values()
            if t._requires_grad
        ]
        run(y, g, create_graph, free)
        for t, old, own in leaves_before:
            if t.grad is not None and t.grad is not old:
                if old is None and t not in self._cleared:
                    self.fresh.append(t)
                elif old is not None and not own:
                    self.refuse("a gradient is added to that of a step before: call zero_grad() in the step")
                self._add_host("grad", set_grad, (t, t.grad._data), None, self._names.get(t, ""))
        self._hold()

    def copy(self, run: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """A function of the seam that makes an array."""
        args = tuple(map(plain, args))
        result = self.effects.aside(run, *args, **options)
        if is_array(result) and not any(result is a for a in args):
            self._add_host(run.__name__, run, args, result, options=options)
        return result

    def host(self, run: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Work of the host, which a program does by calling the same function."""
        self.expect_unassigned()
        with hooks.unseen():
            result = self.effects.aside(run, *map(plain, args), **options)
        if run.__name__ == "zero_grad":
            owner = args[0]
            own = [owner] if isinstance(owner, Tensor) else owner._params() if hasattr(owner, "_params") else None
            self._cleared.update(owner.parameters() if own is None else own)
        if type(result) is float:
            result = Number(result, self)
            self._handed_out.append(result)
        self._add_host(run.__name__, run, args, result, options=options)
        self._hold()
        return result

    def read(self, run: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Numbers that Python reads: it may decide by them, and a program would not ask it again."""
        self.refuse(f"the step reads or assigns numbers ({run.__name__}); return the tensor, and do it outside")
        return self.effects.aside(run, *map(plain, args), **options)


def _is_own(value: Any) -> bool:
    """Whether this is a number with an identity of its own. Python shares small integers."""
    return type(value) in (Number, float) or (type(value) is int and abs(value) > 256)
