"""Places for the steps of a picture: layers from left to right, after Sugiyama, Tagawa & Toda (1981).

A step's layer is the longest way to it. An edge over several layers has a dummy in each between. The longest way of all
is a straight line, the spine; given tensors stand above it and far edges run below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

Point = tuple[float, float]
SWEEPS = 12
DUMMY = 0.35  # how much room an edge takes, where a step takes 1


@dataclass(frozen=True)
class Layout:
    """`place[key]` is (layer, distance from the spine); `routes` have the points of each edge (source, target)."""

    place: dict[str, Point]
    routes: dict[tuple[str, str], list[Point]]


def layout(sources: Mapping[str, Sequence[str]], given: Mapping[str, str], boxes: Mapping[str, str]) -> Layout:
    """Places for the keys of `sources`, which has the sources of each in an order of computation.

    `given` are the keys that nothing computed, with their boxes, and `boxes` those of the others: a given tensor stands
    outside a box that it is not in.
    """
    layers = _layers(sources, given, boxes)
    chains = _chains(sources, layers)
    rows: list[list[str]] = [[] for _ in range(max(layers.values(), default=-1) + 1)]
    before: dict[str, list[str]] = {k: [] for k in layers}
    after: dict[str, list[str]] = {k: [] for k in layers}
    for key, layer in layers.items():
        rows[layer].append(key)
    for chain in chains.values():
        for a, b in pairwise(chain):
            after[a].append(b)
            before[b].append(a)
    spine = _spine(sources, layers, given)
    side = {k: 0 if k in spine else -1 if k in given else 1 for k in layers}
    at: dict[str, float] = {}
    for row in rows:
        row.sort(key=side.__getitem__)
        at |= {k: float(i) for i, k in enumerate(row)}
    for sweep in range(SWEEPS):
        near = after if sweep % 2 else before
        for row in reversed(rows) if sweep % 2 else rows:
            wanted = {k: sum(at[n] for n in near[k]) / len(near[k]) if near[k] else at[k] for k in row}
            row.sort(key=lambda k: (side[k], wanted[k]))
            at |= _spread(row, spine, sources)
    for chain in chains.values():  # a far edge keeps one distance all its length, where it is the outermost
        far = max((at[k] for k in chain[1:-1]), default=0.0)
        at |= {k: far for k in chain[1:-1] if rows[layers[k]][-1] == k}
    place = {k: (float(layers[k]), at[k]) for k in sources}
    routes = {edge: [(float(layers[k]), at[k]) for k in chain] for edge, chain in chains.items()}
    return Layout(place, routes)


def _layers(sources: Mapping[str, Sequence[str]], given: Mapping[str, str], boxes: Mapping[str, str]) -> dict[str, int]:
    layers: dict[str, int] = {}
    for key, from_ in sources.items():  # in an order of computation, so no recursion
        layers[key] = max((layers.get(s, 0) for s in from_), default=-1) + 1
    first: dict[str, str] = {}  # user of each
    for key, from_ in sources.items():
        for s in from_:
            if s not in first or layers[key] < layers[first[s]]:
                first[s] = key
    for key in given:
        if key in first:  # beside its first use, or before the given tensors that are in the box of that
            box = boxes.get(first[key], "")
            outside = box != given[key] and any(given.get(s) == box for s in sources[first[key]])
            layers[key] = layers[first[key]] - (2 if outside else 1)
    least = min(layers.values(), default=0)
    return {key: layer - least for key, layer in layers.items()}


def _chains(sources: Mapping[str, Sequence[str]], layers: dict[str, int]) -> dict[tuple[str, str], list[str]]:
    """The keys of each edge from end to end; adds its dummies to `layers`."""
    chains = {}
    for key, from_ in sources.items():
        for s in from_:
            dummies = {_dummy(s, key, i): i for i in range(layers[s] + 1, layers[key])}
            layers.update(dummies)
            chains[s, key] = [s, *dummies, key]
    return chains


def _dummy(source: str, target: str, layer: int) -> str:
    return f"{source} to {target}, layer {layer}"


def _spine(sources: Mapping[str, Sequence[str]], layers: dict[str, int], given: Mapping[str, str]) -> set[str]:
    key = max(sources, key=lambda k: layers[k], default="")
    spine: set[str] = set()
    while key and key not in spine:  # a folded box that is used twice may come after itself
        spine.add(key)
        computed = [s for s in sources[key] if s not in given] or list(sources[key][:1])
        before = max(computed, key=lambda k: layers[k], default="")
        if before:
            spine |= {_dummy(before, key, i) for i in range(layers[before] + 1, layers[key])}
        key = before
    return spine


def _spread(row: list[str], spine: set[str], sources: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Distances in a layer, with room for each, from its step on the spine, or from the middle."""
    at = [0.0]
    for a, b in pairwise(row):
        at.append(at[-1] + sum((1.0 if k in sources else DUMMY) / 2 for k in (a, b)))
    zero = next((i for i, k in enumerate(row) if k in spine), None)
    middle = at[zero] if zero is not None else (at[0] + at[-1]) / 2
    return {k: a - middle for k, a in zip(row, at, strict=True)}
