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


def layout(sources: Mapping[str, Sequence[str]], given: Sequence[str]) -> Layout:
    """Places for the keys of `sources`, which has the sources of each in an order of computation."""
    layers = _layers(sources)
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
    spine = _spine(sources, layers, set(given))
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


def _layers(sources: Mapping[str, Sequence[str]]) -> dict[str, int]:
    layers: dict[str, int] = {}
    for key, from_ in sources.items():  # in an order of computation, so no recursion
        layers[key] = max((layers.get(s, 0) for s in from_), default=-1) + 1
    users: dict[str, list[int]] = {}
    for key, from_ in sources.items():
        for s in from_:
            users.setdefault(s, []).append(layers[key])
    for key, from_ in sources.items():
        if not from_ and key in users:
            layers[key] = min(users[key]) - 1  # beside its first use
    least = min(layers.values(), default=0)
    return {key: layer - least for key, layer in layers.items()}


def _chains(sources: Mapping[str, Sequence[str]], layers: dict[str, int]) -> dict[tuple[str, str], list[str]]:
    """The keys of each edge from end to end; adds its dummies to `layers`."""
    chains = {}
    for key, from_ in sources.items():
        for s in from_:
            dummies = [f"{s} to {key}, layer {i}" for i in range(layers[s] + 1, layers[key])]
            layers.update({d: layers[s] + 1 + i for i, d in enumerate(dummies)})
            chains[s, key] = [s, *dummies, key]
    return chains


def _spine(sources: Mapping[str, Sequence[str]], layers: dict[str, int], given: set[str]) -> set[str]:
    key = max(sources, key=lambda k: layers[k], default="")
    spine = set()
    while key:
        spine.add(key)
        computed = [s for s in sources[key] if s not in given]
        key = max(computed or (sources[key][:1] if sources[key] else []), key=lambda k: layers[k], default="")
    return spine


def _spread(row: list[str], spine: set[str], sources: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Distances in a layer, with room for each, from its step on the spine, or from the middle."""
    at = [0.0]
    for a, b in pairwise(row):
        at.append(at[-1] + sum((1.0 if k in sources else DUMMY) / 2 for k in (a, b)))
    zero = next((i for i, k in enumerate(row) if k in spine), None)
    middle = at[zero] if zero is not None else (at[0] + at[-1]) / 2
    return {k: a - middle for k, a in zip(row, at, strict=True)}
