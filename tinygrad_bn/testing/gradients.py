"""A gradient against a numerical derivative, to third order."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tinygrad_bn.autograd import grad
from tinygrad_bn.sample import Array, Shape
from tinygrad_bn.tensor import Tensor
from tinygrad_bn.testing.diagnosis import names_of, of_elements, of_ratio

Function = Callable[..., Tensor]


class GradcheckError(AssertionError):
    """A gradient and its numerical estimate disagree."""


class KinkError(GradcheckError):
    """The function has no derivative here, so there is nothing to compare with."""


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
    name: str  # of the operand, in quotes; its number if the function does not name it
    order: int  # 2 for the gradient of the gradient, 3 for that of its directional derivative

    @property
    def ok(self) -> bool:
        return abs(self.analytic - self.numeric) <= self.tolerance

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "WRONG"
        return (
            f"{_place(self.name, self.order)}: gradient {self.analytic:+.10g}, numerical {self.numeric:+.10g} "
            f"± {self.error:.1g}: {verdict} (tolerance {self.tolerance:.1g})"
        )


ORDERS = {1: "", 2: "second derivative, ", 3: "third derivative, "}


def _place(name: str, order: int) -> str:
    return f"{ORDERS[order]}operand {name}"


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
        GradcheckError: a gradient disagrees with the numerical one, which may say why; the function is not smooth
            here; or it computes in less than float64.
        VacuousCheckError: a gradient is zero for every direction, as that of a normalisation under an all-ones
            cotangent is: such a check passes with any formula. Draw other values, or `allow_zero`.
        TypeError: an x is not float64, whose rounding a numerical derivative needs.

    >>> print(gradcheck(lambda x: x * x, np.array([1.0, 2.0]))[0].ok)
    True
    """
    return compare(f, xs, names_of(f, len(xs)), g=g, seed=seed, rtol=rtol, allow_zero=allow_zero)


def gradgradcheck(f: Function, *xs: object, seed: int = 0, rtol: float = 1e-5, allow_zero: bool = False) -> None:
    """`gradcheck` of the gradient of `f`, as a function of `xs` and of the cotangent: the second derivatives.

    Raises what `gradcheck` raises; an operand that `f` is linear in needs `allow_zero`.
    """
    compare_second(f, xs, names_of(f, len(xs)), seed=seed, rtol=rtol, allow_zero=allow_zero)


def compare(
    f: Function,
    xs: Sequence[object],
    names: Sequence[str],
    *,
    order: int = 1,
    g: object = None,
    seed: int = 0,
    rtol: float = 1e-6,
    allow_zero: bool = True,
) -> list[GradcheckReport]:
    """`gradcheck` under names that are given."""
    ts = [Tensor(x, requires_grad=True) for x in xs]
    for i, t in enumerate(ts):
        if t.dtype != np.float64:
            raise TypeError(f"gradcheck needs float64; xs[{i}] is {t.dtype}")
    rng = np.random.default_rng([seed, 1])  # not the numbers that the caller may have drawn from `seed` himself
    y = _with_graph(f(*ts), order)
    v = rng.normal(size=y.shape) if g is None else np.asarray(g, np.float64)
    gradients = grad(y, ts, v)
    _expect_same(gradients, grad(y, ts, v, create_graph=True), ts, [_place(name, order) for name in names])

    reports = []
    for i, (t, gradient, name) in enumerate(zip(ts, gradients, names, strict=True)):
        direction = away_from_zero(rng, t.shape)

        def phi(h: float, i: int = i, direction: Array = direction) -> float:
            moved = [Tensor(x.numpy() + h * direction if j == i else x, requires_grad=True) for j, x in enumerate(ts)]
            return float(np.sum(v * f(*moved).numpy()))

        numeric, error = ridders(phi)
        terms = np.abs(gradient.numpy() * direction)
        size = float(terms.sum()) + float(np.abs(v * y.numpy()).sum()) * 1e-3 + 1e-3
        derivative = float(np.sum(gradient.numpy() * direction))
        report = GradcheckReport(i, derivative, numeric, error, rtol * size + 10 * error, name, order)
        where = _place(name, order)
        if (not report.ok or error > 1e-7 * size) and _moves_in_steps(phi, numeric, size):
            raise GradcheckError(f"{where}: the result moves in steps: the function computes in less than float64")
        if error > 1e-3 * size:
            raise GradcheckError(f"{where}: not smooth here (numerical {numeric:+.6g} ± {error:.1g}); move away")
        if t.size and not allow_zero and terms.max() <= 1e-11 * max(1.0, float(np.abs(v).max(initial=0))):
            raise VacuousCheckError(
                f"{where} has a gradient of zero (largest {terms.max():.1g}): this check would pass with "
                "any formula. A normalisation needs a random cotangent and more than one value per channel."
            )
        if not report.ok:
            why = of_ratio(derivative, numeric, t.shape, y.shape)
            if _has_kink(phi, size):
                raise KinkError(f"{report}; the function has a kink here: draw operands away from it")
            why = why or _by_element(f, ts, i, v, gradient.numpy())
            raise GradcheckError(f"{report}; {why}".rstrip("; "))
        reports.append(report)
    return reports


SHOWN = 12  # elements of a gradient that are written out in an error
MOST_ELEMENTS = 64  # of an operand whose gradient is looked at element by element


