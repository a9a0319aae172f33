"""What there is to know of an op, in lines of at most 100 columns: `python -m tinygrad_bn ops`."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from textwrap import dedent, wrap
from typing import Any

import numpy as np

from tinygrad_bn.arguments import is_floating
from tinygrad_bn.modes import composed
from tinygrad_bn.sample import RandomDraw
from tinygrad_bn.tensor import OPS, Op, Tensor, apply, held_constant
from tinygrad_bn.testing.check import OpReport, check_op, kernels_of
from tinygrad_bn.testing.diagnosis import names_of

WIDTH = 100
LABEL = 11  # columns


@dataclass(frozen=True)
class OpEntry:
    """An op in words. What was measured is in `report`; None if the checks were not run or failed."""

    op: Op
    signature: str
    gradients: tuple[str, ...]
    fuses: tuple[str, ...]  # the ops that the composition of a fused op is made of
    kernels: dict[str, list[str]]  # by device
    report: OpReport | None
    failure: str  # why a check failed; "" if none did

    def lines(self, at_length: bool = False) -> Iterator[str]:
        """The entry as text; at length with what it says of itself, its source and every check."""
        yield from wrap(self.signature, WIDTH, subsequent_indent=" " * (LABEL + 2))
        if at_length:
            yield from _labelled("", inspect.getdoc(inspect.unwrap(self.op.forward)) or "")
        yield from _labelled("formula", self.op.formula)
        for i, gradient in enumerate(self.gradients):
            yield from _labelled("" if i else "gradients", gradient)
        if self.fuses:
            yield from _labelled("fuses", ", ".join(self.fuses))
        kernels = "; ".join(f"{device}: {', '.join(names)}" for device, names in self.kernels.items())
        yield from _labelled("kernels", kernels or "none: NumPy")
        yield from _labelled("checked", self.failure or self._checked(at_length))
        if at_length:
            yield ""
            yield from _source(self.op).rstrip().splitlines()

    def _checked(self, at_length: bool) -> str:
        if self.report is None:
            return "no"
        orders = f"orders {', '.join(map(str, self.report.orders))}" if self.report.orders else "values; no gradient"
        errors = [f"{name} {error:.1e}" if error else f"{name} 0" for name, error in self.report.errors.items()]
        words = f"{orders}; {self.report.samples} samples"
        if errors:
            words += f"; worst error in float32 of {', '.join(errors)}"
        return f"{words}; {', '.join(c.replace('_', ' ') for c in self.report.checks)}" if at_length else words


def entry(name: str, examples: int) -> OpEntry:
    """All that is known of an op; its checks run with so many examples, 0 for none."""
    op, report, failure = OPS[name], None, ""
    if examples:
        try:
            report = check_op(name, examples=examples, allow_zero=name == "sign")
        except Exception as error:  # an op of a user may raise anything
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            words = [f"{kind}{error}", *getattr(error, "__notes__", [])]
            failure = "FAILED: " + " ".join(" ".join(words).split())
    kernels: dict[str, list[str]] = {}
    for kernel, device in kernels_of(op):
        kernels.setdefault(device, []).append(kernel)
    return OpEntry(op, signature_of(op), tuple(gradients_of(op)), tuple(fused_ops(op)), kernels, report, failure)


def signature_of(op: Op) -> str:
    """`sum(x, *, axis: Axis = None)`: operands by name, options with what they may be."""
    whole = inspect.signature(inspect.unwrap(op.forward))
    empty = inspect.Parameter.empty
    short = [p if p.kind is p.KEYWORD_ONLY else p.replace(annotation=empty) for p in whole.parameters.values()]
    return f"{op.name}{whole.replace(parameters=short, return_annotation=empty)}".replace("'", "")


def _labelled(label: str, text: str) -> Iterator[str]:
    """The text, wrapped, behind a label."""
    for paragraph in text.split("\n\n"):
        for line in wrap(" ".join(paragraph.split()), WIDTH - LABEL - 2) or [""]:
            yield f"  {label:<{LABEL}}{line}".rstrip()
            label = ""


def _source(op: Op) -> str:
    """The declaration of an op; "" if its file cannot be read."""
    try:
        return dedent(inspect.getsource(inspect.unwrap(op.forward)))
    except (OSError, TypeError):
        return ""


# ---- gradients and parts ---------------------------------------------------------------------------------


def gradients_of(op: Op) -> Iterator[str]:
    """The gradient of each operand as its rule is written: `∂a = g * b`."""
    names = [name.strip("'") for name in names_of(op.forward, max(len(op.rules), 1))]
    if op.fused:
        of_rules = "; those with a graph by its rules, made of ops with kernels"
        yield f"those of its composition, of every order{of_rules if any(op.rules) else ''}"
        return
    if not op.differentiable:
        yield "none"
        return
    written = _written_rules(op)
    if op.each:
        yield f"∂xs[i] = {written.get('each') or _called(op.each, 'i, ')}"
    for i, (name, rule) in enumerate(zip(names, op.rules, strict=False)):
        if rule is None or rule is held_constant:
            yield f"∂{name}: {'0' if rule is None else 'held constant'}"
        else:
            yield f"∂{name} = {written.get(i) or _called(rule)}"


def _called(rule: Any, first: str = "") -> str:
    return f"{getattr(rule, '__name__', 'rule')}({first}g, y, …)".replace("<lambda>", "rule")


def _written_rules(op: Op) -> dict[Any, str]:
    """The source of the rules that are lambdas in the declaration, by position, on one line."""
    try:
        (function,) = ast.parse(_source(op)).body
    except (SyntaxError, ValueError):
        return {}
    written: dict[Any, str] = {}
    for call in getattr(function, "decorator_list", []):
        if isinstance(call, ast.Call) and ast.unparse(call.func).rpartition(".")[2] == "primitive":
            rules = [*enumerate(call.args), *((keyword.arg, keyword.value) for keyword in call.keywords)]
            written |= {place: ast.unparse(rule.body) for place, rule in rules if isinstance(rule, ast.Lambda)}
    return written


def fused_ops(op: Op) -> list[str]:
    """The ops that the composition of a fused op runs, each once, in the order of computation."""
    if not op.fused:
        return []
    xs, params = op.sample(RandomDraw(0))
    with composed(), np.errstate(all="ignore"):
        ts = [Tensor(x, requires_grad=True) if is_floating(x) else x for x in xs]
        y = apply(op, ts, params)[0]
    found: dict[str, None] = {}
    pending, seen = [(y, False)], set()
    while pending:  # operands before results
        t, ready = pending.pop()
        if not isinstance(t, Tensor) or t.node is None:
            continue
        if ready:
            found[t.node.op.name] = None
        elif id(t) not in seen:
            seen.add(id(t))
            pending += [(t, True), *((x, False) for x in reversed(t.node.inputs))]
    return [name for name in found if name != "astype"]
