"""Checks of gradients, for our ops and for yours.

`gradcheck` compares a function's gradient with a numerical derivative and its error estimate.
`check_op` runs all checks of the test-suite on an op: one line tests an op of yours.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np

from tinygrad_bn import backend
from tinygrad_bn.autograd import grad
from tinygrad_bn.backend import device_of, kernels_disabled
from tinygrad_bn.sample import Array, Domain, Shape
from tinygrad_bn.tensor import OPS, Op, Tensor, apply

__all__ = ["GradcheckError", "GradcheckReport", "VacuousCheckError", "check_op", "gradcheck", "gradgradcheck"]

Function = Callable[..., Tensor]


class GradcheckError(AssertionError):
    """A gradient and its numerical estimate disagree."""


class VacuousCheckError(GradcheckError):
    """A check that would pass whatever the gradient's formula is."""


@dataclass(frozen=True)
class GradcheckReport:
    """The derivative along one random direction of one operand: from the gradient, and from differences."""

    operand: int
    analytic: float
    numeric: float
    error: float  # estimate of the error of `numeric`
    tolerance: float

    @property
    def ok(self) -> bool:
        return abs(self.analytic - self.numeric) <= self.tolerance

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "WRONG"
        return (
            f"operand {self.operand}: gradient {self.analytic:+.10g}, numerical {self.numeric:+.10g} "
            f"± {self.error:.1g}: {verdict} (tolerance {self.tolerance:.1g})"
        )


def ridders(phi: Callable[[float], float], h: float = 0.02) -> tuple[float, float]:
    """Derivative of `phi` at 0 and an estimate of its error.

    Central differences with shrinking steps, extrapolated to step 0 (Ridders 1982; Numerical Recipes 5.7).
    """
    shrink = 1.6
    previous: list[float] = []
    best, error = math.nan, math.inf
    for i in range(8):
        row = [(phi(h) - phi(-h)) / (2 * h)]
        for j, coarser in enumerate(previous):
            factor = shrink ** (2 * (j + 1))
            row.append((factor * row[j] - coarser) / (factor - 1))
            estimate = max(abs(row[-1] - row[j]), abs(row[-1] - coarser))
            if estimate <= error:
                best, error = row[-1], estimate
        if i and abs(row[-1] - previous[-1]) >= 2 * error:
            break  # rounding has taken over
        previous, h = row, h / shrink
    return best, error


def gradcheck(
    f: Function,
    *xs: object,
    g: object = None,
    seed: int = 0,
    rtol: float = 1e-6,
    allow_zero: bool = False,
) -> list[GradcheckReport]:
    """Compare the gradient of `f(*xs)` with a numerical derivative, operand by operand.

    Each operand is moved along a random direction, and the result weighted with a random cotangent, so a term
    that is missing, doubled or of the wrong sign shows. Both routes back, plain and with `create_graph`, are
    checked, and that a gradient has its operand's shape and dtype.

    Args:
        f: a function of tensors to a tensor, smooth around `xs`.
        xs: float64 arrays or tensors; constants go into `f` itself.
        g: the cotangent; random normal if None.
        seed: of the random directions and cotangent.
        rtol: tolerance relative to the size of the terms that make up the derivative.
        allow_zero: accept an operand whose gradient is zero.

    Returns:
        One report for each operand.

    Raises:
        GradcheckError: a gradient disagrees with the numerical one, or the function is not smooth here.
        VacuousCheckError: a gradient is zero for every direction, as that of a normalisation under an all-ones
            cotangent is: such a check passes with any formula. Draw other values, or `allow_zero`.
        TypeError: an x is not float64, whose rounding a numerical derivative needs.

    >>> print(gradcheck(lambda x: x * x, np.array([1.0, 2.0]))[0].ok)
    True
    """
    ts = [Tensor(x, requires_grad=True) for x in xs]
    for i, t in enumerate(ts):
        if t.dtype != np.float64:
            raise TypeError(f"gradcheck needs float64; xs[{i}] is {t.dtype}")
    rng = np.random.default_rng([seed, 1])  # not the numbers that the caller may have drawn from `seed` himself
    y = _with_graph(f(*ts))
    v = rng.normal(size=y.shape) if g is None else np.asarray(g, np.float64)
    gradients = grad(y, ts, v)
    _expect_same(gradients, grad(y, ts, v, create_graph=True), ts)

    reports = []
    for i, (t, gradient) in enumerate(zip(ts, gradients, strict=True)):
        direction = _away_from_zero(rng, t.shape)

        def phi(h: float, i: int = i, direction: Array = direction) -> float:
            moved = [Tensor(x.numpy() + h * direction if j == i else x, requires_grad=True) for j, x in enumerate(ts)]
            return float(np.sum(v * f(*moved).numpy()))

        numeric, error = ridders(phi)
        terms = np.abs(gradient.numpy() * direction)
        size = float(terms.sum()) + float(np.abs(v * y.numpy()).sum()) * 1e-3 + 1e-3
        if error > 1e-3 * size:
            raise GradcheckError(f"operand {i}: not smooth here (numerical {numeric:+.6g} ± {error:.1g}); move away")
        if t.size and not allow_zero and terms.max() <= 1e-11 * max(1.0, float(np.abs(v).max(initial=0))):
            raise VacuousCheckError(
                f"operand {i} has a gradient of zero (largest {terms.max():.1g}): this check would pass with any "
                "formula. A normalisation needs a random cotangent and more than one value per channel."
            )
        report = GradcheckReport(
            i, float(np.sum(gradient.numpy() * direction)), numeric, error, rtol * size + 10 * error
        )
        if not report.ok:
            raise GradcheckError(f"{report}, or the function has a kink here")
        reports.append(report)
    return reports


