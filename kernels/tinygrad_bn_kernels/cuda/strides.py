"""Loops over arrays that are broadcast, permuted or sliced: four axes, and a step along each for every array."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

Shape = tuple[int, ...]

AXES = 4  # of a walk; the threads of a block take its rows, which lie along the last axis

# Few long rows would occupy few warps: rows of LONG elements or more are split into parts of PART, unless there are
# MANY rows.
LONG, PART, MANY = 1024, 256, 4096


class Walk(NamedTuple):
    """One launch: lengths of the four axes, and the first element and the steps of each array."""

    shape: Shape
    starts: Shape
    steps: tuple[Shape, ...]

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])


def contiguous(shape: Shape) -> Shape:
    """The steps of a C-contiguous array, in elements."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def broadcast(shape: Shape, to: Shape) -> Shape:
    """The steps of an array of `shape` that is broadcast to shape `to`: 0 along repeated axes."""
    lead = len(to) - len(shape)
    own = contiguous(shape)
    return tuple(0 if i < lead or shape[i - lead] == 1 else own[i - lead] for i in range(len(to)))


def walks(shape: Shape, starts: Sequence[int], steps: Sequence[Shape]) -> Iterator[Walk]:
    """All elements of `shape` in walks of four axes. Adjacent axes are merged, so there is nearly always one walk."""
    axes: list[tuple[int, list[int]]] = []  # last axis first: length, and the step of each array
    for i in reversed(range(len(shape))):
        if shape[i] == 1:
            continue
        step = [s[i] for s in steps]
        if axes and all(s == t * axes[-1][0] for s, t in zip(step, axes[-1][1], strict=True)):
            axes[-1] = axes[-1][0] * shape[i], axes[-1][1]
        else:
            axes.append((shape[i], step))
    axes = axes[::-1]
    rows = math.prod(n for n, _ in axes[:-1])
    if axes and axes[-1][0] >= LONG and rows < MANY:
        *lead, (length, step) = axes
        whole = length // PART
        yield from _walks([*lead, (whole, [s * PART for s in step]), (PART, step)], starts)
        if rest := length % PART:
            yield from _walks([*lead, (rest, step)], [a + whole * PART * s for a, s in zip(starts, step, strict=True)])
    else:
        yield from _walks(axes, starts)


def _walks(axes: list[tuple[int, list[int]]], starts: Sequence[int]) -> Iterator[Walk]:
    """The elements of these axes in walks of four axes."""
    outer, inner = axes[: max(len(axes) - AXES, 0)], axes[max(len(axes) - AXES, 0) :]
    inner = [(1, [0] * len(starts))] * (AXES - len(inner)) + inner
    lengths = tuple(n for n, _ in inner)
    inner_steps = tuple(tuple(s[k] for _, s in inner) for k in range(len(starts)))
    for place in itertools.product(*(range(n) for n, _ in outer)):
        at = [start + sum(i * s[k] for i, (_, s) in zip(place, outer, strict=True)) for k, start in enumerate(starts)]
        yield Walk(lengths, tuple(at), inner_steps)


def row_block(inner: int, rows: int = MANY) -> tuple[int, int]:
    """Shape of a block of 256 threads, along the last axis and across rows, with few idle threads."""
    along = 32 if rows >= MANY else 256
    while along > 1 and along // 2 >= inner:
        along //= 2
    return along, 256 // along
