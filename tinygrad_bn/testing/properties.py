"""The properties that every op has. Each takes an op, a sample of its operands and options, and a seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tinygrad_bn import backend
from tinygrad_bn.arguments import is_floating
from tinygrad_bn.autograd import grad
from tinygrad_bn.backend import device_of, kernels_disabled
from tinygrad_bn.modes import composed
from tinygrad_bn.sample import Array
from tinygrad_bn.tensor import Op, Tensor, apply
from tinygrad_bn.testing.calls import (
    Check,
    Operands,
    Params,
    by_kernel,
    cast_real,
    expect_close,
    real_names,
    results_of,
    split_differentiable,
)
from tinygrad_bn.testing.diagnosis import names_of
from tinygrad_bn.testing.gradients import (
    GradcheckError,
    away_from_zero,
    compare,
    compare_second,
    compare_third,
    ridders,
)
from tinygrad_bn.testing.memory import layout_does_not_matter, nothing_is_mutated_or_shared, two_calls_agree


def forward_matches_reference(op: Op, xs: Operands, params: Params, seed: int) -> None:
    """In float64 and float32, through the kernel if there is one: the reference's values, and the dtype kept."""
    whose = by_kernel("the result", op.name) + f" of {op.name!r}"
    with kernels_disabled():
        want = results_of(op, cast_real(xs, np.float64), params)
    for a, b in zip(results_of(op, cast_real(xs, np.float64), params), want, strict=True):
        if a.dtype != b.dtype:
            raise GradcheckError(f"{whose} is {a.dtype} for float64 operands, that of the definition {b.dtype}")
        expect_close(a, b, 1e-12, whose)
    reference = op.forward(*cast_real(xs, np.float64), **params)
    exact = np.asarray(reference[0] if op.saves else reference)
    expect_close(want[0], exact, 1e-12, f"the result of {op.name!r}")
    asked = params.get("dtype") is not None
    if exact.dtype.kind == "f" and not asked and any(map(is_floating, xs)) and exact.dtype != np.float64:
        raise GradcheckError(f"float64 operands gave {exact.dtype}: the forward narrows")
    if exact.dtype == np.float64 and not asked:
        got = apply(op, cast_real(xs, np.float32), params)[0]
        if got.dtype != np.float32 and op.differentiable:
            raise GradcheckError(f"float32 operands gave {got.dtype}: {whose} has to keep their dtype")
        expect_close(got, exact, 1e-5, f"{whose} in float32")


def first_and_second_gradients(op: Op, xs: Operands, params: Params, seed: int) -> None:
    """Both routes back, and the gradient of the gradient, against numerical derivatives."""
    f, real = split_differentiable(op, xs, params, scaled=True)
    if op.differentiable and real:
        names = real_names(op, xs)
        compare(f, real, names, seed=seed)
        compare_second(f, real, names, seed=seed)
        _expect_constant_where_there_is_no_rule(op, xs, params, seed)


def third_derivatives(op: Op, xs: Operands, params: Params, seed: int) -> None:
    """The gradient of a directional derivative of the gradient, against a numerical derivative."""
    f, real = split_differentiable(op, xs, params, scaled=True)
    if op.differentiable and real:
        compare_third(f, real, real_names(op, xs), seed=seed)


def _expect_constant_where_there_is_no_rule(op: Op, xs: Sequence[Any], params: Params, seed: int) -> None:
    for i, (x, rule) in enumerate(zip(xs, op.rules, strict=False)):
        if x is None or not is_floating(x) or rule is not None:
            continue
        rng = np.random.default_rng(seed)
        direction = away_from_zero(rng, x.shape)
        v = rng.normal(size=op.split(op.forward(*xs, **params))[0].shape)

        def phi(h: float, i: int = i, moved: Array = direction, v: Any = v) -> float:
            y, _ = op.split(op.forward(*(o + h * moved if j == i else o for j, o in enumerate(xs)), **params))
            return float(np.sum(v * y))

        numeric, error = ridders(phi)
        if abs(numeric) > 1e-6 + 10 * error:
            raise GradcheckError(
                f"operand {names_of(op.forward, len(xs))[i]} has the rule None, but the result varies with it "
                f"(derivative {numeric:+.3g}): give it a rule, or held_constant if it is a constant by choice"
            )