def gradgradcheck(f: Function, *xs: object, seed: int = 0, rtol: float = 1e-5, allow_zero: bool = False) -> None:
    """`gradcheck` of the gradient of `f`, as a function of `xs` and of the cotangent: the second derivatives.

    Raises what `gradcheck` raises; an operand that `f` is linear in needs `allow_zero`.
    """
    ts = [Tensor(x, requires_grad=True) for x in xs]
    rng = np.random.default_rng(seed)
    weights = [rng.normal(size=t.shape) for t in ts]
    cotangent = rng.normal(size=_with_graph(f(*ts)).shape)

    def pulled(*args: Tensor) -> Tensor:
        *operands, g = args
        total = Tensor(np.float64(0))
        for gx, w in zip(grad(f(*operands), operands, g, create_graph=True), weights, strict=True):
            total = total + (gx * w).sum()
        return total

    if any(t.size for t in ts):
        gradcheck(pulled, *ts, cotangent, seed=seed + 1, rtol=rtol, allow_zero=allow_zero)


def _with_graph(y: Tensor) -> Tensor:
    if not isinstance(y, Tensor) or not y.requires_grad:
        raise GradcheckError("the result has no graph: somewhere on the way it was made from arrays, or detached")
    return y


def _away_from_zero(rng: np.random.Generator, shape: Shape) -> Array:
    """A random direction without small entries, so that an error in any of them shows."""
    return rng.uniform(0.3, 1.0, shape) * rng.choice([-1.0, 1.0], shape)


def _expect_same(plain: Sequence[Tensor], differentiable: Sequence[Tensor], ts: Sequence[Tensor]) -> None:
    for i, (a, b, t) in enumerate(zip(plain, differentiable, ts, strict=True)):
        for gradient in (a, b):
            if gradient.shape != t.shape or gradient.dtype != t.dtype:
                raise GradcheckError(
                    f"operand {i} is {t.dtype} {t.shape}, its gradient {gradient.dtype} {gradient.shape}"
                )
        if not np.allclose(a.numpy(), b.numpy(), rtol=1e-8, atol=1e-9, equal_nan=True):
            raise GradcheckError(f"operand {i}: the plain and the differentiable route differ:\n{a}\n{b}")


# ---- the properties of every op -------------------------------------------------------------------------

Operands = tuple[Array | None, ...]
Params = dict[str, Any]


def _is_real(x: Any) -> bool:
    return x is not None and x.dtype.kind == "f"


def cast_real(xs: Operands, dtype: Any) -> tuple[Any, ...]:
    """Copies of the operands, the real ones in `dtype`."""
    return tuple(x if x is None else x.astype(dtype if _is_real(x) else x.dtype) for x in xs)


def _split(op: Op, xs: Sequence[Any], params: Params) -> tuple[Function, list[Any]]:
    """The op as a function of the operands that it is differentiable in; the others are held fixed."""
    real = [i for i, x in enumerate(xs) if _is_real(x) and (not op.rules or op.rules[i] is not None)]

    def f(*operands: Tensor) -> Any:
        full: list[Any] = list(xs)
        for i, operand in zip(real, operands, strict=True):
            full[i] = operand
        return apply(op, full, params)[0]

    return f, [xs[i] for i in real]


