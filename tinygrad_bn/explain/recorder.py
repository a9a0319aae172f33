"""Recording: what the engine does in a block, as a listener of `hooks`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from tinygrad_bn import autograd, backend, hooks, tensor
from tinygrad_bn.batching import Batched
from tinygrad_bn.explain.names import Locals, parameters_of
from tinygrad_bn.explain.steps import Call, Layer, Pass, Step
from tinygrad_bn.nn.module import Module
from tinygrad_bn.tensor import Node, Op, Tensor

PACKAGE = str(Path(tensor.__file__).parent)


class Recorder:
    """The steps, passes and calls of a block. A method with an `original` stands in for that function of the engine."""

    def __init__(self) -> None:
        self.steps: dict[int, Step] = {}  # by the identity of the tensor, which the step keeps alive
        self.passes: list[Pass] = []
        self.calls: list[Call] = []
        self.layers: list[Layer] = []
        self.kinds: dict[str, str] = {}  # of each scope: the type of the module, or the fused op
        self.modules: list[Module] = []  # those that were called from outside
        self.locals = Locals(self.steps)
        self._scopes: list[str] = []
        self._owned: dict[int, tuple[Any, str, str]] = {}  # arrays of parameters and buffers: scope and name
        self._paths: dict[int, str] = {}  # of the modules below the outermost one
        self._modules = 0  # how many are running
        self._fused = 0
        self._quiet = False  # a plain backward pass, and the storing of its gradients: their ops are no steps
        self._backward = False
        self._storing = False  # a plain backward pass will add its gradients to those of the leaves
        self._pass: Pass | None = None  # that is running; None inside a fused op from before the block

    # ---- forward ----------------------------------------------------------------------------------------

    def apply(self, original: Callable[..., Any], op: Op, operands: Any, params: dict[str, Any]) -> Any:
        """An op on tensors becomes a step; a fused op becomes those of its composition."""
        if self._quiet or not any(isinstance(o, tensor.CONVERTED) for o in operands):
            return original(op, operands, params)
        inputs = [o if isinstance(o, Tensor) else tensor._constant(o) for o in operands]
        met = [self.meet(o) if isinstance(o, Tensor) else o for o in inputs]
        if op.fused:
            self._fused += 1
            try:
                with self._scope(None if self._scopes else op.name, op.name):
                    y, saved = original(op, inputs, params)
                    self._name_result(y, op.name, not self._modules and self._fused == 1)
            finally:
                self._fused -= 1
        else:
            y, saved = original(op, inputs, params)
            scope = self._scopes[-1] if self._scopes else ""
            step = Step(y, op, tuple(met), params, scope, number=len(self.steps), line=_line())
            step.inside, step.backward = bool(self._scopes), self._backward
            self.steps[id(y)] = step
        if not self._fused and isinstance(y, Tensor):
            kept = (*(o._data for o in inputs if isinstance(o, Tensor)), y._data, *saved) if y.requires_grad else ()
            self.layers.append(Layer(op, self._scopes[-1] if self._scopes else "", y._data, kept))
        return y, saved

    def meet(self, t: Tensor) -> Step:
        """The step of a tensor. One from before the block is given, or has the op of its node and no steps inside."""
        todo = [] if id(t) in self.steps else [t]
        while todo:  # no recursion, as a graph may be deep
            new = [o for o in _operands(todo[-1]) if isinstance(o, Tensor) and id(o) not in self.steps]
            if new:
                todo += new
            elif id(last := todo.pop()) not in self.steps:
                self.steps[id(last)] = self._from_before(last)
        return self.steps[id(t)]

    def _from_before(self, t: Tensor) -> Step:
        scope = self._scopes[-1] if self._scopes else ""
        if id(t._data) in self._owned:
            _, scope, name = self._owned[id(t._data)]
            return Step(t, home=scope, names=[name], number=len(self.steps), line=_line())
        operands = tuple(self.steps[id(o)] if isinstance(o, Tensor) else o for o in _operands(t))
        if t.node is None or not operands:
            return Step(t, home=scope, number=len(self.steps), line=_line())
        return Step(t, t.node.op, operands, t.node.params, number=len(self.steps), line=_line())

    def module(self, original: Callable[..., Any], m: Module, *args: Any, **options: Any) -> Tensor:
        """The steps of a module are in the scope of its path."""
        if not self._modules:
            self.modules.append(m)
            # Backwards: what is shared has the first of its names, as in `named_parameters`.
            self._paths = {id(child): path for path, child in reversed(list(m.named_modules()))}
            for key, t in reversed(list(m.named_tensors())):
                scope, _, name = key.rpartition(".")
                self._owned[id(t._data)] = t._data, scope, name
            args = self._named_inputs(m, args)
        path = self._paths.get(id(m), type(m).__name__)
        self._modules += 1
        try:
            with self._scope(path, type(m).__name__):
                y: Tensor = original(m, *args, **options)
                self._name_result(y, path, True)
            return y
        finally:
            self._modules -= 1

    def _named_inputs(self, m: Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """What the program gives to a module, arrays as tensors. It is called as the parameters until it has a name."""
        given = tuple(m._tensor(a) if isinstance(a, np.ndarray | list) else a for a in args)
        for name, t in zip(parameters_of(m, len(given)), given, strict=True):
            if isinstance(t, Tensor) and not (step := self.meet(t)).named and step.op is None:
                step.names = [name]
        return given

    def _name_result(self, y: object, scope: str, applies: bool) -> None:
        """The result of a module or of a fused op is its `out`, also where a step before a cast was called so."""
        step = self.steps.get(id(y))
        if not applies or step is None or step.op is None or step.scope != scope or "out" in step.names:
            return
        for before in step.sources:
            if "out" in before.names and before.scope == scope and step.op.name == "astype":
                before.names.remove("out")
        step.names.insert(0, "out")

    @contextmanager
    def _scope(self, path: str | None, kind: str = "") -> Iterator[None]:
        if path is None:
            yield
            return
        if kind:
            self.kinds.setdefault(path, kind)
        self._scopes.append(path)
        try:
            yield
        finally:
            self._scopes.pop()

    # ---- backward ---------------------------------------------------------------------------------------

    def cotangent(self, original: Callable[..., Any], y: Tensor, g: Any) -> Tensor:
        """The gradient that a pass starts with. Its cast is no step, unless it is to be differentiated."""
        before = self._quiet, self._backward
        self._quiet, self._backward = not (isinstance(g, Tensor) and g.requires_grad), True
        try:
            t: Tensor = original(y, g)
            return t
        finally:
            self._quiet, self._backward = before

    def accumulate(
        self, original: Callable[..., Any], y: Tensor, g: Tensor, create_graph: bool, free: bool
    ) -> None:  # fmt: skip
        """A backward pass that stores its gradients. Adding a plain one to that of a pass before is no step."""
        self._storing = not create_graph
        try:
            original(y, g, create_graph, free)
        finally:
            self._storing = self._backward = self._quiet = False

    def backward_pass(
        self, original: Callable[..., Any], y: Tensor, g: Tensor, order: list[Tensor], wanted: Any,
        create_graph: bool, free: bool = False,
    ) -> Any:  # fmt: skip
        """A backward pass; the one inside a fused op from before the block is part of that op.

        That of many cotangents at once, as the rows of a Jacobian, is not noted: no tensor has one gradient there.
        """
        if self._backward or isinstance(g, Batched):
            outer, self._pass = self._pass, None
            try:
                return original(y, g, order, wanted, create_graph, free)
            finally:
                self._pass = outer
        for t in order:
            self.meet(t)
        self._pass = Pass(self.steps[id(y)], g._data)
        self.passes.append(self._pass)
        self._backward, self._quiet = True, not create_graph
        wanted, watching = list(wanted), sys.getprofile()
        if not create_graph:
            sys.setprofile(None)  # no step gets a name here, and watching is slow
        try:
            grads = original(y, g, order, wanted, create_graph, free)
        finally:
            sys.setprofile(watching)
            self._pass, self._backward, self._quiet = None, self._storing, self._storing
        for t, gt in grads.items():
            self.passes[-1].grads[self.steps[id(t)]] = gt._data if isinstance(gt, Tensor) else gt
            self._name_derivative(gt, self.steps[id(t)])
        return grads

    def pull(
        self, original: Callable[..., Any], t: Tensor, node: Node, g: Any, needs: list[bool], create_graph: bool
    ) -> Any:
        """One step back: the share of each operand's gradient."""
        p, step = self._pass, self.steps.get(id(t))
        if p is None or step is None:
            return original(t, node, g, needs, create_graph)
        if create_graph:
            self._name_derivative(g, step)
        p.grads[step] = g._data if isinstance(g, Tensor) else g
        with self._scope(step.scope):
            gxs = list(original(t, node, g, needs, create_graph))
            for i, (x, gx) in enumerate(zip(node.inputs, gxs, strict=True)):
                if gx is not None and create_graph:
                    p.edges[step, i] = self.fitted(gx._data if isinstance(gx, Tensor) else gx, x)
                elif gx is not None:  # as the engine would after this
                    gxs[i] = p.edges[step, i] = autograd._fit(gx, x, backend.forward)
        inputs, arrays = tuple(node.inputs), tuple(node.arrays)  # a graph that is freed loses them
        p.nodes[step] = Node(node.op, inputs, needs, arrays, node.output, node.saved, node.params, None)
        return gxs

    def _name_derivative(self, g: object, step: Step) -> None:
        found = self.steps.get(id(g))
        if found is not None and found.op is not None and not found.names:
            found.derivative_of.append(step)

    def fitted(self, gx: Any, x: Tensor) -> Any:
        """The gradient of x in its shape and dtype."""
        with hooks.unseen():
            return autograd._fit(gx, x, backend.forward)

    def added(self, a: Any, b: Any) -> Any:
        """The sum of two arrays, by the op that the engine adds gradients with."""
        with hooks.unseen():
            return backend.forward(tensor.OPS["add"], (a, b), {})[0]

    # ---- below the seam ---------------------------------------------------------------------------------

    def forward(self, original: Callable[..., Any], op: Op, arrays: Any, params: dict[str, Any]) -> Any:
        """A call of an op on arrays."""
        y, saved = original(op, arrays, params)
        phase = "backward" if self._backward else "update" if op.updates else "forward"
        self._log(phase, op.name, arrays, params, (y, *saved))
        return y, saved

    def vjp(
        self, original: Callable[..., Any], op: Op, g: Any, y: Any, arrays: Any, params: Any, needs: Any, saved: Any
    ) -> Any:
        """A call of an op's gradients on arrays."""
        gxs = original(op, g, y, arrays, params, needs, saved)
        if gxs is not NotImplemented:
            self._log("backward", op.vjp, (g, y, *arrays), params, tuple(gxs))
        return gxs

    def _log(self, phase: str, name: str, operands: Any, params: dict[str, Any], results: tuple[Any, ...]) -> None:
        scope = self._scopes[-1] if self._scopes else ""
        self.calls.append(Call(phase, name, tuple(operands), dict(params), results, scope))


def _operands(t: Tensor) -> Sequence[Any]:
    """The operands of a tensor from before the block; none if its graph was freed."""
    return t.node.inputs if t.node is not None else ()


def _line() -> tuple[str, int] | None:
    """The innermost line of the program outside the package."""
    frame: FrameType | None = sys._getframe(2)
    while frame and (frame.f_code.co_filename.startswith(PACKAGE) or "contextlib" in frame.f_code.co_filename):
        frame = frame.f_back
    return (frame.f_code.co_filename, frame.f_lineno) if frame else None