def _by_element(f: Function, ts: Sequence[Tensor], i: int, v: Array, gradient: Array) -> str:
    """What is wrong with the gradient of operand `i`, from a numerical derivative by each of its elements."""
    x = ts[i].numpy()
    if x.size > MOST_ELEMENTS:
        return ""

    def along(place: int, h: float) -> float:
        moved = x.copy()
        moved.flat[place] += h
        return float(
            np.sum(v * f(*[Tensor(moved, requires_grad=True) if j == i else t for j, t in enumerate(ts)]).numpy())
        )

    numeric = [ridders(lambda h, place=place: along(place, h))[0] for place in range(x.size)]  # type: ignore[misc]
    return of_elements(gradient, np.reshape(numeric, x.shape), x.shape, v.shape)


def compare_second(
    f: Function,
    xs: Sequence[object],
    names: Sequence[str],
    *,
    seed: int = 0,
    rtol: float = 1e-5,
    allow_zero: bool = True,
) -> None:
    """`gradgradcheck` under names that are given."""
    pulled, everything, named = _pulled(f, xs, names, seed)
    if any(t.size for t in everything[:-1]):
        compare(pulled, everything, named, order=2, seed=seed + 1, rtol=rtol, allow_zero=allow_zero)


def _pulled(
    f: Function, xs: Sequence[object], names: Sequence[str], seed: int
) -> tuple[Function, list[Tensor], list[str]]:
    """The gradient of `f` along random weights as a function of `xs` and of a cotangent; these, and their names."""
    ts = [Tensor(x, requires_grad=True) for x in xs]
    rng = np.random.default_rng(seed)
    weights = [rng.normal(size=t.shape) for t in ts]
    cotangent = Tensor(rng.normal(size=_with_graph(f(*ts), order=1).shape), requires_grad=True)

    def pulled(*args: Tensor) -> Tensor:
        *operands, g = args
        return _slope(f, weights, g)(*operands)

    return pulled, [*ts, cotangent], [*names, "g (the cotangent)"]


def _slope(f: Function, weights: Sequence[Array], g: Tensor | None = None) -> Function:
    """The sum of the gradients of `f` under the cotangent `g`, times weights, as a function of its operands."""

    def slope(*operands: Tensor) -> Tensor:
        total = Tensor(np.float64(0))
        for gx, w in zip(grad(f(*operands), operands, g, create_graph=True), weights, strict=True):
            total = total + (gx * w).sum()
        return total

    return slope


def compare_third(
    f: Function, xs: Sequence[object], names: Sequence[str], *, seed: int = 0, rtol: float = 1e-5
) -> None:
    """The gradient of vᵀ H v by each operand, for the Hessian H of ⟨f, cotangent⟩ and a random v."""
    ts = [Tensor(x, requires_grad=True) for x in xs]
    rng = np.random.default_rng([seed, 3])
    vs = [rng.normal(size=t.shape) for t in ts]
    cotangent = rng.normal(size=_with_graph(f(*ts), order=1).shape)

    def along(g: Tensor, operands: Sequence[Tensor]) -> Tensor:
        slopes = grad(g, operands, create_graph=True) if g.requires_grad else []
        return sum(((slope * v).sum() for slope, v in zip(slopes, vs, strict=False)), start=_nothing(operands))

    def curvature(*operands: Tensor) -> Tensor:
        return along(along((f(*operands) * cotangent).sum(), operands), operands)

    if any(t.size for t in ts):
        compare(curvature, ts, names, order=3, seed=seed + 2, rtol=rtol, allow_zero=True)


def _nothing(operands: Sequence[Tensor]) -> Tensor:
    """0, as a function of the operands."""
    return sum(((t * 0).sum() for t in operands), start=Tensor(np.float64(0)))


def _with_graph(y: Tensor, order: int) -> Tensor:
    what = "gradient" if order > 1 else "result"
    if not isinstance(y, Tensor) or not y.requires_grad:
        raise GradcheckError(f"the {what} has no graph: somewhere on the way it was made from arrays, or detached")
    if y.dtype != np.float64:
        raise GradcheckError(f"float64 operands gave a {what} of {y.dtype}: the function narrows")
    return y


def _moves_in_steps(phi: Callable[[float], float], numeric: float, size: float) -> bool:
    """Whether a tiny change leaves `phi` as it is or makes it jump, as the rounding of float32 does."""
    h = 1e-8
    step = phi(h) - phi(-h)
    return abs(step / (2 * h) - numeric) > 1e-2 * size and abs(step) < 1e-4 * size


def _has_kink(phi: Callable[[float], float], size: float) -> bool:
    """Whether the slopes of `phi` on the two sides of 0 differ."""
    h = 1e-5
    return abs(phi(h) - 2 * phi(0.0) + phi(-h)) / h > 1e-2 * size


def away_from_zero(rng: np.random.Generator, shape: Shape) -> Array:
    """A random direction without small entries, so that an error in any of them shows."""
    return rng.uniform(0.3, 1.0, shape) * rng.choice([-1.0, 1.0], shape)


def _expect_same(
    plain: Sequence[Tensor], differentiable: Sequence[Tensor], ts: Sequence[Tensor], places: Sequence[str]
) -> None:
    for a, b, t, place in zip(plain, differentiable, ts, places, strict=True):
        for gradient in (a, b):
            if gradient.shape != t.shape or gradient.dtype != t.dtype:
                raise GradcheckError(f"{place} is {t.dtype} {t.shape}, its gradient {gradient.dtype} {gradient.shape}")
        if not np.allclose(a.numpy(), b.numpy(), rtol=1e-8, atol=1e-9, equal_nan=True):
            why = of_elements(a.numpy(), b.numpy(), t.shape)
            shown = f"\n{a}\n{b}" if a.size <= SHOWN else ""
            raise GradcheckError(f"{place}: the plain and the differentiable route differ: {why}{shown}")
