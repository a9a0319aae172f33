"""What an op does with memory: it leaves that of its operands, takes any layout, and gives its own in every call."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from tinygrad_bn import backend
from tinygrad_bn.arguments import is_floating
from tinygrad_bn.sample import Array
from tinygrad_bn.tensor import Op, Tensor, apply
from tinygrad_bn.testing.calls import (
    Operands,
    Params,
    Results,
    by_kernel,
    cast_real,
    expect_close,
    kernel_dtypes,
    overwritten,
    positions,
    results,
    takes,
)
from tinygrad_bn.testing.diagnosis import names_of
from tinygrad_bn.testing.gradients import GradcheckError


def nothing_is_mutated_or_shared(op: Op, xs: Operands, params: Params, seed: int) -> None:
    """Operands and cotangent stay as they are; two gradients share no memory, and have the dtype of their operand."""
    for dtype in (np.float32, np.float64):
        _nothing_is_mutated_or_shared(op, cast_real(xs, dtype), params, seed)


def _nothing_is_mutated_or_shared(op: Op, xs: Operands, params: Params, seed: int) -> None:
    ts = [x if x is None else Tensor(x, requires_grad=op.differentiable and is_floating(x)) for x in xs]
    y = apply(op, [t if t is None else t._data for t in ts] if op.updates else ts, params)[0]
    updated, names = overwritten(op), names_of(op.forward, len(xs))
    each = enumerate(zip(ts, xs, names, strict=True))
    fixed = [(t, x, name) for i, (t, x, name) in each if t is not None and i not in updated]
    forward, backward = (by_kernel(f"the {way} pass of {op.name!r}", name) for way, name in _passes(op))
    for t, x, name in fixed:
        expect_unchanged(t.numpy(), x, f"{forward} changed operand {name}")
    if not op.differentiable or not y.requires_grad:
        return
    g = Tensor(np.random.default_rng(seed).normal(size=y.shape), dtype=y.dtype)
    before = g.numpy().copy(), y.numpy().copy()
    y.backward(g)
    expect_unchanged(g.numpy(), before[0], f"{backward} changed the gradient of the result")
    expect_unchanged(y.numpy(), before[1], f"{backward} changed the result")
    for t, x, name in fixed:
        expect_unchanged(t.numpy(), x, f"{backward} changed operand {name}")
    gradients = [(t, t.grad, name) for t, _, name in fixed if t.grad is not None]
    for a, b in itertools.combinations([g, *(gradient for _, gradient, _ in gradients)], 2):
        if np.shares_memory(a.numpy(), b.numpy()):
            raise GradcheckError(f"two gradients of {op.name!r} share memory")
    for t, gradient, name in gradients:
        if (gradient.dtype, gradient.shape) != (t.dtype, t.shape):
            raise GradcheckError(
                f"the gradient of operand {name} is {gradient.dtype} {gradient.shape}; expected {t.dtype} {t.shape}"
            )


def _passes(op: Op) -> tuple[tuple[str, str], tuple[str, str]]:
    return ("forward", op.name), ("backward", op.vjp)


def expect_unchanged(got: Array, before: Array, what: str) -> None:
    """Raise GradcheckError, which starts with `what`, unless the arrays are equal."""
    if not np.array_equal(got, before, equal_nan=got.dtype.kind == "f"):
        raise GradcheckError(f"{what}: it writes into its memory; make a new array")


def two_calls_agree(op: Op, xs: Operands, params: Params, seed: int) -> None:
    """A second call gives the same numbers, in memory of its own."""
    for dtype in kernel_dtypes(op):
        first, second = (_arrays_of_a_call(op, cast_real(xs, dtype), params, seed) for _ in range(2))
        for (what, a), (_, b) in zip(first, second, strict=True):
            if np.shares_memory(a, b):
                raise GradcheckError(
                    f"{what} of {op.name!r} lies in the same memory in two calls: the second call overwrites what the "
                    "first one gave. Make a new array in every call"
                )
            try:
                expect_close(a, b, 1e-5, what)
            except GradcheckError:
                raise GradcheckError(
                    f"{what} of {op.name!r} differs between two calls with the same operands. An op is a function of "
                    "its operands and options alone: draw random numbers from an option, as dropout_by_key does"
                ) from None


def _arrays_of_a_call(op: Op, xs: Operands, params: Params, seed: int) -> Results:
    """What the forward pass gives, with by-products, and the kernel or the rules: the arrays themselves."""
    y, saved = backend.forward(op, xs, params)
    found = [
        (by_kernel("the result", op.name), y),
        *((by_kernel(f"the by-product {name!r}", op.name), s) for name, s in zip(op.saves, saved, strict=True)),
    ]
    if op.differentiable and y.dtype.kind == "f":
        real, names = positions(op, xs), names_of(op.forward, len(xs))
        g = np.random.default_rng(seed).normal(size=y.shape).astype(y.dtype)
        gxs = backend.vjp(op, g, y, xs, params, [i in real for i in range(len(xs))], saved)
        for name, gx in zip(names, [] if gxs is NotImplemented else gxs, strict=False):
            found.append((by_kernel(f"the gradient of operand {name}", op.vjp), gx))
    return [(what, a) for what, a in found if isinstance(a, np.ndarray)]


# ---- layout ----------------------------------------------------------------------------------------------


def _spread(x: Array) -> Array:
    wide = np.zeros((*x.shape, 2), x.dtype)
    wide[..., 0] = x
    return wide[..., 0]


# Ways that an array may lie in memory, as slices, transposed and repeated arrays do. The last two change its numbers.
LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "with gaps": _spread,
    "by columns, as a transposed array": np.asfortranarray,
    "in reverse, as x[::-1]": lambda x: np.flip(np.flip(x).copy()),
    "repeated along axis 0, as by broadcast_to": lambda x: np.broadcast_to(x[:1], x.shape),
    "one number repeated, as the gradient of a sum": lambda x: np.broadcast_to(x.flat[0], x.shape),
}
LAST = list(LAYOUTS)[-1]


def layout_does_not_matter(op: Op, xs: Operands, params: Params, seed: int) -> None:
    """Operands, or a gradient that arrives, which are not contiguous give the same as contiguous copies."""
    if op.updates:
        return  # state, which is contiguous
    names = names_of(op.forward, len(xs))
    for dtype in kernel_dtypes(op):
        cast, tolerance = cast_real(xs, dtype), 1e-12 if dtype == np.float64 else 1e-5
        y = np.asarray(apply(op, cast, params)[0])
        g = np.random.default_rng(seed).normal(size=y.shape).astype(y.dtype if y.dtype.kind == "f" else dtype)

        def expect_same(given: Operands, g: Array, how: str, dtype: Any = dtype, tolerance: float = tolerance) -> None:
            wanted = results(op, contiguous(given), params, seed, dtype, g=np.array(g, order="C"))
            for (what, got), (_, want) in zip(results(op, given, params, seed, dtype, g=g), wanted, strict=True):
                expect_close(got, want, tolerance, f"{what} of {op.name!r} {how}")

        for how, arranged in LAYOUTS.items():
            moved = [i for i, x in enumerate(cast) if x is not None and how != LAST and _changes(arranged, x)]
            for places in (moved, moved[:1])[: len(moved)]:  # all of them, and one beside others that are contiguous
                given = tuple(arranged(x) if i in places else x for i, x in enumerate(cast))
                if not takes(op, given, params):  # repeated numbers may be none that the op is for
                    continue
                lie = f"{' and '.join(names[i] for i in places)} {'lies' if len(places) == 1 else 'lie'}"
                expect_same(given, g, f"where {lie} {how},")
            if op.differentiable and _changes(arranged, g):
                expect_same(cast, arranged(g), f"for a gradient of the result that lies {how},")


def contiguous(xs: Operands) -> Operands:
    """Copies of the operands, each row after row."""
    return tuple(x if x is None else np.array(x, order="C") for x in xs)


def _changes(arranged: Callable[[Array], Array], x: Array) -> bool:
    return x.size > 1 and x.ndim > 0 and arranged(x).strides != x.strides