def _overwritten(op: Op) -> list[int]:
    """Positions of the operands that the op updates."""
    names = list(signature(op.forward).parameters)
    return [names.index(name) for name in op.updates]


def _results(op: Op, xs: Operands, params: Params) -> list[Array]:
    """All that a call changes or returns: the result and, without gradients, its by-products and updated operands."""
    y, saved = apply(op, xs, params)
    results = (y, *(xs[i] for i in _overwritten(op)), *(() if op.differentiable else saved))
    return [np.asarray(r) for r in results if r is not None]


def forward_matches_reference(op: Op, xs: Operands, params: Params, seed: int) -> None:
    """In float64 and float32, through the kernel if there is one: the reference's values, and the dtype kept."""
    with kernels_disabled():
        want = _results(op, cast_real(xs, np.float64), params)
    for a, b in zip(_results(op, cast_real(xs, np.float64), params), want, strict=True):
        assert a.dtype == b.dtype, f"float64 operands gave {a.dtype}, the reference {b.dtype}"
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
    reference = op.forward(*cast_real(xs, np.float64), **params)
    exact = np.asarray(reference[0] if op.saves else reference)
    np.testing.assert_allclose(want[0], exact, rtol=1e-12, atol=1e-12)
    if exact.dtype == np.float64 and params.get("dtype") is None:
        got = apply(op, cast_real(xs, np.float32), params)[0]
        assert got.dtype == np.float32 or not op.differentiable, f"float32 operands gave {got.dtype}"
        scale = 1 + np.abs(exact).max(initial=0)
        np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-5 * scale)


def first_and_second_gradients(op: Op, xs: Operands, params: Params, seed: int) -> None:
    """Both routes back, and the gradient of the gradient, against numerical derivatives."""
    f, real = _split(op, xs, params)
    if op.differentiable:
        gradcheck(f, *real, seed=seed, allow_zero=True)
        gradgradcheck(f, *real, seed=seed, allow_zero=True)


def one_tensor_in_every_slot(op: Op, xs: Operands, params: Params, seed: int) -> None:
    """The same tensor passed for every operand of its shape: its gradients add up."""
    f, real = _split(op, xs, params)
    one = {x.shape: x for x in real}

    def shared(*ts: Tensor) -> Tensor:
        by_shape = dict(zip(one, ts, strict=True))
        return f(*(by_shape[x.shape] for x in real))

    if len(real) > len(one):
        gradcheck(shared, *one.values(), seed=seed, allow_zero=True)


def operands_that_depend_on_each_other(op: Op, xs: Operands, params: Params, seed: int) -> None:
    """Later operands computed from the first: every path is counted, once."""
    f, real = _split(op, xs, params)

    def dependent(a: Tensor) -> Tensor:
        return f(a, *(Tensor(x) + a.sum() * (0.03 / max(a.size, 1)) for x in real[1:]))

    if len(real) > 1:
        gradcheck(dependent, real[0], seed=seed, allow_zero=True)


def nothing_is_mutated_or_shared(op: Op, xs: Operands, params: Params, seed: int) -> None:
    """Operands and cotangent stay as they are; two gradients share no memory; a gradient in float32 is float32."""
    cast = [x if x is None else Tensor(x, requires_grad=op.differentiable and _is_real(x)) for x in cast_real(xs, "f4")]
    y = apply(op, [t if t is None else t._data for t in cast] if op.updates else cast, params)[0]
    overwritten = _overwritten(op)
    fixed = [
        (t, np.array(x))
        for i, (t, x) in enumerate(zip(cast, cast_real(xs, "f4"), strict=True))
        if t is not None and i not in overwritten
    ]
    for t, x in fixed:
        np.testing.assert_array_equal(t.numpy(), x, "the forward pass changed an operand")
    if not op.differentiable or not y.requires_grad:
        return
    g = Tensor(np.random.default_rng(seed).normal(size=y.shape), dtype=y.dtype)
    before = g.numpy().copy()
    y.backward(g)
    np.testing.assert_array_equal(g.numpy(), before)
    for t, x in fixed:
        np.testing.assert_array_equal(t.numpy(), x, "the backward pass changed an operand")
    gradients = [(t, t.grad) for t, _ in fixed if t.grad is not None]
    for a, b in itertools.combinations([g, *(gradient for _, gradient in gradients)], 2):
        assert not np.shares_memory(a.numpy(), b.numpy()), "two gradients share memory"
    for t, gradient in gradients:
        assert (gradient.dtype, gradient.shape) == (t.dtype, t.shape)


