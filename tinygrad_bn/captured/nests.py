"""Nests of tuples, also named ones, lists and dictionaries, with places in them for what differs from step to step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinygrad_bn.tensor import Tensor

SCALARS = (int, float, str, bool, type(None), np.dtype, np.generic, slice)


@dataclass(frozen=True)
class Place:
    """A slot, among the arguments of a call or in the result of a step; its array as a tensor if `tensor`."""

    slot: int
    tensor: bool = False

    def get(self, s: list[Any]) -> Any:
        """What lies there now."""
        return Tensor._of(s[self.slot]) if self.tensor else s[self.slot]


def mapped(function: Callable[[Any], Any], nest: Any) -> Any:
    """The same nest, with `function` of each leaf."""
    if type(nest) in (dict, OrderedDict):
        return type(nest)((k, mapped(function, v)) for k, v in nest.items())
    if type(nest) in (tuple, list):
        return type(nest)([mapped(function, v) for v in nest])
    if isinstance(nest, tuple) and hasattr(nest, "_fields"):  # a named tuple
        return type(nest)(*[mapped(function, v) for v in nest])
    return function(nest)


def filled(nest: Any, s: list[Any]) -> Any:
    """The nest with what lies in its places now."""
    return mapped(lambda leaf: leaf.get(s) if type(leaf) is Place else leaf, nest)


def slots_in(nest: Any) -> Iterator[int]:
    """The slots of the places in it."""
    if isinstance(nest, dict | tuple | list):
        for part in nest.values() if isinstance(nest, dict) else nest:
            yield from slots_in(part)
    elif type(nest) is Place:
        yield nest.slot


def same(a: Any, b: Any) -> bool:
    """Whether they mean the same in a program: one object, or equal numbers and texts, or nests of such."""
    if a is b:
        return True
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, tuple | list) and type(a) is type(b):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and isinstance(a, (*SCALARS, Place)) and (a == b or repr(a) == repr(b))  # NaN
