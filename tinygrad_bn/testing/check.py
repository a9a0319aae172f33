"""All checks of one op: its properties over drawn samples, and what would make them worthless."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from inspect import Parameter, signature
from typing import Any

import numpy as np
from tinygrad_bn_kernels import MODULES
from tinygrad_bn_kernels import names as kernel_names

from tinygrad_bn import backend
from tinygrad_bn.arguments import expect_integer, is_floating, shown
from tinygrad_bn.autograd import grad
from tinygrad_bn.backend import kernels_disabled
from tinygrad_bn.sample import Draw, Drawn, RandomDraw
from tinygrad_bn.tensor import OPS, Op, Tensor, apply
from tinygrad_bn.testing.calls import (
    ROUNDING,
    Operands,
    cast_real,
    copies,
    kernel_dtypes,
    overwritten,
    positions,
    result_size,
    results,
)
from tinygrad_bn.testing.diagnosis import names_of, of_kernel, of_rules
from tinygrad_bn.testing.extremes import BY_ROWS, EXTREMES, many_elements
from tinygrad_bn.testing.gradients import Function, GradcheckError, VacuousCheckError
from tinygrad_bn.testing.properties import OF_GRADIENTS, PROPERTIES
from tinygrad_bn.testing.smallest import example, smallest

ENOUGH = 25  # samples, to say that none of them has something
FEW = 4  # samples for the checks that take longer


@dataclass(frozen=True)
class OpReport:
    """What `check_op` has tested."""

    op: str
    samples: int
    kernels: dict[str, int]  # how many of the samples each kernel of the op took; it declined the others
    fixed: dict[str, Any]  # options that had the same value in every sample
    orders: tuple[int, ...] = ()  # of the derivatives; none of an op without gradients
    checks: tuple[str, ...] = ()  # by name; `testing/properties.py` and `testing/extremes.py` say what each does
    errors: dict[str, float] = field(default_factory=dict)  # largest error of each kernel in float32, of its scale
    not_run: tuple[str, ...] = ()  # kernels of devices that are not here

    def __str__(self) -> str:
        kernels = ", ".join(f"{name} (took {count} of {self.samples})" for name, count in self.kernels.items())
        not_run = f"; not run: {', '.join(self.not_run)}" if self.not_run else ""
        fixed = "".join(f"; only with {option}={value!r}" for option, value in self.fixed.items())
        orders = f"derivatives of order {', '.join(map(str, self.orders))}" if self.orders else "no derivatives"
        return f"{self.op}: {self.samples} samples; {orders}; kernels: {kernels or 'none'}{not_run}{fixed}"


def check_op(op: str | Function, examples: int = 25, seed: int = 0, allow_zero: bool = False) -> OpReport:
    """Run every property of the test-suite on an op, over drawn operands.

    Args:
        op: a function made by `primitive` or `fused`, or its name.
        examples: how many samples to check, at least 1.
        seed: of the draws, at least 0.
        allow_zero: accept operands whose gradient is zero in every sample, as that of a step function is.

    Returns:
        What was tested: which checks, orders of derivatives and kernels, and the largest error of each kernel.

    Raises:
        AssertionError: the property that fails, with a diagnosis, the sample and the smallest failing example; a sample
            that is none; a rule that does not take an option; a kernel with nearly the name of the op.
        VacuousCheckError: the samples could not show a mistake: they are all empty or zero, have no gradient, or give
            an option one value only, where another one changes the result (a number, a bool, or None: others are not
            tried); or a kernel of yours declined all of them.
        KeyError: there is no such op.
        TypeError: the function is not an op; or `examples` or `seed` is no integer, ValueError if it is too small.

    >>> print(check_op("mul", examples=3))
    mul: 3 samples; derivatives of order 1, 2, 3; kernels: none; not run: mul (cuda)
    """
    examples, seed = expect_integer("examples", examples, 1), expect_integer("seed", seed, 0)
    if isinstance(op, str) and op not in OPS:
        raise KeyError(no_such_op(op))
    declared = OPS[op] if isinstance(op, str) else getattr(op, "op", None)
    if not isinstance(declared, Op):
        raise TypeError(f"check_op takes an op, made by primitive or fused, or its name; got {op!r}: see gradcheck")
    if not isinstance(declared.formula, str):
        raise TypeError(f"the formula of {declared.name!r} is a text, as 'y = a · b'; got {shown(declared.formula)}")
    expect_rules_that_take_the_options(declared)
    expect_no_kernel_with_nearly_the_name(declared)
    samples = [drawn(declared, RandomDraw(seed + i)) for i in range(max(examples, ENOUGH))]
    with np.errstate(divide="ignore", invalid="ignore"):  # a wrong rule is an error here, not a warning
        for i, (xs, params) in enumerate(samples[:examples]):
            for check in PROPERTIES:
                _run(check, declared, xs, params, seed + i)
    expect_telling(declared, samples, allow_zero)
    expect_options_that_change(declared, samples)
    extremes = [pair for pair in EXTREMES if pair[0] not in BY_ROWS or _has_rows(samples)]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
        for check, draw in extremes:
            for i in range(min(examples, 1 if check is many_elements else FEW)):
                _run(check, declared, *drawn(declared, draw(seed + i)), seed + i)
    ran = _kernels_that_ran(declared, samples[:examples])
    if idle := [name for name, count in ran.items() if not count and (name, "cpu") not in MODULES]:
        raise VacuousCheckError(
            f"the kernel {idle[0]!r} declined all of {examples} samples, so it never ran: draw operands that it takes"
        )
    values = {option: [params[option] for _, params in samples] for option in samples[0][1]}
    fixed = {option: seen[0] for option, seen in values.items() if _is_one_value(seen)}
    checks = (*(check.__name__ for check in PROPERTIES), *(check.__name__ for check, _ in extremes))
    return OpReport(
        declared.name, examples, ran, fixed, orders_of(declared), checks, kernel_errors(declared, samples[:FEW]),
        tuple(f"{name} ({device})" for name, device in kernels_of(declared) if device != "cpu"),
    )  # fmt: skip


def no_such_op(name: str) -> str:
    """That there is no op of this name, with those of nearly the name; with all if there are none."""
    near = get_close_matches(name.casefold(), OPS)
    meant = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {', '.join(sorted(OPS))}"
    return f"there is no op {name!r}; {meant}"


def _has_rows(samples: Sequence[Drawn]) -> bool:
    """Whether the first operand may have any number of rows: it has several in these samples."""
    return len({len(xs[0]) for xs, _ in samples if np.ndim(xs[0])}) > 1


def orders_of(op: Op) -> tuple[int, ...]:
    """The orders of derivatives that `check_op` checks."""
    return (1, 2, 3) if op.differentiable else ()


def _run(check: Any, op: Op, xs: Any, params: dict[str, Any], seed: int) -> None:
    """Run one check of one sample; an error gets the smallest example that it is found with, and a diagnosis."""
    try:
        check(op, xs, params, seed)
    except Exception as error:
        detaches = check in OF_GRADIENTS or isinstance(error, AttributeError)  # an array has no detach()
        why = of_kernel(op, error) or of_rules(op, xs, params, detaches)
        told = GradcheckError(why) if why else error
        for note in getattr(error, "__notes__", []) if why else ():
            told.add_note(note)
        shapes = [None if x is None else x.shape for x in xs]
        told.add_note(f"in {check.__name__} of {op.name!r}, example {seed}: shapes {shapes}, {params}")
        small = smallest(check, op, xs, params, seed, error)
        told.add_note(f"smallest failing example: {example(op, small, params)}")
        raise told from (error if why else None)


def drawn(op: Op, draw: Draw) -> Drawn:
    """A sample of the op. Raises GradcheckError unless that is operands, arrays with reals in float64, and options."""
    wanted = "it has to give operands and options, as in: lambda d: ((d.array(REAL, d.shape()),), {})"
    whose = f"the sample of {op.name!r}"
    try:
        xs, params = op.sample(draw)
    except Exception as error:
        raise GradcheckError(f"{whose} fails with {type(error).__name__}: {error}; {wanted}") from error
    parameters = list(signature(op.forward).parameters.values())
    most = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    if not isinstance(xs, tuple | list) or not xs:
        raise GradcheckError(f"{whose} gives {shown(xs)} for the operands, which are a tuple: (x,) for one; {wanted}")
    if most and len(xs) != most:
        raise GradcheckError(f"{whose} gives {len(xs)} operands; {op.name!r} has {most}; give None for one left out")
    options = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    if params.keys() != options:
        raise GradcheckError(f"{whose} gives the options {sorted(params)}; {op.name!r} has {sorted(options)}")
    for name, x in zip(names_of(op.forward, len(xs)), xs, strict=True):
        if x is not None and not isinstance(x, np.ndarray | np.generic):
            raise GradcheckError(f"{whose} gives {shown(x)} for operand {name}: give an array, or None; {wanted}")
        if x is not None and is_floating(x) and x.dtype != np.float64:
            raise GradcheckError(
                f"{whose} gives {x.dtype} for operand {name}: give float64; the checks convert it to other dtypes"
            )
    return tuple(xs), params


# ---- declarations that a sample does not show ------------------------------------------------------------


def expect_rules_that_take_the_options(op: Op) -> None:
    """Raise GradcheckError unless every rule can be called with the operands and the options of the op."""
    parameters = list(signature(op.forward).parameters.values())
    options = [p.name for p in parameters if p.kind is Parameter.KEYWORD_ONLY]
    operands = [p.name for p in parameters if p.kind is Parameter.POSITIONAL_OR_KEYWORD]  # [] for any number of them
    wanted = [*(["i"] if op.each else []), "g", "y", *operands]
    of_each = [(rule, f"operand {name!r} of {op.name!r}") for rule, name in zip(op.rules, operands, strict=False)]
    for rule, whose in [(op.each, repr(op.name))] if op.each else of_each:
        if rule is None:
            continue
        takes = signature(rule).parameters.values()
        any_option = any(p.kind is p.VAR_KEYWORD for p in takes)
        if missing := [o for o in options if not any_option and o not in [p.name for p in takes]]:
            raise GradcheckError(
                f"the rule of {whose} does not take the option {', '.join(missing)}: a rule gets all options, by name"
            )
        try:
            signature(rule).bind(*wanted, **dict.fromkeys(options))
        except TypeError as error:
            raise GradcheckError(f"the rule of {whose} has to take ({', '.join(wanted)}): {error}") from None


def expect_no_kernel_with_nearly_the_name(op: Op) -> None:
    """Raise GradcheckError if a kernel that belongs to no op has nearly the name of a missing one of this op.

    It would never run. If the right one is there, the other is left from before its name was corrected.
    """
    present = kernel_names()
    for name, device in present:
        if name.removesuffix(".vjp") in OPS or name.startswith("array."):
            continue
        close = _nearly(name, op)
        if close and (close, device) not in present:
            raise GradcheckError(f"the {device} kernel {name!r} belongs to no op and never runs; is it {close!r}?")


def _nearly(name: str, op: Op) -> str:
    """The name of a kernel of `op` that `name` may be meant for: misspelt, in other letters, or with another ending."""
    written = name.casefold()
    names = {known.casefold(): known for known in (op.name, op.vjp)}
    if close := get_close_matches(written, names, n=1, cutoff=0.8):
        return names[close[0]]
    rest = written.removeprefix(op.name.casefold())
    if rest == written or rest[:1].isalnum():
        return ""
    if rest[1:] in ("", "forward", "fwd", "cpu", "cuda", "kernel"):
        return op.name
    return op.vjp if rest[1:] in ("vjp", "backward", "bwd", "grad", "gradient", "gradients", "derivative") else ""


# ---- samples that show nothing ---------------------------------------------------------------------------


def expect_telling(op: Op, samples: Sequence[Drawn], allow_zero: bool = False) -> None:
    """Raise VacuousCheckError if these samples would pass with a wrong op."""
    count = len(samples)
    for i, name in enumerate(names_of(op.forward, len(samples[0][0]))):
        given = [xs[i] for xs, _ in samples if i < len(xs) and xs[i] is not None]
        where = f"operand {name} of {op.name!r} is"
        for silent, what in (
            (not given, "None"),
            (not any(np.size(x) for x in given), "empty"),
            (not any(np.any(x) for x in given), "zero"),
        ):
            if silent:
                raise VacuousCheckError(f"{where} {what} in all of {count} samples: draw others, or nothing is tested")
    if not op.differentiable:
        return
    largest: dict[str, float] = {}
    size = 0.0  # of the results
    for xs, params in samples:
        for name, found in _gradients(op, xs, params):
            largest[name] = max(largest.get(name, 0.0), float(np.abs(found).max(initial=0)))
        size = max(size, result_size(op, xs, params))
    for name, gradient in largest.items():
        if gradient <= max(1e-11 * min(size, 1.0), ROUNDING) and not allow_zero:
            value = f"at most {gradient:.1g}, which is 0 but for rounding," if gradient else "0"
            raise VacuousCheckError(
                f"the gradient of operand {name} of {op.name!r} is {value} in all of {count} samples, which shows "
                "nothing: draw others; if it is 0 everywhere, use allow_zero, or the rule None"
            )


def expect_options_that_change(op: Op, samples: Sequence[Drawn]) -> None:
    """Raise VacuousCheckError if an option has one value in all samples, and the op gives another result with another.

    A rule or a kernel that ignores the option would pass; a composition alone cannot ignore it. Numbers, bools and None
    are tried. An option that has one allowed value, or whose value does not matter here, may stay as it is.
    """
    if not (any(op.rules) or op.each or kernels_of(op)):
        return
    for option, value in samples[0][1].items():
        if _is_one_value([params[option] for _, params in samples]):
            for other in _others(value):
                if any(_differ(op, xs, params, {**params, option: other}) for xs, params in samples[:FEW]):
                    raise VacuousCheckError(
                        f"the option {option} of {op.name!r} is {value} in all of {len(samples)} samples, and {other} "
                        "gives another result: a rule or a kernel that ignores the option passes. Let the sample "
                        f"choose, as {{'{option}': d.choice([{value}, {other}])}}"
                    )


def _others(value: Any) -> list[Any]:
    """Other values to try for an option."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value - 1]
    if isinstance(value, float):
        return [value / 2 or 0.5, value + 0.25]
    return [0] if value is None else []