def layout_does_not_matter(op: Op, xs: Operands, params: Params, seed: int) -> None:
    """Operands that are not contiguous give the same as contiguous copies, forwards and backwards."""
    f, real = _split(op, xs, params)
    if not real:
        return
    spread = []
    for x in real:
        wide = np.zeros((*x.shape, 2), x.dtype)
        wide[..., 0] = x
        spread.append(Tensor._of(wide[..., 0]))  # as a view, which an op's result may well be
    results = []
    for operands in (spread, [Tensor(x) for x in real]):
        for t in operands:
            t.requires_grad = True
        y = f(*operands)
        v = np.random.default_rng(seed).normal(size=y.shape)
        results.append([y, *(grad(y, operands, v) if y.requires_grad else [])])
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-12, atol=1e-12)


def kernels_match_reference(op: Op, xs: Operands, params: Params, seed: int) -> None:
    """Each kernel, forward and backward, against the NumPy reference and the composition's gradient."""
    for dtype, tolerance in ((np.float64, 1e-9), (np.float32, 1e-4)):
        cast = cast_real(xs, dtype)
        f, real = _split(op, cast, params)
        if backend.find_kernel(op.name, device_of(cast[0])):
            with kernels_disabled():
                want = _results(op, cast_real(xs, dtype), params)
            for got, exact in zip(_results(op, cast, params), want, strict=True):
                np.testing.assert_allclose(got, exact, rtol=tolerance, atol=tolerance)
        if backend.find_kernel(op.vjp, device_of(cast[0])):
            ts = [Tensor(x, requires_grad=True) for x in real]
            y = f(*ts)
            v = Tensor(np.random.default_rng(seed).normal(size=y.shape), dtype=dtype)
            for wanted in (ts, *([t] for t in ts)):  # a kernel may leave out gradients that are not needed, or decline
                for a, b in zip(grad(y, wanted, v), grad(y, wanted, v, create_graph=True), strict=True):
                    np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=tolerance, atol=tolerance)


PROPERTIES: tuple[Callable[[Op, Operands, Params, int], None], ...] = (
    forward_matches_reference,
    first_and_second_gradients,
    one_tensor_in_every_slot,
    operands_that_depend_on_each_other,
    nothing_is_mutated_or_shared,
    layout_does_not_matter,
    kernels_match_reference,
)


class RandomDraw:
    """A `sample.Draw` from a seeded generator."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def shape(self, min_dims: int = 0, max_dims: int = 3, min_side: int = 0, max_side: int = 4) -> Shape:
        sides = self.rng.integers(min_side, max_side + 1, self.integer(min_dims, max_dims))
        return tuple(int(n) for n in sides)

    def broadcastable(self, count: int) -> Sequence[Shape]:
        full = self.shape(min_side=1)
        shapes = []
        for _ in range(count):
            kept = full[self.integer(0, len(full)) :]
            shapes.append(tuple(1 if self.rng.random() < 0.3 else n for n in kept))
        return shapes

    def array(self, domain: Domain, shape: Shape) -> Array:
        x = self.rng.uniform(domain.low, domain.high, shape)
        return np.where(np.abs(x) < domain.gap, domain.gap, x)

    def distinct(self, shape: Shape) -> Array:
        return self.rng.permutation(math.prod(shape)).reshape(shape) * 0.2 - 1.0

    def integer(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def integers(self, low: int, high: int, shape: Shape) -> Array:
        return self.rng.integers(low, high + 1, shape)

    def choice(self, options: Sequence[Any]) -> Any:
        return options[self.integer(0, len(options) - 1)]


def check_op(op: str | Function, examples: int = 25, seed: int = 0) -> None:
    """Run every property of the test-suite on an op, over drawn operands.

    Args:
        op: a function made by `primitive` or `fused`, or its name.
        examples: how many samples to draw.
        seed: of the draws.

    Raises:
        AssertionError: the property that fails, for the sample that is named in a note.
        KeyError: there is no such op.

    >>> check_op("mul", examples=3)
    """
    name = op if isinstance(op, str) else op.__name__
    if name not in OPS:
        raise KeyError(f"there is no op {name!r}; there are {', '.join(sorted(OPS))}")
    for example in range(seed, seed + examples):
        xs, params = OPS[name].sample(RandomDraw(example))
        for check in PROPERTIES:
            try:
                check(OPS[name], xs, params, example)
            except AssertionError as error:
                shapes = [None if x is None else x.shape for x in xs]
                error.add_note(f"in {check.__name__} of {name!r}, example {example}: shapes {shapes}, {params}")
                raise
