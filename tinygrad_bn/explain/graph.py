"""The graph that tables and pictures show: steps with a name, the helpers they are computed by, and nested boxes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from tinygrad_bn import backend
from tinygrad_bn.explain.program import options
from tinygrad_bn.explain.steps import Step
from tinygrad_bn.nn.module import Module
from tinygrad_bn.tensor import Array

if TYPE_CHECKING:
    from tinygrad_bn.explain.explanation import Explanation

# Which boxes are open: their paths or types, or a function of both; None for the default of what is shown.
Expand: TypeAlias = str | type[Module] | Sequence[str | type[Module]] | Callable[[str, str], bool] | None


@dataclass(eq=False)
class Shown:
    """A step of a picture, with the unnamed steps that it is computed by. A folded box has several steps and no one."""

    path: str
    name: str
    scope: str
    step: Step | None
    steps: list[Step] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)  # paths


def shown_steps(e: Explanation) -> dict[str, Shown]:
    """The steps to show by path, in the order of the forward pass.

    A step without a name belongs to the step that it helps to compute, if there is one in the same scope. What leads
    nowhere, such as the statistics that a layer tracks, and constants are left out.
    """
    users: dict[Step, list[Step]] = defaultdict(list)
    for step in e.steps:
        for source in dict.fromkeys(step.sources):
            users[source].append(step)
    roots = {p.y for p in e.passes}
    place: dict[Step, Step | None] = {}
    for step in reversed(e.steps):
        into = {placed for u in users[step] if (placed := place[u])}
        kept = step in roots or step.all_names or (step.op is not None and not step.scope and not step.inside)
        if not into and (not kept or step.op is None):
            place[step] = None
        elif step.op is None:
            place[step] = step if step.all_names or any(step in p.grads for p in e.passes) else None
        else:
            one = next(iter(into)) if len(into) == 1 else None
            place[step] = (
                one if one and not step.named and step.origin in (one.scope, one.origin) and step not in roots else step
            )
    shown: dict[str, Shown] = {}
    for step in e.steps:
        if place[step] is step:
            path = e.path_of(step)
            shown[path] = Shown(path, path.rpartition(".")[2], _box(step), step)
    for step in e.steps:
        if (into_step := place[step]) is not None:
            node = shown[e.path_of(into_step)]
            if step.op is not None:
                node.steps.append(step)
            for source in step.sources:
                placed = place[source]
                if placed is not None and placed is not into_step and e.path_of(placed) not in node.sources:
                    node.sources.append(e.path_of(placed))
    return shown


def _box(step: Step) -> str:
    """The box of a step. The gradient of a step, which has a graph too, is in a box of its own, as ∂ of that scope."""
    order, of = int(step.backward and not step.named), step
    while of.derivative_of and not of.names:
        order, of = order + 1, of.derivative_of[0]
    return "∂" * order + of.scope if of.scope else ""


def kinds(e: Explanation) -> dict[str, str]:
    """Of each box, the type of the module or the name of the fused op; for boxes of gradients too."""
    orders = range(max((_box(s).count("∂") for s in e.steps), default=0) + 1)
    return {"∂" * order + scope: kind for order in orders for scope, kind in e.kinds.items() if scope}


def boxes(e: Explanation, shown: dict[str, Shown]) -> dict[str, str]:
    """The scopes with steps, and those around them, outermost first: the path of the scope around each, "" for none."""
    scopes = {n.scope for n in shown.values()}
    around = [s for s in kinds(e) if any(inner == s or inner.startswith(f"{s}.") for inner in scopes)]
    return {s: max((o for o in around if s.startswith(f"{o}.")), key=len, default="") for s in sorted(around, key=len)}


def opened(e: Explanation, scopes: Sequence[str], expand: Expand) -> set[str]:
    """Those of the scopes that `expand` opens; by default normalisations, and modules that contain others.

    Raises ValueError for a name that is neither a path nor a type of this computation.
    """
    kind = kinds(e)
    if callable(expand) and not isinstance(expand, type):
        return {s for s in scopes if expand(s, kind[s])}
    outer = {s for s in scopes if any(o.startswith(f"{s}.") for o in scopes)}
    if expand is None:
        return outer | {s for s in scopes if "norm" in kind[s].lower()}
    wanted = [expand] if isinstance(expand, str | type) else list(expand)
    found: set[str] = set()
    for w in wanted:
        name = w if isinstance(w, str) else w.__name__
        fits = {s for s in scopes if name in (s, s.lstrip("∂"), kind[s])}
        if not fits:
            some = ", ".join(f"{s} ({kind[s]})" for s in scopes)
            raise ValueError(f"expand= names {name!r}, which is no box of this computation; there are {some or 'none'}")
        found |= fits | {o for o in outer for s in fits if s.startswith(f"{o}.")}
    return found


def folded(e: Explanation, expand: Expand) -> dict[str, Shown]:
    """The graph with the boxes that `expand` does not open as one node each, called `box:PATH`."""
    shown = shown_steps(e)
    around = boxes(e, shown)
    open_boxes = opened(e, list(around), expand)

    def key(path: str) -> str:
        scope, closed = shown[path].scope, ""
        while scope in around:
            closed = scope if scope not in open_boxes else closed
            scope = around[scope]
        return f"box:{closed}" if closed else path

    out: dict[str, Shown] = {}
    for path, node in shown.items():
        k = key(path)
        if k == path:
            out[k] = Shown(k, node.name, node.scope, node.step, node.steps)
        elif k not in out:
            out[k] = Shown(k, label(e, k[4:]), around[k[4:]], None)
        if k != path:
            out[k].steps += node.steps
        for source in map(key, node.sources):
            if source != k and source not in out[k].sources:
                out[k].sources.append(source)
    return out


def label(e: Explanation, scope: str) -> str:
    """A box in words: `1 BatchNorm1d`; only the op of a fused op, whose path it is."""
    kind = e.kinds[scope.lstrip("∂")]
    return scope if scope.lstrip("∂") == kind else f"{scope} {kind}"


def call_in_names(e: Explanation, step: Step) -> str:
    """The call of a step's op, by the names of its operands: `1.xhat = mul(1.xmu, 1.ivar)`."""
    assert step.op is not None
    operands = [e.path_of(o) if isinstance(o, Step) else repr(o) for o in step.operands]
    return f"{e.path_of(step)} = {step.op.name}({', '.join([*operands, *options(step.params)])})"


def last_gradient(e: Explanation, step: Step) -> Array | None:
    """The gradient of a step in the last backward pass that reached it; None if none did."""
    return next((backend.numpy_view(p.grads[step]) for p in reversed(e.passes) if step in p.grads), None)
