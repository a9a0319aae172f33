"""How losses were reduced to one number: what a mean over several batches has to know of each batch."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

from tinygrad_bn.modes import Mode


class Reduced(NamedTuple):
    """A loss of `size` elements that was reduced to `result`: their mean, or their sum if `summed`.

    `total` is what a mean was divided by: the number of elements, or of those that count, or the sum of their weights.
    Elements whose target is `ignored` do not count.
    """

    result: Any
    summed: bool
    total: float
    size: int
    ignored: int | None


_listener: ContextVar[list[Reduced] | None] = ContextVar("listener", default=None)


def reductions(made: list[Reduced]) -> Mode:
    """In this block, every loss that is reduced is appended to `made`."""
    return Mode(_listener, made)


def note(
    result: Any, reduction: str, size: int, ignored: int | None, total: Callable[..., Any], *operands: Any
) -> None:
    """Tell the listener of a loss of `size` elements that was reduced to `result`; for the arguments see `Reduced`.

    `total` is a function of `operands`, since reading a number may wait for the device: only a listener calls it.
    """
    made = _listener.get()
    if made is not None and reduction != "none":
        made.append(Reduced(result, reduction == "sum", float(total(*operands)), size, ignored))
