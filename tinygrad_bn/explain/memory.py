"""What each layer holds in memory: its result, what it keeps for the backward pass, and its gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from tinygrad_bn.explain.steps import Layer, size_of

if TYPE_CHECKING:
    from tinygrad_bn.explain.explanation import Explanation


class Memory(NamedTuple):
    """The bytes of a layer: of its result, of what it keeps for the backward pass, and of its gradients."""

    sizes: tuple[int, int, int]
    result: Any  # the array


def memory(e: Explanation) -> dict[str, Memory]:
    """For each layer, what it holds in a plain run, with fused ops.

    An array that several layers keep counts for the first; a result that is kept counts in both columns, and a
    parameter, which is there anyway, in none. The gradients are those of the result and of the layer's parameters.
    """
    seen = {id(step.array) for step in e.steps if step.op is None and step.scope}  # parameters and buffers
    groups: dict[str, list[Layer]] = {}
    for layer in e.layers:
        groups.setdefault(layer.scope or layer.op.name, []).append(layer)
    return {name: _of(e, name, layers, seen) for name, layers in groups.items()}


def _of(e: Explanation, name: str, layers: list[Layer], seen: set[int]) -> Memory:
    kept: list[Any] = [a for layer in layers for a in layer.kept if id(a) not in seen]
    seen.update(map(id, kept))
    result = layers[-1].result
    holders = {id(result)} | {id(s.array) for s in e.steps if s.op is None and s.scope == name}
    gradients = [g for p in e.passes[-1:] for s, g in p.grads.items() if id(s.array) in holders]
    return Memory((size_of([result]), size_of(kept), size_of(gradients)), result)
