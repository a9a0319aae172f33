"""The operands that faults hide in: of half precision, of no elements, of many, and large numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from tinygrad_bn_kernels import MODULES
from tinygrad_bn_kernels.cpu import threads

from tinygrad_bn.autograd import grad
from tinygrad_bn.backend import find_kernel, kernels_disabled
from tinygrad_bn.sample import NONZERO, POSITIVE, REAL, Array, Domain, RandomDraw, Shape
from tinygrad_bn.tensor import Op, Tensor, apply
from tinygrad_bn.testing.diagnosis import names_of, of_elements
from tinygrad_bn.testing.gradients import GradcheckError, KinkError, compare
from tinygrad_bn.testing.properties import (
    Operands,
    Params,
    cast_real,
    positions,
    real_names,
    results_of,
    split_differentiable,
)

LARGE = 200.0  # numbers up to this size are drawn as large ones
MANY = 10_000  # elements
Results = list[tuple[str, Array]]  # what it is, and its numbers


class LargeNumbers(RandomDraw):
    """Draws numbers up to ±200 where the sample asks for any real, positive or nonzero number."""

    def array(self, domain: Domain, shape: Shape) -> Array:
        if domain in (REAL, POSITIVE, NONZERO):
            domain = Domain(-LARGE if domain.low < 0 else domain.low, LARGE, domain.gap)
        return super().array(domain, shape)


def half_precision(op: Op, xs: Operands, params: Params, seed: int) -> None:
    """In float16: the values and gradients of float64, to half a percent, and the dtype kept."""
    if "dtype" not in params:
        _agrees(op, xs, params, seed, np.float16, 5e-3, "in float16")


def no_elements(op: Op, xs: Operands, params: Params, seed: int) -> None:
    """Without rows: the values of the reference, and gradients as empty as their operands."""
    if rows := with_rows(op, xs, params, 0):
        _agrees(op, rows, params, seed, np.float64, 1e-9, "for operands without elements")


def many_elements(op: Op, xs: Operands, params: Params, seed: int) -> None:
    """With some 10,000 elements, on threads: the values and gradients of the reference."""
    if rows := with_many(op, xs, params):
        with _threads():
            for dtype, tolerance in ((np.float64, 1e-9), (np.float32, 1e-4)):
                _agrees(op, rows, params, seed, dtype, tolerance, f"for operands of {MANY:,} elements")
            _derivative(op, rows, params, seed, f"for operands of {MANY:,} elements")


def large_numbers(op: Op, xs: Operands, params: Params, seed: int) -> None:
    """With numbers up to 200: the values and gradients of the reference."""
    if any(isinstance(x, np.ndarray) and x.dtype.kind == "f" and np.abs(x).max(initial=0) > 5 for x in xs):
        for dtype, tolerance in ((np.float64, 1e-9), (np.float32, 1e-4)):
            _agrees(op, xs, params, seed, dtype, tolerance, "for numbers beyond 100")
        _derivative(op, xs, params, seed, "for numbers beyond 100")


def whole_numbers(op: Op, xs: Operands, params: Params, seed: int) -> None:
    """Of integers: what the reference gives, values and dtype."""
    whole = tuple(x if x is None else np.trunc(x * 2).astype(np.int64) if x.dtype.kind == "f" else x for x in xs)
    if not takes(op, whole, params):
        return
    with np.errstate(all="ignore"):
        with kernels_disabled():
            wanted = results_of(op, copies(whole), params)
        given = results_of(op, copies(whole), params)
    for got, want in zip(given, wanted, strict=True):
        whose = by_kernel("the result", op.name) + f" of {op.name!r} for integers"
        if got.dtype != want.dtype:
            raise GradcheckError(f"{whose} is {got.dtype}, that of the definition {want.dtype}")
        expect_close(got, want.astype(np.float64), 1e-5, whose)


# Each with what draws its operands.
EXTREMES: tuple[tuple[Callable[[Op, Operands, Params, int], None], Callable[[int], RandomDraw]], ...] = (
    (half_precision, RandomDraw),
    (no_elements, RandomDraw),
    (many_elements, RandomDraw),
    (large_numbers, LargeNumbers),
    (whole_numbers, RandomDraw),
)
BY_ROWS = no_elements, many_elements  # only of ops that take any number of rows


# ---- more or fewer rows ----------------------------------------------------------------------------------


def with_rows(op: Op, xs: Operands, params: Params, count: int) -> Operands | None:
    """The operands with so many rows, repeated from those that are there; None if the op does not take that.

    Rows are along axis 0 of the first operand that has axes, and of the others of its length there.
    """
    first = next((x for x in xs if x is not None and x.ndim), None)
    if first is None or not len(first):
        return None
    kinds: tuple[Callable[[Array], bool], ...] = (
        lambda x: len(x) == len(first) and x.ndim == first.ndim,
        lambda x: len(x) == len(first),
        lambda x: x is first,
    )
    places = np.arange(count) % len(first)
    for grows in kinds:
        rows = tuple(x[places] if x is not None and x.ndim and grows(x) else x for x in xs)
        if takes(op, rows, params):
            return rows
    return None


def with_many(op: Op, xs: Operands, params: Params) -> Operands | None:
    """The operands with so many rows that one has MANY elements; None if the op does not take that."""
    size = max((math.prod(x.shape[1:]) for x in xs if x is not None and x.ndim), default=0)
    return with_rows(op, xs, params, -(-MANY // max(size, 1)))


def takes(op: Op, xs: Operands, params: Params) -> bool:
    """Whether the reference takes these operands and gives numbers that are finite."""
    try:
        with kernels_disabled(), np.errstate(all="ignore"):
            y = np.asarray(apply(op, cast_real(xs, np.float64), params)[0])
    except Exception:
        return False
    return bool(np.isfinite(y).all())


@contextmanager
def _threads() -> Iterator[None]:
    """In this block loops run on threads whatever the size of the work."""
    before, threads.PARALLEL_FROM = threads.PARALLEL_FROM, 1
    try:
        yield
    finally:
        threads.PARALLEL_FROM = before


# ---- against the reference -------------------------------------------------------------------------------


def _agrees(op: Op, xs: Operands, params: Params, seed: int, dtype: Any, tolerance: float, when: str) -> None:
    """Values and gradients in `dtype` against those of the reference in float64, of the same numbers."""
    rounded = cast_real(cast_real(xs, dtype), np.float64)
    if not takes(op, rounded, params):
        return
    try:
        with kernels_disabled(), np.errstate(all="ignore"):
            wanted = results(op, rounded, params, seed, dtype, exact=True)
    except Exception as error:
        raise GradcheckError(f"the gradients of {op.name!r} fail {when}: {error}") from error
    if any(np.abs(want).max(initial=0) > np.finfo(dtype).max / 4 or np.isnan(want).any() for _, want in wanted):
        return
    with np.errstate(all="ignore"):
        given = results(op, cast_real(xs, dtype), params, seed, dtype)
    for (what, got), (_, want) in zip(given, wanted, strict=True):
        whose = f"{what} of {op.name!r} {when}"
        if want.dtype == np.float64 and got.dtype != dtype and op.differentiable and "dtype" not in params:
            raise GradcheckError(f"{whose} is {got.dtype}; its operands are {np.dtype(dtype)}")
        expect_close(got, want, tolerance, whose)


def _derivative(op: Op, xs: Sequence[Any], params: Params, seed: int, when: str) -> None:
    """The first gradients against numerical ones."""
    f, real = split_differentiable(op, xs, params)
    if op.differentiable and real and takes(op, tuple(xs), params):
        try:
            compare(f, real, real_names(op, tuple(xs)), seed=seed)
        except KinkError:
            return  # as of a maximum, where rows are repeated
        except GradcheckError as error:
            raise GradcheckError(f"{when}: {error}") from error
