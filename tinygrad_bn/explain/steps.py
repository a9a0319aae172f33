"""What is recorded: the steps of a computation, its backward passes, and every call below the seam."""

from __future__ import annotations

import linecache
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tinygrad_bn import backend
from tinygrad_bn.tensor import Array, Node, Op, Tensor


@dataclass(eq=False)
class Step:
    """A tensor of the computation, and how it came to be. A given tensor has no op."""

    tensor: Tensor
    op: Op | None = None
    operands: tuple[Any, ...] = ()  # Steps, Python numbers and None
    params: dict[str, Any] = field(default_factory=dict)
    home: str = ""  # path of the module that computed it; outside modules the fused op that it is a step of
    names: list[str] = field(default_factory=list)  # within the scope, the first is the usual one
    aliases: list[str] = field(default_factory=list)  # what the program calls it
    derivative_of: list[Step] = field(default_factory=list)  # several where a step passes its gradient on as it is
    number: int = 0  # in the order of the forward pass
    line: tuple[str, int] | None = None  # of the program that uses the package
    inside: bool = False  # of a module or a fused op
    backward: bool = False  # whether a backward pass computed it

    def __post_init__(self) -> None:
        self.origin = self.home  # where it was computed; the program may call it otherwise
        self.array = self.tensor._data  # an update replaces a tensor's array and leaves this one as it is

    @property
    def value(self) -> Array:
        """The values, a read-only NumPy array."""
        return backend.numpy_view(self.array)

    @property
    def formula(self) -> str:
        """The op in symbols, with the rule of its gradient."""
        return self.op.formula if self.op else "given"

    @property
    def named(self) -> bool:
        """Whether the code has a name for it."""
        return bool(self.names or self.aliases or self.derivative_of)

    @property
    def scope(self) -> str:
        """Where its name belongs: the path of a module, a fused op, or "" for the program."""
        return self.derivative_of[0].scope if self.derivative_of and not self.names else self.home

    @property
    def all_names(self) -> list[str]:
        """Every name that the code or the program has for it."""
        return [*self.names, *self.aliases, *(f"∂{name}" for s in self.derivative_of for name in s.all_names)]

    @property
    def name(self) -> str:
        """Its usual name within its scope; without any, that of its op."""
        if self.all_names:
            return self.all_names[0]
        if self.derivative_of:
            return f"∂{self.derivative_of[0].name}"
        return self.op.name if self.op else "constant"

    @property
    def sources(self) -> list[Step]:
        """The steps that it was computed from."""
        return [o for o in self.operands if isinstance(o, Step)]

    @property
    def where(self) -> str:
        """The line of the program that computed it: `file:line: text`."""
        return f"{self.line[0]}:{self.line[1]}: {linecache.getline(*self.line).strip()}" if self.line else ""

    def describe(self) -> str:
        """The call in words: `sum(float64 (3, 4), axis=0)`."""
        if self.op is None:
            return f"{self.array.dtype} {self.array.shape}"
        arrays = [o.array if isinstance(o, Step) else o for o in self.operands]
        return backend.describe(self.op, arrays, self.params)


@dataclass(eq=False)
class Pass:
    """A backward pass from `y`, as the engine ran it, with arrays."""

    y: Step
    g: Any
    grads: dict[Step, Any] = field(default_factory=dict)
    edges: dict[tuple[Step, int], Any] = field(default_factory=dict)  # what a step gave its operand i
    nodes: dict[Step, Node] = field(default_factory=dict)  # in the order of the pass; copies, as graphs are freed

    def __post_init__(self) -> None:
        self.grads[self.y] = self.g

    def users(self, x: Step) -> list[Step]:
        """The steps that passed a gradient to x, each once, in the order of the forward pass."""
        return list(dict.fromkeys(s for s in reversed(self.nodes) if any(x is o for o in self.fed(s).values())))

    def fed(self, step: Step) -> dict[int, Step]:
        """The operands to which `step` passed a gradient, by position."""
        return {i: o for i, o in enumerate(step.operands) if (step, i) in self.edges}


@dataclass(eq=False)
class Call:
    """A call below the seam, in the order of the run: `results = name(*operands, **params)`."""

    phase: str  # "forward", "backward" or "update"
    name: str
    operands: tuple[Any, ...]
    params: dict[str, Any]
    results: tuple[Any, ...]
    scope: str = ""


@dataclass(eq=False)
class Layer:
    """A call of an op as a plain run makes it, fused where it can be: what it keeps for the backward pass."""

    op: Op
    scope: str
    result: Any
    kept: tuple[Any, ...]  # arrays; none where no gradient is needed


def size_of(arrays: Any) -> int:
    """The bytes of arrays, each array once."""
    return sum({id(a): int(a.size) * np.dtype(a.dtype).itemsize for a in arrays if hasattr(a, "dtype")}.values())
