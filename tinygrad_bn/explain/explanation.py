"""`explain`: record a computation, and ask for any step of it by name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from tinygrad_bn import backend, hooks
from tinygrad_bn.explain import names
from tinygrad_bn.explain.paths import Way, parting, ways
from tinygrad_bn.explain.recorder import Recorder
from tinygrad_bn.explain.steps import Call, Layer, Pass, Step
from tinygrad_bn.modes import composed
from tinygrad_bn.nn.module import Module, being_observed, observe
from tinygrad_bn.notebook import array_html, constructor, largest
from tinygrad_bn.tensor import Array, Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tinygrad_bn.explain.check import Verdict
    from tinygrad_bn.explain.graph import Expand
    from tinygrad_bn.explain.table import Table


class View:
    """A step of an explanation: its value, its gradient, and the ways by which the gradient arrives."""

    def __init__(self, explanation: Explanation, step: Step, path: str) -> None:
        self._explanation, self.step, self.path = explanation, step, path

    @property
    def value(self) -> Array:
        """The values, a read-only NumPy array."""
        return self.step.value

    @property
    def grad(self) -> Array | None:
        """The gradient in the last backward pass that reached the step; None if none did."""
        grads = self.grads
        return grads[-1] if grads else None

    @property
    def grads(self) -> list[Array]:
        """Its gradient in each backward pass that reached it."""
        return [backend.to_numpy(p.grads[self.step]) for p in self._explanation.passes if self.step in p.grads]

    @property
    def formula(self) -> str:
        """How it was computed, a line for each op: the call by names, and the op in symbols with its gradient's rule.

        Ops without a name of their own, such as the sum and the division of a mean, are lines of the step that they
        help to compute. `given` for what no op computed.
        """
        from tinygrad_bn.explain.graph import call_in_names, shown_steps

        e, shown = self._explanation, shown_steps(self._explanation).get(self.path)
        steps = shown.steps if shown else [self.step]
        return "\n".join(f"{call_in_names(e, s)}:  {s.formula}" for s in steps if s.op) or "given"

    @property
    def inputs(self) -> list[str]:
        """The names of the steps that it was computed from."""
        return [self._explanation.path_of(s) for s in self.step.sources]

    @property
    def users(self) -> list[str]:
        """The names of the steps that were computed from it."""
        return [self._explanation.path_of(s) for s in self._explanation.steps if self.step in s.sources]

    @property
    def neighbours(self) -> list[Step]:
        """The steps of the same scope, of the same module or fused op."""
        return [s for s in self._explanation.steps if s.scope == self.step.scope]

    @property
    def paths(self) -> Ways:
        """The share of each way in the gradient, `{"x → mu → xmu → …": array}`; they sum to it. Call it with `via`."""
        return Ways(self._explanation, self.step)

    def __repr__(self) -> str:
        gradient = "no gradient" if self.grad is None else "with its gradient"
        return f"<step {self.path}: {self.step.describe()}, {gradient}>"

    def _repr_html_(self) -> str:
        parts = {"value": self.value} | ({} if self.grad is None else {"gradient": self.grad})
        shown = "".join(f"<div>{name}{array_html(array)}</div>" for name, array in parts.items())
        return f"<div><pre>{escape(repr(self))}\n{escape(self.formula)}</pre>{shown}</div>"

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        parts = {"value": self.value, "grad": self.grad, "formula": self.formula}
        return constructor(self, parts, path, subtree_renderer)


class Ways(Mapping[str, Array]):
    """The share of each way in a gradient, computed when asked for; they sum to it.

    `ways(via=["1.var", "1.mu"])` tells them apart by these steps instead of all that the code names.
    """

    def __init__(self, explanation: Explanation, step: Step, via: str | Sequence[str] | None = None) -> None:
        self._explanation, self._step, self._via = explanation, step, via

    def __call__(self, via: str | Sequence[str] | None = None) -> Ways:
        return Ways(self._explanation, self._step, via)

    @cached_property
    def steps(self) -> dict[str, Way]:
        """The steps that each way is told by, from the one asked about."""
        return {label: (self._step, *way) for label, way, _ in self._table}

    @cached_property
    def _shares(self) -> dict[str, Array]:
        return {label: share for label, _, share in self._table}

    @cached_property
    def _table(self) -> list[tuple[str, Way, Array]]:
        e, step = self._explanation, self._step
        p = next((p for p in reversed(e.passes) if step in p.grads), None)
        if p is None:
            frozen = not step.tensor.requires_grad
            why = "it does not require a gradient (requires_grad=True)" if frozen else "call backward() in the block"
            raise ValueError(f"no backward pass reached {e.path_of(step)!r}: {why}")
        via = [self._via] if isinstance(self._via, str) else self._via
        chosen = parting(p, step) if via is None else [e[name].step for name in via]
        shares = {way: backend.to_numpy(g) for way, g in ways(p, step, chosen, e.add).items()}
        for name in (lambda s: s.name, e.path_of):  # the path, where several modules have steps of one name
            labels = [" → ".join((e.path_of(step), *map(name, way))) for way in shares]
            if len(set(labels)) == len(labels):
                break
        return [(label, way, share) for label, (way, share) in zip(labels, shares.items(), strict=True)]

    def __getitem__(self, way: str) -> Array:
        if way not in self._shares:
            raise KeyError(f"there is no way {way!r}; there are {', '.join(map(repr, self._shares))}")
        return self._shares[way]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shares)

    def __len__(self) -> int:
        return len(self._shares)

    def __repr__(self) -> str:
        return "\n".join(f"{way}\n{share}" for way, share in self._shares.items())

    def _repr_html_(self) -> str:
        top = max(map(largest, self._shares.values()), default=1.0)  # of all, as a share may be 0 but for rounding
        return "".join(f"<div>{escape(way)}{array_html(share, top)}</div>" for way, share in self._shares.items())


class Explanation:
    """What was computed in a block, forwards and backwards, by the composition of each fused op.

    `e["1.xhat"]` is a step: see `View`. `e.table()`, `e.program()`, `e.narrate()`, `e.figure()` and `e.html(path)` show
    all of them. A step's name is the path of its module and the variable that the code assigns it to; a tensor of the
    program is found by the variable that holds it at the end of the block, or by what `e.name` calls it.

    Fused ops run as their compositions in the block, so numbers differ from a plain run by rounding.
    """

    def __init__(self) -> None:
        self._recorder = Recorder()
        self._paths: dict[str, Step] | None = None
        self._by_step: dict[Step, str] | None = None
        self._undo = ExitStack()
        self._recording = False

    # ---- recording --------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if self._recorder.steps:
            raise RuntimeError("this explanation has recorded a block already; call explain() for another one")
        with ExitStack() as undo:
            undo.enter_context(hooks.listening(self._recorder))
            undo.enter_context(composed())
            if not being_observed():
                undo.enter_context(observe(lambda module, y: None))  # then Sequential runs each layer by itself
            undo.callback(names.resume, before := sys.getprofile())
            sys.setprofile(self._recorder.locals.watching(before))
            self._undo, self._recording = undo.pop_all(), True
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()
        self._recording = False
        self._paths = self._by_step = None
        for name, t in names.caller_variables(sys._getframe(1)).items():
            if id(t) in self._recorder.steps:
                self._call(t, name)

    def name(self, name: str, t: Tensor) -> None:
        """Call a tensor of the computation so.

        Raises TypeError unless these are a string and a tensor, KeyError for a tensor that is not part of the
        computation, and ValueError for the name of another step.
        """
        if not isinstance(name, str) or not isinstance(t, Tensor):
            raise TypeError(f"name() takes a string and a tensor; got {type(name).__name__} and {type(t).__name__}")
        if id(t) not in self._recorder.steps:
            raise KeyError(f"this tensor of shape {t.shape} took no part in the computation, so {name!r} names nothing")
        taken = self.paths.get(name)
        if taken is not None and taken.tensor is not t:
            raise ValueError(f"{name!r} is the name of another step, {taken.describe()}")
        self._call(t, name, first=True)

    def _call(self, t: Tensor, name: str, first: bool = False) -> None:
        step = self._recorder.steps[id(t)]
        loose = step.op is None and not step.names
        if first or loose or step.scope not in self._module_scopes():
            step.home, step.names = "", [name, *(n for n in step.names if n != name)]
        elif name not in step.aliases:
            step.aliases.append(name)
        self._paths = self._by_step = None

    def _module_scopes(self) -> set[str]:
        return set(self.modules()) - {""}

    # ---- asking -----------------------------------------------------------------------------------------

    @property
    def steps(self) -> list[Step]:
        """Every step, in the order of the forward pass."""
        return list(self._recorder.steps.values())

    @property
    def passes(self) -> list[Pass]:
        """The backward passes, in their order."""
        return self._recorder.passes

    @property
    def paths(self) -> dict[str, Step]:
        """Every step by its name."""
        if self._paths is None or len(self._paths) != len(self._recorder.steps):
            self._paths = names.by_path(self._recorder.steps.values())
        return self._paths

    @property
    def kinds(self) -> dict[str, str]:
        """Of each scope, the type of the module, or the name of the fused op, whose steps are in it."""
        return self._recorder.kinds

    def path_of(self, step: Step) -> str:
        """The name of a step, by which `e[name]` finds it."""
        if self._by_step is None or len(self._by_step) != len(self.paths):
            self._by_step = {s: path for path, s in self.paths.items()}
        return self._by_step[step]

    def __getitem__(self, name: str) -> View:
        """The step of this name. Raises KeyError, with near names, for one that no step or several steps have."""
        try:
            step = names.find(self.paths, name)
        except KeyError as error:
            if self._recording:
                error.add_note("the block is still recording; the program's variables become names when it ends")
            raise
        return View(self, step, self.path_of(step))

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __contains__(self, name: object) -> bool:
        try:
            self[name]  # type: ignore[index]
        except (KeyError, TypeError):
            return False
        return True

    def add(self, a: Any, b: Any) -> Any:
        """The sum of two arrays, on their device."""
        return self._recorder.added(a, b)

    def check(self, mine: Mapping[str, Any] | None = None, **more: Any) -> Verdict:
        """Compare gradients derived by hand with those of the engine, and say of each whether it is right, or why not.

        `e.check(dvar=…, dxmu=…)`, or `e.check({"1.var": …})` where several layers have such steps. See `check.check`.
        """
        from tinygrad_bn.explain.check import check

        return check(self, {**(mine or {}), **more})

    @property
    def calls(self) -> list[Call]:
        """Every call below the seam, in the order of the run."""
        return self._recorder.calls

    @property
    def layers(self) -> list[Layer]:
        """The calls of ops as a plain run makes them, fused where they can be."""
        return self._recorder.layers

    def modules(self) -> dict[str, Module]:
        """The modules that were called, by their paths."""
        return {path: m for outer in self._recorder.modules for path, m in outer.named_modules()}

    # ---- showing ----------------------------------------------------------------------------------------

    def table(self, expand: Expand = None) -> Table:
        """Every step with its value and gradient, and each layer's memory: text in a terminal, HTML in a notebook."""
        from tinygrad_bn.explain.table import steps_table

        return steps_table(self, expand)

    def memory(self) -> Table:
        """What each layer of a plain run holds: its result, what it keeps for the backward pass, and its gradient."""
        from tinygrad_bn.explain.table import memory_table

        return memory_table(self)

    def program(self) -> str:
        """Every call below the seam, in the order of the run: forward, backward and update."""
        from tinygrad_bn.explain.program import program

        return program(self)

    def narrate(self, lang: str = "en", of: str | None = None) -> str:
        """The backward pass told step by step, in English ("en") or Korean ("ko"); `of` names one BatchNorm."""
        from tinygrad_bn.explain.narrate import narrate

        return narrate(self, lang, of)

    def figure(self, expand: Expand = None) -> Figure:
        """The graph from left to right, with values and gradients as colours."""
        from tinygrad_bn.explain.figure import figure

        return figure(self, expand)

    def html(self, path: str | Path, expand: Expand = None) -> Path:
        """Write one page that needs no network: the graph, and behind each step its formula, numbers and gradient."""
        from tinygrad_bn.explain.page import write_page

        return write_page(self, path, expand)

    def __repr__(self) -> str:
        return f"<explanation of {len(self.steps)} steps and {len(self.passes)} backward passes>"

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        from tinygrad_bn.explain.graph import shown_steps

        steps: dict[str, dict[str, View]] = {}
        for key, node in shown_steps(self).items():
            steps.setdefault(node.scope, {})[node.name] = self[key]
        return constructor(self, {"steps": steps}, path, subtree_renderer)


