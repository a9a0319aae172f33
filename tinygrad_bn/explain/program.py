"""The straight list of every call below the seam, as text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tinygrad_bn.explain.explanation import Explanation


def program(e: Explanation) -> str:
    """A line for each call, `results = op(operands, options)`, under the names of the phases.

    Steps have their names; the gradient of a step is ∂ and its name; other arrays are a, b, c …, such as a sum of
    gradients that is not complete. A name is that of an array: two steps with one array as gradient share it.
    """
    names: dict[int, str] = {}
    for p in e.passes:
        names |= {id(g): f"∂{e.path_of(s)}" for s, g in p.grads.items()}
    names |= {id(s.array): path for path, s in reversed(e.paths.items())}
    letters, taken = 0, set(names.values())
    lines, phase = [], ""

    def name(array: Any) -> str:
        nonlocal letters
        if not hasattr(array, "dtype"):
            return repr(array)
        if isinstance(array, np.generic):
            return repr(array.item())
        if id(array) not in names:
            while (text := _letters(letters)) in taken:
                letters += 1
            names[id(array)] = text
            letters += 1
        return names[id(array)]

    for call in e.calls:
        if call.phase != phase:
            phase = call.phase
            lines.append(f"{phase}:")
        operands = [*map(name, call.operands), *options(call.params)]
        results = ", ".join("_" if r is None else f"{name(r)}{_type(r)}" for r in call.results)
        lines.append(f"  {results} = {call.name}({', '.join(operands)})")
    return "\n".join(lines)


def _type(array: Any) -> str:
    if not hasattr(array, "dtype") or isinstance(array, np.generic):
        return ""
    return f":{array.dtype}[{','.join(map(str, array.shape))}]"


def options(params: dict[str, Any]) -> list[str]:
    """The options of an op: `axis=0`."""
    return [f"{k}={_option(v)}" for k, v in params.items()]


def _option(value: Any) -> str:
    if isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        return str(np.dtype(value))
    text = np.array2string(value, threshold=6, separator=",") if isinstance(value, np.ndarray) else repr(value)
    return " ".join(text.split())[:60]


def _letters(i: int) -> str:
    """a, b, …, z, aa, ab, …"""
    text = ""
    while i >= 0:
        text = chr(ord("a") + i % 26) + text
        i = i // 26 - 1
    return text