def _differ(op: Op, xs: Operands, params: dict[str, Any], others: dict[str, Any]) -> bool:
    """Whether the reference takes the other options, and changes or gives other arrays with them."""
    found = []
    for options in (params, others):
        operands = copies(xs)
        try:
            with kernels_disabled(), np.errstate(all="ignore"):
                found.append([op.function(*operands, **options), *(operands[i] for i in overwritten(op))])
        except Exception:
            return False
    return any(a is not None and not np.array_equal(a, b, equal_nan=True) for a, b in zip(*found, strict=True))


def _is_one_value(values: Sequence[Any]) -> bool:
    return len(values) > 1 and len(set(map(repr, values))) == 1


def _gradients(op: Op, xs: Sequence[Any], params: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The operands that the op is differentiable in, by name, and their gradients under a random cotangent."""
    names = names_of(op.forward, len(xs))
    ts = {i: Tensor(xs[i], requires_grad=True) for i in positions(op, xs)}
    y = apply(op, [ts.get(i, x) for i, x in enumerate(xs)], params)[0]
    if not isinstance(y, Tensor) or not y.requires_grad:
        return
    g = np.random.default_rng(0).normal(size=y.shape)
    for i, gradient in zip(ts, grad(y, list(ts.values()), g), strict=True):
        yield names[i], gradient.numpy()


def kernels_of(op: Op) -> list[tuple[str, str]]:
    """The kernels of an op, each with its device."""
    return [(name, device) for name, device in kernel_names() if name in (op.name, op.vjp)]


def kernel_errors(op: Op, samples: Sequence[Drawn]) -> dict[str, float]:
    """The largest error of each kernel on the CPU in float32 against the reference in float64, of the largest number.

    Raises what the op raises for these samples.
    """
    present = [name for name, device in kernels_of(op) if device == "cpu"]
    errors = dict.fromkeys(present, 0.0)
    for xs, params in samples if present else ():
        single = cast_real(xs, np.float32)
        with kernels_disabled():
            wanted = results(op, cast_real(single, np.float64), params, 0, np.float32, exact=True)
        given = results(op, single, params, 0, np.float32)
        for i, ((_, got), (_, want)) in enumerate(zip(given, wanted, strict=True)):
            name = op.vjp if i and op.differentiable else op.name
            scale = float(np.abs(want).max(initial=0))
            if name in errors and scale and np.isfinite(want).all():
                errors[name] = max(errors[name], float(np.abs(got - want.astype(np.float64)).max()) / scale)
    return errors


def _kernels_that_ran(op: Op, samples: Sequence[Drawn]) -> dict[str, int]:
    """The kernels of the op on the CPU, and how many of the samples each took."""
    ran = {name: 0 for name, device in kernels_of(op) if device == "cpu" and backend.find_kernel(name, "cpu")}
    for xs, params in samples:
        taken = [name for dtype in kernel_dtypes(op) for name in _taken(op, cast_real(xs, dtype), params)]
        for name in set(taken):
            ran[name] += 1
    return ran


def _taken(op: Op, xs: Operands, params: dict[str, Any]) -> Iterator[str]:
    """The kernels on the CPU that take these operands."""
    if (forward := backend.find_kernel(op.name, "cpu")) and forward(*copies(xs), **params) is not NotImplemented:
        yield op.name
    if vjp := backend.find_kernel(op.vjp, "cpu"):
        xs = copies(xs)  # an op may overwrite its operands
        y, saved = backend.forward(op, xs, params)
        by_products = dict(zip(op.saves, saved, strict=True))
        of = positions(op, xs)
        for wanted in (of, *([i] for i in of)):  # a kernel may give some of the gradients only
            needs = [i in wanted for i in range(len(xs))]
            if vjp(y, y, *xs, needs=needs, **params, **by_products) is not NotImplemented:
                yield op.vjp
                return