def explain(f: Callable[..., Any] | None = None, *inputs: Any, g: Any = None) -> Explanation:
    """Record a computation: what every step computed, its gradient, and the ways by which gradients arrive.

    `with explain() as e:` records a block. `explain(f, *inputs)` records `f(*inputs)` and, if the result is one number
    or its gradient `g` is given, the backward pass. Arrays of floating-point numbers become tensors that require a
    gradient, and so do lists of them. The inputs are called as the parameters of `f`, the result `result`. Raises
    TypeError if `f` is no function.

    >>> from tinygrad_bn import functional as F
    >>> x = Tensor([[1.0], [2.0], [6.0]], requires_grad=True)
    >>> with explain() as e:
    ...     y = F.batch_norm(x, training=True)
    ...     y.backward([[1.0], [0.0], [0.0]])
    >>> e["mu"].value
    array([[3.]])
    >>> list(e["x"].paths)[0]
    'x → xmu → xhat → y'
    """
    e = Explanation()
    if f is None:
        return e
    if not callable(f):
        raise TypeError(f"explain(f, *inputs) takes a function or a module first; got a {type(f).__name__}")
    given = [_as_tensor(x) for x in inputs]
    with e:
        result = f(*given)
        if isinstance(result, Tensor) and result.requires_grad and (g is not None or result.size == 1):
            result.backward(g)
    for name, t in zip(names.parameters_of(f, len(given)), given, strict=True):
        if isinstance(t, Tensor) and id(t) in e._recorder.steps:
            e._call(t, name)
    return e


def _as_tensor(x: Any) -> Any:
    x = np.asarray(x) if isinstance(x, list) else x
    return Tensor(x, requires_grad=True) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x
