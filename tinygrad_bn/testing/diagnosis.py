"""What a failed check suggests, in words: by the ratio of two derivatives, and by what the rules of an op return."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import signature, unwrap
from traceback import walk_tb
from typing import Any

import numpy as np

from tinygrad_bn.arguments import is_floating
from tinygrad_bn.backend import expect_broadcast, find_kernel, kernels_disabled
from tinygrad_bn.modes import RECORDING, Mode, recording
from tinygrad_bn.sample import Array, Shape
from tinygrad_bn.tensor import Op, Tensor, apply


def of_ratio(analytic: float, numeric: float, operand: Shape, result: Shape) -> str:
    """The mistake that the ratio of a wrong derivative to the numerical one suggests; "" for none.

    `operand` and `result` are shapes: a factor that is one of their sizes is a sum or a mean gone wrong.
    """
    if not math.isfinite(analytic):
        return (
            "the gradient is not finite: a rule divides by 0 or multiplies it with infinity, as g · y / x does at x = 0"
        )
    if numeric == 0:
        return "the result does not vary with this operand here"
    ratio = analytic / numeric
    if abs(ratio) < 1e-6:
        return "the gradient is 0: its path is dropped, as by detach() or a rule that gives 0"
    if math.isclose(ratio, -1, rel_tol=1e-4):
        return "the sign is flipped"
    for n, what in _sizes(operand, result).items():
        for factor, wrong in ((n, "too large"), (1 / n, "too small")):
            if math.isclose(ratio, factor, rel_tol=1e-4):
                why = "a sum taken for a mean" if factor > 1 else "a mean taken for a sum"
                why += ", or a path that is counted twice" if factor == 2 else ""
                return f"the gradient is {n} times {wrong}, and {n} is {what}: {why}"
    if math.isclose(ratio, 2, rel_tol=1e-4):
        return "the gradient is twice the right one: a path is counted twice"
    if math.isclose(ratio, 0.5, rel_tol=1e-4):
        return "the gradient is half the right one: one of two equal paths is lost, or a factor of 2"
    return ""


def of_elements(
    got: Array, want: Array, operand: Shape = (), result: Shape = (), tolerance: float = 1e-5, what: str = "gradient"
) -> str:
    """What is wrong with a whole gradient, or another array, element by element; "" if nothing stands out.

    `tolerance` is relative to the largest number that is wanted.
    """
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if not np.isfinite(got).all():
        return of_ratio(math.nan, 1.0, operand, result) if what == "gradient" else "it is not finite: it overflows"
    close = tolerance * float(np.abs(want).max(initial=0))
    if got.shape != want.shape or not close:
        return ""
    error = got - want
    if tolerance < 1e-3 and np.abs(error).max() < max(close, 1e-6 * float(np.abs(want).max())):
        return "the error is that of float32: it is computed in less than float64"
    ratio = float(np.vdot(want, got) / np.vdot(want, want))
    if np.abs(got - ratio * want).max() < close:
        words = of_ratio(ratio, 1.0, operand, result) or f"the gradient is {ratio:.4g} times the right one: a factor"
        return words.replace("gradient", what)
    if got.size > 1 and np.ptp(error) < close:
        return f"every element is off by {error.flat[0]:+.4g}: a path through a sum or a mean is lost"
    if np.abs(np.sort(got, axis=None) - np.sort(want, axis=None)).max() < close:
        return f"the numbers are right, in another order: the {what} is transposed or permuted"
    wrong = np.abs(error) > close
    first = tuple(int(i) for i in np.argwhere(wrong)[0])
    where = f"{wrong.sum():,} of {wrong.size:,} elements are wrong, first at {first}"
    lost = ": a term or a path is lost or wrong" if what == "gradient" else ""
    return f"{where}, {got[first]:.6g} for {want[first]:.6g}{lost}"


def _sizes(operand: Shape, result: Shape) -> dict[int, str]:
    """Numbers of elements, larger than 1, and what they count."""
    sizes: dict[int, str] = {}
    for shape, whose in ((operand, "the operand"), (result, "the result")):
        for axis, n in enumerate(shape):
            sizes.setdefault(n, f"the length of axis {axis} of {whose}")
    x, y = math.prod(operand), math.prod(result)
    for n, what in ((x, "the size of the operand"), (y, "the size of the result")):
        sizes.setdefault(n, what)
    if y and x % y == 0:
        sizes.setdefault(x // y, "how many elements of the operand each of the result combines")
    return {n: what for n, what in sizes.items() if n > 1}


def names_of(f: Callable[..., Any], count: int) -> list[str]:
    """The names of the first `count` operands of `f`, in quotes; numbers where it does not name them."""
    try:
        parameters = [p for p in signature(f).parameters.values() if p.kind < p.KEYWORD_ONLY]
    except (TypeError, ValueError):
        parameters = []
    if len(parameters) == 1 and parameters[0].kind is parameters[0].VAR_POSITIONAL:
        return [f"'{parameters[0].name}[{i}]'" for i in range(count)]
    names = [repr(p.name) for p in parameters if p.kind is not p.VAR_POSITIONAL]
    return names[:count] if len(names) >= count else [str(i) for i in range(count)]


def of_kernel(op: Op, error: BaseException | None) -> str:
    """That a kernel of the op on the CPU has raised this error, or the one that it was raised from; "" if none has."""
    kernels = {name: unwrap(found) for name in (op.name, op.vjp) if (found := find_kernel(name, "cpu"))}
    codes = {getattr(getattr(k, "py_func", k), "__code__", None): name for name, k in kernels.items()}
    codes.pop(getattr(unwrap(op.forward), "__code__", None), None)
    while error:
        for frame, _ in walk_tb(error.__traceback__):
            if frame.f_code in codes:
                name, what = codes[frame.f_code], f"{type(error).__name__}: {error}"
                return f"the kernel {name!r} raises {what}. For what it does not take it may return NotImplemented"
        error = error.__cause__
    return ""


def of_rules(op: Op, xs: Sequence[Any], params: dict[str, Any], detaches: bool = True) -> str:
    """What is wrong with the form of an op's gradients for these float64 operands; "" for nothing.

    `detaches`: whether that may be because a tensor is detached.
    """
    tensors = [Tensor(x, requires_grad=True) if is_floating(x) else x for x in xs]
    if op.fused:
        with recording(True), _conversions() as converted, _detached() as cut:
            failed = _fails(lambda: op.forward(*tensors, **params))
        whose = f"the composition of {op.name!r}"
        if converted or "ufunc" in failed:
            return f"{whose} {NUMPY}"
        return f"{whose} {cut[0]}: derivatives lose the path through it" if cut and detaches else ""
    with kernels_disabled():
        y = apply(op, xs, params)[0]
    g = np.asarray(np.random.default_rng(0).normal(size=y.shape))
    for i, name in enumerate(names_of(op.forward, len(xs))):
        needs = [i == j and is_floating(x) for j, x in enumerate(xs)]
        whose = f"the rule of operand {name} of {op.name!r}"
        if op.each:
            whose = f"the rule of {op.name!r}, for operand {name},"
        results: list[Any] = []
        with recording(True), _conversions() as converted, _detached() as cut:
            graph = Tensor(g, requires_grad=True), Tensor(y, requires_grad=True), tensors
            failed = _fails(lambda: results.append(op.pull(*graph, needs, params)[i]))  # noqa: B023
        if converted or "ufunc" in failed or (results and isinstance(results[0], np.ndarray)):
            return f"{whose} {NUMPY}"
        if results and isinstance(results[0], list | tuple):
            return f"{whose} gives a {type(results[0]).__name__}; a rule gives the gradient of its operand, one tensor"
        if results and results[0] is not None:
            shape = np.shape(results[0]._data if isinstance(results[0], Tensor) else results[0])
            try:
                expect_broadcast(xs[i].shape, shape)
            except ValueError:
                return (
                    f"{whose} gives a gradient of shape {shape} for an operand of shape {xs[i].shape} (y {y.shape}); "
                    "if it has to be summed over axes that the operand was repeated along, use sum_to"
                )
        if cut and not failed and detaches:
            return f"{whose} {cut[0]}: higher derivatives lose the path through it"
    return ""


NUMPY = (
    "calls NumPy on tensors: its gradient cannot be differentiated again. Use operators, and the functions of "
    "tinygrad_bn.functional"
)


def _fails(call: Callable[[], Any]) -> str:
    """The words of the TypeError that a call raises; "" if it raises none."""
    try:
        call()
    except TypeError as error:
        return str(error)
    except Exception:
        return ""
    return ""


@contextmanager
def _conversions() -> Iterator[list[Shape]]:
    """Shapes of the tensors with a gradient that become NumPy arrays in this block."""
    from unittest.mock import patch  # loads asyncio, so only when a check has failed

    seen: list[Shape] = []
    convert = Tensor.__array__

    def noted(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.requires_grad:
            seen.append(self.shape)
        return convert(self, *args, **kwargs)

    with patch.object(Tensor, "__array__", noted):
        yield seen


@contextmanager
def _detached() -> Iterator[list[str]]:
    """What takes tensors from their graph in this block, in words."""
    from unittest.mock import patch

    seen: list[str] = []
    detach, begin = Tensor.detach, Mode.__init__

    def noted(self: Tensor) -> Tensor:
        if self.requires_grad:
            seen.append("detaches a tensor")
        return detach(self)

    def noted_block(self: Mode, variable: Any, value: object) -> None:
        if variable is RECORDING and not value:
            seen.append("computes under no_grad()")
        begin(self, variable, value)

    with patch.object(Tensor, "detach", noted), patch.object(Mode, "__init__", noted_block):
        yield seen
