"""Values of Python as JSON that gives back the same values, with the arrays among them set apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tinygrad_bn.arguments import full_name, python_scalar
from tinygrad_bn.backend import Array

BITS = 10_000  # of an integer that JSON may hold; Python refuses to read texts of more than 4,300 digits
LONG = 100  # numbers in a list that is kept as an array


def pack(value: Any, name: str, arrays: dict[str, Array]) -> Any:
    """`value` for `json.dumps`. An array goes to `arrays`, under `name` and its place in `value`.

    Tuples, long integers and lists, arrays, and dictionaries with other keys than texts become `{"$kind": …}`.

    Raises TypeError for anything else than numbers, texts, None, lists, tuples, dictionaries and arrays.
    """
    value = python_scalar(value)
    if isinstance(value, np.ndarray):
        if not (value.dtype.kind in "biuf" and value.dtype.itemsize <= 8):
            raise TypeError(f"{name} is an array of {value.dtype}; only numbers and booleans can be saved")
        while name in arrays:  # as of the keys 1 and "1"
            name += "'"
        arrays[name] = value
        return {"$array": name}
    if isinstance(value, int) and value.bit_length() > BITS:
        return {"$int": hex(value)}
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, list) and len(value) >= LONG and all(type(v) is float for v in value):
        return {"$floats": pack(np.array(value), name, arrays)["$array"]}
    if isinstance(value, list | tuple):
        items = [pack(v, f"{name}/{i}", arrays) for i, v in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, Mapping):
        if not all(type(k) in (str, int) for k in value):
            raise TypeError(f"{name} has keys that are neither texts nor integers: {list(value)!r:.200}")
        packed = [(k, pack(v, f"{name}/{k}", arrays)) for k, v in value.items()]
        plain = all(isinstance(k, str) and not k.startswith("$") for k in value)
        return dict(packed) if plain else {"$dict": packed}
    raise TypeError(
        f"{name} is {full_name(value)}; numbers, texts, None, lists, tuples, dictionaries and arrays can be saved"
    )


def unpack(value: Any, arrays: Mapping[str, Array]) -> Any:
    """What `pack` was given. Raises KeyError, TypeError or ValueError if `value` is none of its results."""
    if isinstance(value, list):
        return [unpack(v, arrays) for v in value]
    if not isinstance(value, dict):
        return value
    kind = next(iter(value), "")
    if not kind.startswith("$"):
        return {k: unpack(v, arrays) for k, v in value.items()}
    inside = value[kind]
    if kind == "$array":
        return arrays[inside]
    if kind == "$floats":
        return [float(v) for v in arrays[inside]]
    if kind == "$int":
        return int(inside, 16)
    if kind == "$tuple":
        return tuple(unpack(v, arrays) for v in inside)
    if kind == "$dict":
        return {k: unpack(v, arrays) for k, v in inside}
    raise ValueError(f"unknown kind {kind!r}")
