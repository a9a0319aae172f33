"""The operands that faults hide in: of half precision, of no elements, of many, and large numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from tinygrad_bn_kernels.cpu import threads

from tinygrad_bn.arguments import is_floating
from tinygrad_bn.backend import kernels_disabled
from tinygrad_bn.sample import NONZERO, POSITIVE, REAL, Array, Domain, RandomDraw, Shape
from tinygrad_bn.tensor import Op, apply
from tinygrad_bn.testing.calls import (
    Check,
    Operands,
    Params,
    by_kernel,
    cast_real,
    copies,
    expect_close,
    has_kernel,
    kernel_dtypes,
    real_names,
    results,
    results_of,
    split_differentiable,
    takes,
)
from tinygrad_bn.testing.diagnosis import names_of
from tinygrad_bn.testing.gradients import GradcheckError, KinkError, compare

LARGE = 200.0  # numbers up to this size are drawn as large ones
MANY = 10_000  # elements


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


def broadcast_operands(op: Op, xs: Operands, params: Params, seed: int) -> None:
    """Of elementwise ops, with operands that are broadcast: the values and gradients of the reference."""
    wide = _of_one_shape(op, xs, params)
    for given, when in _smaller(wide, names_of(op.forward, len(wide))) if wide else ():
        for dtype, tolerance in ((np.float64, 1e-9), (np.float32, 1e-4)):
            _agrees(op, given, params, seed, dtype, tolerance, when)
        _derivative(op, given, params, seed, when)


def _smaller(wide: Operands, names: Sequence[str]) -> Iterator[tuple[tuple[Array, ...], str]]:
    """One operand without its first axis, or of length 1 on any axis; and two of length 1 on different axes."""
    first, second, *others = arrays = [np.asarray(x) for x in wide]
    for i, (name, x) in enumerate(zip(names, arrays, strict=True)):
        parts = [(x[0], "without axis 0")]
        parts += [(x.take([0], axis), f"of length 1 on axis {axis}") for axis in range(x.ndim)]
        for part, what in parts:
            when = f"for operand {name} {what}, of shape {part.shape}, which is broadcast,"
            yield (*arrays[:i], part, *arrays[i + 1 :]), when
    if first.ndim > 1:
        row, column = first.take([0], 0), second.take([0], -1)
        yield (row, column, *others), f"for operands of shapes {row.shape} and {column.shape}, which are broadcast,"


def numbers_for_operands(op: Op, xs: Operands, params: Params, seed: int) -> None:
    """Of elementwise ops, with a number of Python for an operand: the values and gradients of the reference."""
    wide = _of_one_shape(op, xs, params)
    for i, name in enumerate(names_of(op.forward, len(wide))):
        given = (*wide[:i], round(float(wide[i].flat[0]), 3), *wide[i + 1 :])
        for dtype, tolerance in ((np.float64, 1e-9), (np.float32, 1e-4)):
            _agrees(op, given, params, seed, dtype, tolerance, f"for the number {given[i]} as operand {name}")


def nan_and_infinity(op: Op, xs: Operands, params: Params, seed: int) -> None:
    """With a NaN or an infinity, kernels give the values of the definition; with a NaN, also the NaNs of its gradients.

    With an infinity, values alone are compared, and only where the definition is no NaN: infinity times 0 on the way is
    one, where a kernel may know the limit. NaN counts as an infinity then: sums in another order may give either.
    """
    rng = np.random.default_rng(seed)
    for i, name in enumerate(names_of(op.forward, len(xs)) if has_kernel(op) else ()):
        for value in (np.nan, np.inf, -np.inf) if is_floating(xs[i]) and xs[i].size else ():
            given = copies(xs)
            given[i].flat[rng.integers(xs[i].size)] = value
            for dtype in kernel_dtypes(op):
                _agrees_where_not_finite(op, cast_real(given, dtype), params, seed, f"where operand {name} has {value}")


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
EXTREMES: tuple[tuple[Check, Callable[[int], RandomDraw]], ...] = (
    (half_precision, RandomDraw),
    (no_elements, RandomDraw),
    (many_elements, RandomDraw),
    (large_numbers, LargeNumbers),
    (broadcast_operands, RandomDraw),
    (numbers_for_operands, RandomDraw),
    (nan_and_infinity, RandomDraw),
    (whole_numbers, RandomDraw),
)
BY_ROWS = no_elements, many_elements  # only of ops that take any number of rows


def _of_one_shape(op: Op, xs: Operands, params: Params) -> Operands:
    """The operands broadcast to one shape, if the op is elementwise, of several floating-point operands; else ()."""
    if len(xs) < 2 or op.updates or not all(is_floating(x) and x.size for x in xs):
        return ()
    try:
        wide = tuple(np.array(x) for x in np.broadcast_arrays(*xs))
        last = tuple(x[-1:] for x in wide)
        with kernels_disabled(), np.errstate(all="ignore"):
            y, same, row = (apply(op, copies(operands), params)[0] for operands in (xs, wide, last))
    except Exception:
        return ()  # they do not broadcast, or have no axes
    alike = y.shape == wide[0].shape and np.any(y) and np.allclose(y, same) and np.allclose(y[-1:], row)
    return wide if alike else ()


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
        try:
            y = results_of(op, cast_real(xs, dtype), params)[0]
            whose = f"{by_kernel('the result', op.name)} of {op.name!r} {when}"
            expect_close(y, wanted[0][1], tolerance, whose)  # before its gradients, which may run on wrong memory
            given = results(op, cast_real(xs, dtype), params, seed, dtype)
        except GradcheckError:
            raise
        except Exception as error:
            error.add_note(when.rstrip(","))
            raise
    for (what, got), (_, want) in zip(given, wanted, strict=True):
        whose = f"{what} of {op.name!r} {when}"
        if want.dtype == np.float64 and got.dtype != dtype and op.differentiable and "dtype" not in params:
            raise GradcheckError(f"{whose} is {got.dtype}; its operands are {np.dtype(dtype)}")
        expect_close(got, want, tolerance, whose)


def _agrees_where_not_finite(op: Op, xs: Operands, params: Params, seed: int, when: str) -> None:
    """The kernels against the reference, for operands that are not all finite."""
    dtype = next(x.dtype for x in xs if is_floating(x))
    try:
        with kernels_disabled():
            wanted = results(op, copies(xs), params, seed, dtype, exact=True)
    except Exception:
        return  # the definition does not take them
    any_nan = any(is_floating(x) and np.isnan(x).any() for x in xs)
    of_values = op.updates or not op.differentiable
    for i, ((what, got), (_, want)) in enumerate(
        zip(results(op, copies(xs), params, seed, dtype), wanted, strict=True)
    ):
        both = np.isfinite(got) & np.isfinite(want)
        if i and not of_values:
            wrong = np.isnan(want) & np.isfinite(got) & any_nan
        elif any_nan:
            wrong = ~both & (got != want) & ~(np.isnan(got) & np.isnan(want))
        else:
            wrong = ~both & (got != want) & ~np.isnan(want) & ~(np.isinf(want) & np.isnan(got))
        if wrong.any():
            first = tuple(int(n) for n in np.argwhere(wrong)[0])
            raise GradcheckError(
                f"{what} of {op.name!r} {when} is wrong: {got[first]:.6g} at {first}; that of the definition is "
                f"{want[first]:.6g}"
            )
        if not i or of_values:
            expect_close(np.where(both, got, 0), np.where(both, want, 0), 1e-4, f"{what} of {op.name!r} {when}")


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
