"""The smallest operands for which a check of an op still fails, as a person would try them by hand."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from tinygrad_bn.arguments import is_floating
from tinygrad_bn.tensor import Op
from tinygrad_bn.testing.calls import Check, Operands, Params, takes
from tinygrad_bn.testing.diagnosis import names_of

TRIES = 60
MOST = 12  # elements that are written out


def smallest(
    check: Check,
    op: Op,
    xs: Operands,
    params: Params,
    seed: int,
    error: Exception,
) -> Operands:
    """Operands, with fewer elements and simpler numbers, for which `check` raises the same error."""
    wanted, tries, found = _kind(error), 0, True
    while found:
        found = False
        for simpler in _simpler(xs):
            tries += 1
            if tries > TRIES:
                return xs
            if takes(op, simpler, params) and _raised(check, op, simpler, params, seed) == wanted:
                xs, found = simpler, True
                break
    return xs


def _kind(error: Exception) -> tuple[type, str]:
    """What two errors share if they are about the same fault: their type, and the words before any number."""
    words = next((line for line in str(error).splitlines() if line.strip()), "")
    return type(error), re.split(r"[-+]?\d|; |\(", words, maxsplit=1)[0]


def _raised(check: Any, op: Op, xs: Operands, params: Params, seed: int) -> Any:
    try:
        check(op, tuple(x if x is None else x.copy() for x in xs), params, seed)
    except Exception as error:
        return _kind(error)
    return None


def _simpler(xs: Operands) -> Iterator[Operands]:
    """Operands that are shorter along one axis, then such with simpler numbers."""
    sides = {(i - x.ndim, n) for x in xs if x is not None for i, n in enumerate(x.shape) if n > 1}
    for axis, n in sorted(sides, key=lambda side: -side[1]):  # by the axis from the right, as shapes broadcast
        for length in (1, n // 2, n - 1):
            if 0 < length < n:
                yield tuple(
                    x if x is None or -axis > x.ndim or x.shape[axis] != n else x.take(range(length), axis) for x in xs
                )
    for digits in (0, 1):
        rounded = tuple(_rounded(x, digits) if is_floating(x) else x for x in xs)
        if any(x is not None and bool((x != r).any()) for x, r in zip(xs, rounded, strict=True)):
            yield rounded


def _rounded(x: Any, digits: int) -> Any:
    """Rounded, but not to 0."""
    near = np.round(x, digits)
    return near if digits and x.size > MOST else np.where((near == 0) & (x != 0), np.copysign(1.0, x), near)


def example(op: Op, xs: Operands, params: Params) -> str:
    """Operands and options written out: `x = [[1.0, 2.0]], k = 2.0`."""
    names = [name.strip("'") for name in names_of(op.forward, len(xs))]
    words = [
        f"{name} = {x.tolist() if x is not None and x.size <= MOST else None if x is None else f'of shape {x.shape}'}"
        for name, x in zip(names, xs, strict=True)
    ]
    return ", ".join(words + [f"{option} = {value!r}" for option, value in params.items()])
