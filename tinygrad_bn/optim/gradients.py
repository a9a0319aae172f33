"""The gradients that an optimiser reads: checked, and clipped by norm or by value."""

import builtins
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from tinygrad_bn.arguments import at_least_single, expect_number
from tinygrad_bn.backend import Array, as_array, device_of, expect_one_place
from tinygrad_bn.more_ops import abs, clip, max
from tinygrad_bn.ops import astype, div, mul
from tinygrad_bn.optim.flat import LARGE, joined
from tinygrad_bn.sample import REAL, elementwise
from tinygrad_bn.tensor import Operand, Tensor, primitive


def gradient_of(p: Tensor) -> Any:
    """The array of a parameter's gradient, or None. Raises ValueError if it is on another device."""
    if p._grad is None:
        return None
    array = p._grad._data
    if type(array) is not type(p._data):
        expect_one_place((p._data, array))
    return array


def listed(params: Any) -> list[Any]:
    """Tensors, or groups of them, as a list; one is a list of one."""
    alone = isinstance(params, Tensor | str | Mapping) or not isinstance(params, Iterable)
    return [params] if alone else list(params)


def expect_tensors(params: list[Any]) -> None:
    """Raise TypeError unless all are tensors."""
    if wrong := [p for p in params if not isinstance(p, Tensor)]:
        name = type(wrong[0]).__name__
        raise TypeError(f"params are tensors, as model.parameters() gives them, or groups of tensors; got a {name}")


def _gradients(params: Any) -> list[tuple[Tensor, Array]]:
    expect_tensors(params := listed(params))
    return [(p, g) for p in params if (g := gradient_of(p)) is not None]


@primitive(None, formula="y = Σ g² of all elements", sample=elementwise(REAL))
def squared_norm(g: Operand) -> Any:
    """Sum of the squares of all elements, 0-d float64."""
    return np.sum(np.square(g, dtype=np.float64))


def _by_likeness(arrays: list[Array]) -> list[Array]:
    """The same elements in flat arrays. Small arrays are joined, since a call costs more than their elements."""
    alike: dict[Any, list[Array]] = {}
    for i, a in enumerate(arrays):
        alike.setdefault((a.dtype, device_of(a), i if a.size >= LARGE else None), []).append(a)
    return [joined(some) for some in alike.values()]


def _norm(arrays: list[Array]) -> float:
    """The 2-norm of all elements. Those whose squares overflow, or vanish, are divided by the largest first."""
    groups = _by_likeness(arrays)
    total = sum(float(squared_norm(a)) for a in groups)
    if 1e-200 < total < math.inf:
        return math.sqrt(total)
    top = builtins.max((float(max(abs(a))) for a in groups if a.size), default=0.0)
    if not 0 < top < math.inf:
        return top
    return top * math.sqrt(sum(float(squared_norm(div(astype(a, dtype=np.float64), top))) for a in groups))


def all_finite(arrays: list[Array]) -> bool:
    """Whether no element is NaN or infinite; on a GPU, nor the sum of their squares."""
    return all(
        np.isfinite(a).all() if device_of(a) == "cpu" else math.isfinite(squared_norm(a)) for a in _by_likeness(arrays)
    )


def clip_grad_norm_(params: Tensor | Iterable[Tensor], max_norm: float) -> float:
    """Scale all gradients together so that their common 2-norm is at most `max_norm`; return the norm before.

    The factor of gradients with a larger norm is max_norm / (norm + 1e-6), as in PyTorch. A norm that is not finite
    leaves the gradients unchanged, so that the fault shows. Raises ValueError for a `max_norm` below 0, TypeError for
    params that are not tensors.
    """
    max_norm = expect_number("max_norm", max_norm, 0, finite=False)
    return _clip_norm(listed(params), max_norm)


def _clip_norm(params: list[Any], max_norm: float) -> float:
    gradients = _gradients(params)
    norm = _norm([g for _, g in gradients])
    if math.isfinite(norm) and norm > max_norm:
        factor = max_norm / (norm + 1e-6)  # as in PyTorch
        for p, g in gradients:
            scaled = mul(astype(g, dtype=at_least_single(g.dtype)), factor)
            p.grad = Tensor._of(as_array(astype(scaled, dtype=g.dtype)))  # half precision would round the factor
    return norm


def clip_grad_value_(params: Tensor | Iterable[Tensor], clip_value: float) -> None:
    """Limit every element of every gradient to [−clip_value, clip_value]; ValueError for a limit below 0."""
    clip_value = expect_number("clip_value", clip_value, 0, finite=False)
    _clip_value(listed(params), clip_value)


def _clip_value(params: list[Any], clip_value: float) -> None:
    for p, g in _gradients(params):
        p.grad = Tensor._of(as_array(clip(g, min=-clip_value, max=clip_value)))