def one_tensor_in_every_slot(op: Op, xs: Operands, params: Params, seed: int) -> None:
    """The same tensor passed for every operand of its shape: its gradients add up."""
    f, real = split_differentiable(op, xs, params, scaled=True)
    one = {x.shape: x for x in real}

    def shared(*ts: Tensor) -> Tensor:
        by_shape = dict(zip(one, ts, strict=True))
        return f(*(by_shape[x.shape] for x in real))

    if len(real) > len(one):
        names = real_names(op, xs)
        named = [" = ".join(n for n, x in zip(names, real, strict=True) if x.shape == shape) for shape in one]
        compare(shared, list(one.values()), named, seed=seed)


def operands_that_depend_on_each_other(op: Op, xs: Operands, params: Params, seed: int) -> None:
    """Later operands computed from the first: every path is counted, once."""
    f, real = split_differentiable(op, xs, params, scaled=True)

    def dependent(a: Tensor) -> Tensor:
        return f(a, *(Tensor(x) + a.sum() * (0.03 / max(a.size, 1)) for x in real[1:]))

    if len(real) > 1:
        compare(dependent, real[:1], [f"{real_names(op, xs)[0]}, which the others depend on"], seed=seed)


def kernels_match_reference(op: Op, xs: Operands, params: Params, seed: int) -> None:
    """Each kernel, forward and backward, against the NumPy reference and the composition's gradient."""
    for dtype, tolerance in ((np.float64, 1e-9), (np.float32, 1e-4)):
        cast, of_op = cast_real(xs, dtype), f" of {op.name!r} in {np.dtype(dtype)}"
        f, real = split_differentiable(op, cast, params)
        if backend.find_kernel(op.name, device_of(cast[0])):
            with kernels_disabled():
                want = results_of(op, cast_real(xs, dtype), params)
            for got, exact in zip(results_of(op, cast, params), want, strict=True):
                expect_close(got, exact, tolerance, by_kernel("the result", op.name) + of_op)
        if backend.find_kernel(op.vjp, device_of(cast[0])):
            ts = [Tensor(x, requires_grad=True) for x in real]
            named = list(zip(ts, real_names(op, xs), strict=True))
            y = reference = f(*ts)
            if op.fused:
                with composed():
                    reference = f(*ts)
            v = Tensor(np.random.default_rng(seed).normal(size=y.shape), dtype=dtype)
            for wanted in (named, *([t] for t in named)):  # a kernel may leave out gradients, or decline
                by = [t for t, _ in wanted]
                by_composition = grad(reference, by, v, create_graph=True)
                for (_, name), a, b in zip(wanted, grad(y, by, v), by_composition, strict=True):
                    whose = by_kernel(f"the gradient of operand {name}", op.vjp) + of_op
                    try:
                        expect_close(a.numpy(), b.numpy(), tolerance, whose)
                    except GradcheckError:
                        _expect_right_without_kernels(op, xs, params, seed)
                        raise


def _expect_right_without_kernels(op: Op, xs: Operands, params: Params, seed: int) -> None:
    """Raise GradcheckError if it is the rules or the composition that are wrong."""
    f, real = split_differentiable(op, xs, params)
    with kernels_disabled():
        compare(f, real, real_names(op, xs), seed=seed)


# What concerns memory first: numbers that change on the way look like anything later. Then the kernels, by name.
PROPERTIES: tuple[Check, ...] = (
    nothing_is_mutated_or_shared,
    two_calls_agree,
    forward_matches_reference,
    kernels_match_reference,
    first_and_second_gradients,
    third_derivatives,
    one_tensor_in_every_slot,
    operands_that_depend_on_each_other,
    layout_does_not_matter,
)
OF_GRADIENTS = (  # against numerical derivatives
    first_and_second_gradients,
    third_derivatives,
    one_tensor_in_every_slot,
    operands_that_depend_on_each_other,
)
