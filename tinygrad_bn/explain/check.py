"""Gradients derived by hand against those of the engine, each with a verdict and, if it is wrong, the likely reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from tinygrad_bn.testing.diagnosis import of_ratio

if TYPE_CHECKING:
    from tinygrad_bn.explain.explanation import Explanation, View
    from tinygrad_bn.tensor import Array

ROUNDING = 1e4  # a gradient by another formula may differ by so many units in the last place of the largest one


@dataclass(frozen=True)
class Finding:
    """The verdict on one gradient."""

    name: str
    verdict: str  # "exact", "close" or "wrong"
    difference: float  # the largest; NaN where shapes differ
    at: tuple[int, ...]  # its place
    reason: str  # of a wrong one

    def __str__(self) -> str:
        where = f" at {self.at}" if self.at else ""
        largest = "" if self.verdict == "exact" or np.isnan(self.difference) else f"off by {self.difference:.2g}{where}"
        return "  ".join(filter(None, (f"{self.name:9} {self.verdict:5}", largest, self.reason))).rstrip()


class Verdict(Mapping[str, Finding]):
    """The findings of `check`, by the names they were given; printed, a line each."""

    def __init__(self, findings: list[Finding]) -> None:
        self._findings = {f.name: f for f in findings}

    @property
    def right(self) -> bool:
        """Whether all gradients are exact or close."""
        return all(f.verdict != "wrong" for f in self._findings.values())

    def __getitem__(self, name: str) -> Finding:
        return self._findings[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._findings)

    def __len__(self) -> int:
        return len(self._findings)

    def __str__(self) -> str:
        return "\n".join(map(str, self._findings.values()))

    __repr__ = __str__


def check(e: Explanation, mine: Mapping[str, Any]) -> Verdict:
    """The verdict on each gradient of `mine`; the name of a step may have a d or ∂ in front, as in `dvar`.

    Raises KeyError for a name that is no step's, ValueError for a step without gradient, TypeError for what is no
    array of numbers.
    """
    findings = []
    for name, given in mine.items():
        view = _view(e, name)
        if view.grad is None:
            raise ValueError(f"no backward pass reached {view.path!r}, so there is nothing to compare {name} with")
        a = np.asarray(given)
        if a.dtype.kind not in "fiub":
            raise TypeError(f"{name} has to be an array of real numbers; got a {type(given).__name__}")
        findings.append(judge(name, a.astype(np.float64), view))
    return Verdict(findings)


def _view(e: Explanation, name: str) -> View:
    if name[:1] in ("d", "∂") and name not in e:
        return e[name[1:]]
    return e[name]


def judge(name: str, a: Array, view: View) -> Finding:
    """Compare one gradient, in float64, with that of its step."""
    assert view.grad is not None
    eps = float(np.finfo(view.grad.dtype).eps)
    b = view.grad.astype(np.float64)
    if a.shape != b.shape:
        return Finding(name, "wrong", float("nan"), (), _of_shapes(a, b))
    if np.array_equal(a, b, equal_nan=True):
        return Finding(name, "exact", 0.0, (), "")
    difference = np.where(np.isnan(a) & np.isnan(b), 0.0, np.abs(a - b))
    at = tuple(int(i) for i in np.unravel_index(int(np.argmax(difference)), difference.shape))
    largest = float(difference[at])
    size = max(float(np.abs(b).max()), *(float(np.abs(share).max()) for share in _shares(view).values()))
    tolerance = ROUNDING * eps * size
    if largest <= tolerance:
        return Finding(name, "close", largest, at, "")
    return Finding(name, "wrong", largest, at, _reason(a, b, view, tolerance) or "no simple reason found")


def _of_shapes(a: Array, b: Array) -> str:
    shapes = f"its shape is {a.shape}, and has to be {b.shape}"
    if a.size == b.size and np.allclose(a.reshape(b.shape), b, rtol=1e-6):
        return f"{shapes}; the numbers are right: keep the axes (keepdims=True)"
    lead = a.ndim - b.ndim
    if lead >= 0 and all(m in (1, n) for n, m in zip(a.shape[lead:], b.shape, strict=True)):
        axes = (*range(lead), *(lead + i for i, m in enumerate(b.shape) if m != a.shape[lead + i]))
        if np.allclose(a.sum(axes).reshape(b.shape), b, rtol=1e-6, atol=1e-9 * float(np.abs(a).max(initial=0))):
            return f"{shapes}: what is broadcast forwards is summed backwards, over axis {', '.join(map(str, axes))}"
    return shapes


def _reason(a: Array, b: Array, view: View, tolerance: float) -> str:
    if not np.isfinite(a).all():
        return of_ratio(float("nan"), 1.0, a.shape, b.shape)

    def same(u: Array, v: Array) -> bool:
        return bool(np.abs(u - v).max() <= tolerance)

    if same(a, -b):
        return "the sign is flipped"
    shares = _shares(view)
    telling = {way: s for way, s in shares.items() if np.abs(s).max() > 100 * tolerance}
    if len(telling) > 1:  # before factors, as a lost way can look like one
        for count in range(1, len(telling)):
            for names in combinations(telling, count):
                part = np.sum([telling[n] for n in names], axis=0)
                lost = "; and ".join(names)
                if same(a + part, b):
                    return f"a path is lost: {lost}"
                if same(a - part, b):
                    return f"a path is counted twice: {lost}"
                if same(a + 2 * part, b):
                    return f"the sign of a path is flipped: {lost}"
    norm = float((b * b).sum())
    ratio = float((a * b).sum()) / norm if norm else 0.0
    if not a.any() or same(a, ratio * b):
        beside = [s.array for s in view.neighbours] or [a]
        operand = max(beside, key=lambda array: array.size).shape
        for n in dict.fromkeys((*operand, *a.shape)):
            if n > 1 and np.isclose(ratio, n / (n - 1)):
                return f"the gradient is {n}/{n - 1} of the right one: a division by N − 1, where the variance has N"
        return of_ratio(ratio, 1.0, operand, b.shape) or f"the gradient is {ratio:.6g} times the right one"
    offset = a - b
    if a.ndim and a.shape[0] > 1 and same(offset, np.broadcast_to(offset[:1], offset.shape)):
        return "every sample is off by the same: a term that is a mean over the batch is missing or wrong"
    return ""


def _shares(view: View) -> dict[str, Array]:
    try:
        return {way: np.asarray(share, np.float64) for way, share in view.paths.items()}
    except ValueError:  # too many ways
        return {"all": np.asarray(view.grad, np.float64)}
