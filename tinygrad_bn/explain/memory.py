"""What each layer holds in memory: its result, what it keeps for the backward pass, and its gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tinygrad_bn.explain.graph import label
from tinygrad_bn.explain.steps import Layer, size_of
from tinygrad_bn.explain.table import Table

if TYPE_CHECKING:
    from tinygrad_bn.explain.explanation import Explanation


def memory(e: Explanation) -> dict[str, dict[str, int]]:
    """For each layer, bytes of `result`, `kept` and `gradient`, as a plain run of the layer has them, with fused ops.

    An array that several layers keep counts for the first; a result that is kept counts in both columns, and a
    parameter, which is there anyway, in none. `gradient` is that of the result and of the layer's parameters.
    """
    seen = {id(step.array) for step in e.steps if step.op is None and step.scope}  # parameters and buffers
    groups: dict[str, list[Layer]] = {}
    for layer in e.layers:
        groups.setdefault(layer.scope or layer.op.name, []).append(layer)
    return {name: _of(e, name, layers, seen) for name, layers in groups.items()}


def _of(e: Explanation, name: str, layers: list[Layer], seen: set[int]) -> dict[str, int]:
    kept: list[Any] = [a for layer in layers for a in layer.kept if id(a) not in seen]
    seen.update(map(id, kept))
    result = layers[-1].result
    holders = {id(result)} | {id(s.array) for s in e.steps if s.op is None and s.scope == name}
    gradients = [g for p in e.passes[-1:] for s, g in p.grads.items() if id(s.array) in holders]
    return {"result": size_of([result]), "kept": size_of(kept), "gradient": size_of(gradients)}


def memory_table(e: Explanation) -> Table:
    """`memory` as a table, with the sum of each column."""
    held = memory(e)
    columns = ("result", "kept", "gradient")
    rows = [(label(e, name) if name in e.kinds else name, *(f"{m[c]:,}" for c in columns)) for name, m in held.items()]
    total = ("together", *(f"{sum(m[c] for m in held.values()):,}" for c in columns))
    head = ("layer", "result", "kept for backward", "gradient")
    return Table("Memory of each layer of a plain run, in bytes", head, [*rows, total])
