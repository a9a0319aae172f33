"""A step as a straight line of calls, and its proof."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from tinygrad_bn import autograd, backend
from tinygrad_bn.captured.nests import SCALARS, Place, filled, same, slots_in
from tinygrad_bn.tensor import Node, Op, Tensor

if TYPE_CHECKING:
    from tinygrad_bn.captured.recorder import Recorder

WIDTH = 90  # of a line in print, without its note; longer ones are not aligned
NOWHERE = -1  # the slot of a result that nothing needs


@dataclass(eq=False)
class Line:
    """A call whose results go to the slots `outs`. Its operands are in `args`, and in `params` of an op."""

    name: str
    where: str  # the path of a module, or of its tensor
    args: tuple[Any, ...]
    outs: tuple[int, ...]


@dataclass(eq=False)
class Host(Line):
    """A function of the host, called with its real effects."""

    function: Callable[..., Any]

    def run(self, s: list[Any], args: list[Any]) -> None:
        """Call it."""
        s[self.outs[0]] = self.function(*args)


@dataclass(eq=False)
class Forward(Line):
    """An op on arrays; `outs` are its result and its by-products."""

    op: Op
    params: dict[str, Any]
    moving: bool  # whether there are places in `params`, such as that of a key or of an index
    kernel: Any
    dtype: Any

    def run(self, s: list[Any], args: list[Any]) -> None:
        """Compute `outs`."""
        params = filled(self.params, s) if self.moving else self.params
        y: Any = NotImplemented
        saved: Sequence[Any] = ()
        if self.kernel is not None:
            try:
                y = self.kernel(*args, **params)
            except (MemoryError, *backend.REPORTED):
                y = NotImplemented  # the seam tries again, or says what is wrong
            if self.op.saves and type(y) is tuple:
                y, *saved = y
            if isinstance(y, np.generic):
                y = np.asarray(y)
        if type(y) is not np.ndarray or y.dtype != self.dtype:
            y, saved = backend.forward(self.op, args, params)
        for i, a in zip(self.outs, (y, *saved), strict=True):
            s[i] = a


@dataclass(eq=False)
class Vjp(Line):
    """The gradients of an op. Its `args` are the cotangent, the result, the operands, and then the by-products."""

    op: Op
    params: dict[str, Any]
    moving: bool
    needs: list[bool]

    def run(self, s: list[Any], args: list[Any]) -> None:
        """Compute `outs`, one for each operand."""
        g, y, *rest = args
        arrays, saved = rest[: len(self.needs)], rest[len(self.needs) :]
        params = filled(self.params, s) if self.moving else self.params
        gxs = backend.vjp(self.op, g, y, arrays, params, self.needs, saved)
        if gxs is NotImplemented:  # the kernel declines these numbers
            inputs = [Tensor._of(a) if hasattr(a, "dtype") else a for a in arrays]
            for t, need in zip(inputs, self.needs, strict=True):
                if need:
                    t._requires_grad = True
            node = Node(self.op, inputs, self.needs, arrays, y, saved, params, None)
            gxs = autograd._pull_composition(node, g, self.needs, create_graph=False)
        for i, gx in zip(self.outs, gxs, strict=True):
            s[i] = None if gx is None else backend.as_array(gx)


array_of = attrgetter("_data")


def set_grad(t: Tensor, gradient: Any) -> None:
    """Leave a gradient, an array, in a tensor."""
    t._grad = Tensor._of(gradient)


class Program:
    """The lines of a step, and the form of its result.

    `print(program)` lists them: the result with its shape, the operation and its operands (parameters by name, others
    by number), the module, and the bytes that an op reads and writes.
    """

    def __init__(self, record: Recorder, result: Any) -> None:
        self.lines, self.result = record.lines, result
        self.types = [_type_of(value) for value in record.values]
        self.constants = [value if i in record.constants else None for i, value in enumerate(record.values)]
        self.names = {line.outs[0]: line.where for line in self.lines if line.name == "read" and line.where}
        self.moved = [_moved(line, record.values) for line in self.lines]
        last: dict[int, int] = {}
        for number, line in enumerate(self.lines):
            last |= dict.fromkeys((*slots_in(line.args), *slots_in(getattr(line, "params", ())), *line.outs), number)
        kept = {*slots_in(result), NOWHERE}
        dead = [
            [slot for slot, n in last.items() if n == number and slot not in kept] for number in range(len(self.lines))
        ]
        self._tail: list[Any] = []  # arguments that are no arrays, in slots behind those of the record
        self._code = [(line, self._fetched(line.args), free) for line, free in zip(self.lines, dead, strict=True)]

    def _fetched(self, args: tuple[Any, ...]) -> list[int]:
        """The slot of each argument."""
        fetched = []
        for a in args:
            if type(a) is Place:
                fetched.append(a.slot)
            else:
                fetched.append(len(self.constants) + len(self._tail))
                self._tail.append(a)
        return fetched

    def run(self, inputs: Sequence[Any]) -> Any:
        """Take a step."""
        s = [*inputs, *self.constants[len(inputs) :], *self._tail, None]
        for line, fetched, dead in self._code:
            line.run(s, [s[i] for i in fetched])
            for slot in dead:
                s[slot] = None
        return filled(self.result, s)

    def change(self, record: Recorder, result: Any) -> str:
        """How the form of another record of the step differs; "" if it does not."""
        for mine, its in zip(self.lines, record.lines, strict=False):
            if type(mine) is not type(its) or not same(vars(mine), vars(its)):
                names = mine.name if mine.name == its.name else f"{mine.name}, then {its.name}"
                return f"an operation, its operands or its options differ from step to step: {names}{_in(its.where)}"
        if len(self.lines) != len(record.lines) or not same(self.result, result):
            return "the number of operations, or the form of the result, differs from step to step"
        for i in record.constants:
            if self.constants[i] is not record.values[i]:
                return f"an array {self.types[i][1:]} from outside differs from step to step: pass it as an argument"
        return ""

    def fault(self, record: Recorder) -> str:
        """The first operation that gives other bits than it gave in a record of the same form; "" if none does."""
        s = [*record.values, *self._tail, None]
        for line, fetched, _ in self._code:
            if not isinstance(line, Host):
                want = [s[i] for i in line.outs]
                line.run(s, [s[i] for i in fetched])
                if not all(i == NOWHERE or _same_bits(s[i], a) for i, a in zip(line.outs, want, strict=True)):
                    return f"{line.name}{_in(line.where)} gives other numbers than in the engine"
        return ""

    def __str__(self) -> str:
        from rich.filesize import decimal

        sizes = [decimal(moved) if moved else "" for moved in self.moved]
        rows = [self._row(line, size) for line, size in zip(self.lines, sizes, strict=True)]
        width = min(WIDTH, max((len(text) for text, _ in rows), default=0))
        shown = [f"{text:{width}}  # {note}" if note else text for text, note in rows if text]
        return "\n".join([*shown, f"{len(shown)} operations, {decimal(sum(self.moved))} read and written by ops"])

    def _row(self, line: Line, size: str) -> tuple[str, str]:
        """A line in words, "" for one that reads a named array; and the path of its module and the bytes it moves."""
        shown = [a for a in line.args if isinstance(a, (Place, tuple, *SCALARS))]
        args = [self._named(a.slot) if type(a) is Place else repr(a) for a in shown]
        if line.name == "grad" and line.where:
            return f"{line.where}.grad = {args[0]}", ""
        if line.outs[0] in self.names:
            return "", ""
        outs = ", ".join(f"%{i}{self.types[i]}" for i in line.outs if i != NOWHERE)
        note = ", ".join(filter(None, [line.where, size]))
        return f"{outs + ' = ' if outs else ''}{line.name}({', '.join(args)})", note

    def _named(self, slot: int) -> str:
        return self.names.get(slot, f"%{slot}")


def _in(where: str) -> str:
    return f" in {where}" if where else ""


def _moved(line: Line, values: list[Any]) -> int:
    """Bytes of the arrays that an op reads and writes; 0 if its result is a view."""
    if isinstance(line, Host):
        return 0
    arrays = [values[i] for i in {*slots_in(line.args)} if hasattr(values[i], "dtype")]
    results = [values[i] for i in line.outs if i != NOWHERE and hasattr(values[i], "dtype")]
    if len(results) == 1 and any(_share_memory(a, results[0]) for a in arrays):
        return 0
    return sum(a.size * a.dtype.itemsize for a in arrays + results)


def _share_memory(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return np.may_share_memory(a, b)
    return hasattr(a, "pointer") and hasattr(b, "pointer") and a.pointer == b.pointer


def _type_of(value: Any) -> str:
    return f":{value.dtype}[{','.join(map(str, value.shape))}]" if hasattr(value, "dtype") else ""


def _same_bits(a: Any, b: Any) -> bool:
    x, y = backend.to_numpy(a), backend.to_numpy(b)
    return (x.dtype, x.shape) == (y.dtype, y.shape) and x.tobytes() == y.tobytes()
