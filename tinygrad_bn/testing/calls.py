"""Calls of an op on the operands of a sample, and their comparison: what all checks of an op use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any, TypeAlias

import numpy as np

from tinygrad_bn.arguments import is_floating
from tinygrad_bn.autograd import grad
from tinygrad_bn.backend import find_kernel, kernels_disabled
from tinygrad_bn.sample import Array
from tinygrad_bn.tensor import Op, Tensor, apply, held_constant
from tinygrad_bn.testing.diagnosis import names_of, of_elements
from tinygrad_bn.testing.gradients import Function, GradcheckError

Operands: TypeAlias = tuple[Any, ...]  # arrays, numbers or None
Params: TypeAlias = dict[str, Any]
Check: TypeAlias = Callable[[Op, Operands, Params, int], None]
Results: TypeAlias = list[tuple[str, Array]]  # what it is, and its numbers


ROUNDING = 1e-14  # what is smaller, beside operands of about 1, may be rounding only


# ---- operands --------------------------------------------------------------------------------------------


def cast_real(xs: Operands, dtype: Any) -> Operands:
    """Copies of the operands, the real ones in `dtype`."""
    return tuple(x.astype(dtype if is_floating(x) else x.dtype) if hasattr(x, "dtype") else x for x in xs)


def copies(xs: Sequence[Any]) -> Operands:
    """Copies of the operands, for an op that may overwrite them."""
    return tuple(x.copy() if hasattr(x, "dtype") else x for x in xs)


def positions(op: Op, xs: Sequence[Any]) -> list[int]:
    """Positions of the operands that the op is differentiable in."""
    fixed = [i for i, rule in enumerate(op.rules) if rule in (None, held_constant)]
    return [i for i, x in enumerate(xs) if is_floating(x) and i not in fixed]


def real_names(op: Op, xs: Operands) -> list[str]:
    """Names of the operands that the op is differentiable in."""
    names = names_of(op.forward, len(xs))
    return [names[i] for i in positions(op, xs)]


def overwritten(op: Op) -> list[int]:
    """Positions of the operands that the op updates."""
    names = list(signature(op.forward).parameters)
    return [names.index(name) for name in op.updates]


def split_differentiable(op: Op, xs: Sequence[Any], params: Params, scaled: bool = False) -> tuple[Function, list[Any]]:
    """The op as a function of the operands that it is differentiable in; the others are held fixed.

    With `scaled`, a result that is tiny is multiplied up to about 1, for comparisons with numerical derivatives.
    """
    real = positions(op, xs)
    size = result_size(op, xs, params) if scaled else 1.0
    factor = 1 / size if ROUNDING < size < 1e-6 else 1.0

    def f(*operands: Tensor) -> Any:
        full: list[Any] = list(xs)
        for i, operand in zip(real, operands, strict=True):
            full[i] = operand
        y = apply(op, full, params)[0]
        return y if factor == 1 else y * factor

    return f, [xs[i] for i in real]


def result_size(op: Op, xs: Sequence[Any], params: Params) -> float:
    """The largest number of the result, without its sign; 0 if it has no elements."""
    return float(np.abs(np.asarray(apply(op, copies(xs), params)[0], np.float64)).max(initial=0))


def has_kernel(op: Op) -> bool:
    """Whether there is a kernel on the CPU, of the op or of its gradients."""
    return bool(find_kernel(op.name, "cpu") or find_kernel(op.vjp, "cpu"))


def kernel_dtypes(op: Op) -> list[Any]:
    """float64; and float32 if there is a kernel, which may take that only."""
    return [np.float64, *([np.float32] if has_kernel(op) else [])]


# ---- results ---------------------------------------------------------------------------------------------


def results_of(op: Op, xs: Operands, params: Params) -> list[Array]:
    """All that a call changes or returns: the result and, without gradients, its by-products and updated operands."""
    y, saved = apply(op, xs, params)
    found = (y, *(xs[i] for i in overwritten(op)), *(() if op.differentiable else saved))
    return [np.asarray(r) for r in found if r is not None]


def results(
    op: Op, xs: Operands, params: Params, seed: int, dtype: Any, exact: bool = False, g: Array | None = None
) -> Results:
    """The result of an op, and the gradient of each operand under `g`, or under a random one that `dtype` holds."""
    if op.updates or not op.differentiable:
        return [(by_kernel("the result", op.name), r) for r in results_of(op, xs, params)]
    ts = {i: Tensor._of(np.asarray(xs[i])) for i in positions(op, xs)}  # not copied: their layout stays
    for t in ts.values():
        t.requires_grad = True
    y = apply(op, [ts.get(i, x) for i, x in enumerate(xs)], params)[0]
    found = [(by_kernel("the result", op.name), np.asarray(y))]
    if isinstance(y, Tensor) and y.requires_grad:
        if g is None:
            g = np.random.default_rng(seed).normal(size=y.shape).astype(dtype)
        cotangent = Tensor._of(np.asarray(g, y.dtype))
        names = names_of(op.forward, len(xs))
        for i, gx in zip(ts, grad(y, list(ts.values()), cotangent, create_graph=exact), strict=True):
            found.append((by_kernel(f"the gradient of operand {names[i]}", op.vjp), gx.numpy()))
    return found


def by_kernel(what: str, name: str) -> str:
    """`what`, with the user's kernel on the CPU that may have computed it."""
    kernel = find_kernel(name, "cpu")
    own = kernel is None or getattr(kernel, "__module__", "").startswith("tinygrad_bn_kernels.")
    return what if own else f"{what}, by the kernel {name!r},"


def expect_close(got: Any, want: Any, tolerance: float, whose: str) -> None:
    """Raise GradcheckError, which says where, unless the numbers agree to `tolerance` of the largest and of 1.

    NaN and infinity agree with themselves.
    """
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape:
        raise GradcheckError(f"{whose} has the shape {got.shape}; expected {want.shape}")
    got, want = got.astype(np.float64), want.astype(np.float64)
    scale = 1 + float(np.abs(want).max(initial=0, where=np.isfinite(want)))
    with np.errstate(invalid="ignore"):
        wrong = ~(np.abs(got - want) <= tolerance * scale) & ~(got == want) & ~(np.isnan(got) & np.isnan(want))
    if wrong.any():
        what = "gradient" if whose.startswith("the gradient") else "result"
        raise GradcheckError(f"{whose} is wrong: {of_elements(got, want, tolerance=tolerance, what=what)}")


def takes(op: Op, xs: Operands, params: Params) -> bool:
    """Whether the reference takes these operands and gives numbers that are finite."""
    try:
        with kernels_disabled(), np.errstate(all="ignore"):
            y = np.asarray(apply(op, cast_real(xs, np.float64), params)[0])
    except Exception:
        return False
    return bool(np.isfinite(y).all())
