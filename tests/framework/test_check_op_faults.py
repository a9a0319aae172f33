"""Faults that hide: each is planted in an op or its kernels, and `check_op` has to say these words about it."""

import re

import numpy as np
import pytest
from tinygrad_bn_kernels.cpu.jit import njit
from tinygrad_bn_kernels.cpu.threads import split

from tests.tools.registries import registries  # noqa: F401 - for all tests of this file
from tinygrad_bn import Tensor, extend, functional, no_grad
from tinygrad_bn.extend import (
    NONZERO,
    REAL,
    Domain,
    broadcasting,
    check_op,
    elementwise,
    fused,
    kernel,
    primitive,
)

pytestmark = pytest.mark.slow


ANY, PAIR = elementwise(REAL), broadcasting(REAL, REAL)


def rows(*shapes):
    """A sample of operands of these shapes, some more rows in the first."""
    return lambda d: ((d.array(REAL, (d.integer(2, 5), *shapes[0])), *(d.array(REAL, s) for s in shapes[1:])), {})


def op_of(forward, *rules, sample=ANY, name="planted"):
    forward.__name__ = forward.__qualname__ = name
    return (primitive(*rules, formula="y", sample=sample) if rules else fused(formula="y", sample=sample))(forward)


def cut(x):
    return x.detach() if isinstance(x, Tensor) else x


@no_grad()
def squared(x):
    return x * x


def without_graph(x):
    with no_grad():
        return squared(x)


def kept(g, x):
    return extend.broadcast_to(functional.reshape(g, shape=(*g.shape, 1)), shape=x.shape)


def cube():
    """x³, whose second derivative is right and whose third is not."""
    line = op_of(lambda x: x * 1.0, lambda g, y, x: g * 5, name="planted_line")
    square = op_of(lambda x: x * x, lambda g, y, x: g * 2 * line(x), name="planted_square")
    return op_of(lambda x: x * x * x, lambda g, y, x: g * 3 * square(x))


# What is wrong: an op, and what a user reads.
RULES = {
    "sign": (lambda: op_of(lambda x: -x, lambda g, y, x: g), r"operand 'x': gradient .*the sign is flipped"),
    "factor": (
        lambda: op_of(lambda x: x * x, lambda g, y, x: g * x * 14),
        r"operand 'x': .*the gradient is 7 times the right one: a factor",
    ),
    "half": (
        lambda: op_of(lambda x: x * x, lambda g, y, x: g * x, sample=lambda d: ((d.array(REAL, (3,)),), {})),
        "half the right one: one of two equal paths is lost",
    ),
    "forgotten 1/N": (
        lambda: op_of(lambda x: np.mean(x, axis=1), lambda g, y, x: kept(g, x), sample=rows((7,))),
        "gradient is 7 times too large, and 7 is the length of axis 1 of the operand: a sum taken for a mean",
    ),
    "path through a mean lost": (
        lambda: op_of(
            lambda x: np.mean(x) - x, lambda g, y, x: -g, sample=lambda d: ((d.array(REAL, (d.integer(2, 4), 3)),), {})
        ),
        r"every element is off by [-+]\d.*: a path through a sum or a mean is lost",
    ),
    "transposed": (
        lambda: op_of(lambda x: x.T * 1.0, lambda g, y, x: g * 1.0, sample=lambda d: ((d.array(REAL, (3, 3)),), {})),
        "the numbers are right, in another order: the gradient is transposed or permuted",
    ),
    "wrong in a corner": (
        lambda: op_of(
            lambda x: x * 2.0,
            lambda g, y, x: g * (2.0 + np.array([0.0, 0.0, 1.0])),
            sample=rows((3,)),
        ),
        r"elements are wrong, first at \(0, 2\), .*a term or a path is lost or wrong",
    ),
    "un-broadcast missing": (
        lambda: op_of(
            lambda x, b: x + b[:, None],
            lambda g, y, x, b: g,
            lambda g, y, x, b: g,
            sample=lambda d: ((d.array(REAL, (3, 4)), d.array(REAL, (3,))), {}),
        ),
        r"rule of operand 'b' of 'planted' gives a gradient of shape \(3, 4\) for an operand of shape \(3,\).*sum_to",
    ),
    "detached in a rule": (
        lambda: op_of(lambda x: x * x * x, lambda g, y, x: g * 3 * x * cut(x)),
        "rule of operand 'x' of 'planted' detaches a tensor: higher derivatives lose the path through it",
    ),
    "third derivative": (cube, "third derivative, operand .*gradient"),
    "None for a rule": (
        lambda: op_of(lambda a, b: a * b, lambda g, y, a, b: g * b, None, sample=PAIR),
        "operand 'b' has the rule None, but the result varies with it",
    ),
    "detached in a composition": (
        lambda: op_of(lambda x: x * x.detach()),
        "the composition of 'planted' detaches a tensor: derivatives lose the path through it",
    ),
    "no_grad in a composition": (
        lambda: op_of(lambda x: x * without_graph(x)),
        r"the composition of 'planted' computes under no_grad\(\): derivatives lose the path through it",
    ),
    "a rule that gives a list": (
        lambda: op_of(lambda x: x * 2.0, lambda g, y, x: [g * 2.0]),
        "the rule of operand 'x' of 'planted' gives a list; a rule gives the gradient of its operand, one tensor",
    ),
    "the forward writes into its operand": (
        lambda: op_of(lambda x: np.multiply(x, 2.0, out=x), lambda g, y, x: g * 2.0),
        "the forward pass of 'planted' changed operand 'x': it writes into its memory; make a new array",
    ),
    "random": (
        lambda: op_of(lambda x: x * np.random.default_rng().uniform(), lambda g, y, x: g),
        "the result of 'planted' differs between two calls with the same operands.* draw random numbers from an option",
    ),
    "small and wrong": (
        lambda: op_of(lambda x: 1e-13 * x * x, lambda g, y, x: g * 3e-13 * x),
        "operand 'x': gradient .*WRONG",
    ),
    "0 / 0 where x is 0": (
        lambda: op_of(lambda x: x * x, lambda g, y, x: g * 2 * y / x),
        "operand 'x': gradient [+]nan.*not finite: a rule divides by 0",
    ),
    "narrowed": (
        lambda: op_of(lambda x: np.float32(x) * 1, lambda g, y, x: g),
        "float64 operands gave float32: the forward narrows",
    ),
    "wide": (
        lambda: op_of(lambda x: np.float64(x) * 2, lambda g, y, x: g * 2),
        "float32 operands gave float64",
    ),
    "wrong in float16": (
        lambda: op_of(
            lambda x: x * (3.0 if x.dtype == np.float32 and np.all(x == x.astype(np.float16)) else 2.0),
            lambda g, y, x: g * 2,
            sample=elementwise(NONZERO),
        ),
        "the result of 'planted' in float16 is wrong: the result is 1.5 times the right one: a factor",
    ),
    "rule fails without elements": (
        lambda: op_of(lambda x: x * 2.0, lambda g, y, x: g * 2 + 0 * functional.max(x), sample=rows((3,))),
        "the gradients of 'planted' fail for operands without elements: .*max",
    ),
    "wrong beyond 5,000 elements": (
        lambda: op_of(lambda x: np.where(np.arange(x.size).reshape(x.shape) < 5000, x, 0), lambda g, y, x: g),
        "for operands of 10,000 elements: operand 'x': gradient",
    ),
    "wrong beyond 100": (
        lambda: op_of(lambda x: np.clip(x, -100, 100) * 1.0, lambda g, y, x: g),
        "for numbers beyond 100: operand 'x': gradient",
    ),
    "overflow in float32": (
        lambda: op_of(lambda x: np.log(1 + np.exp(x)), lambda g, y, x: g * functional.sigmoid(x)),
        "the result of 'planted' for numbers beyond 100 is wrong: it is not finite: it overflows",
    ),
}


def words_of(op):
    with pytest.raises(AssertionError) as caught:
        check_op(op)
    return " ".join("\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])]).split())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("fault", RULES)
def test_a_fault_of_an_op_is_named(fault):
    op, words = RULES[fault]
    assert re.search(words, said := words_of(op()))
    assert re.search(r"in \w+ of 'planted', example \d+: shapes .* smallest failing example: [xa] = ", said)


@pytest.mark.parametrize(
    ("op", "example"),
    [
        (lambda: op_of(lambda x: x * x, lambda g, y, x: g * 3 * x), r"x = (-?\d\.0|\[+-?\d\.0\]+)$"),
        (
            lambda: op_of(
                lambda a, b: a * np.where(b > 1, 2.0, 1.0),
                lambda g, y, a, b: g * 2.0,
                None,
                sample=lambda d: ((d.array(REAL, (4, 3)), d.array(Domain(1, 2), (1, 3)).round() + 0.25), {}),
            ),
            r"a = \[\[-?\d\.0\]\], b = \[\[\d\.\d+\]\]$",
        ),
    ],
    ids=["one number", "of two operands"],
)
def test_the_smallest_failing_example_is_one_that_can_be_tried_by_hand(op, example):
    assert re.search(f"smallest failing example: {example}", words_of(op()))


# ---- kernels of y = a · b, whose rules are right ---------------------------------------------------------


def gradients(g, a, b):
    return [x * y if isinstance(z, float) else extend.unbroadcast(x * y, z) for x, y, z in ((g, b, a), (g, a, b))]


def by_half(a, b):
    return (a * b) * np.asarray(1.25 if a.dtype == np.float16 else 1, a.dtype)


@njit()
def loop(x, out, start, stop):
    """The first part only, as a loop that takes `stop` for the number of its items."""
    for i in range(stop - start if start == 0 else 0):
        out[i] = x[i]


def part_of_it(a, b):
    if a.dtype == np.float16:
        return NotImplemented
    y = np.zeros(np.broadcast_shapes(a.shape, b.shape), a.dtype)

    split(loop, y.size, y.size, np.asarray(a * b).reshape(-1), y.reshape(-1))
    return y


def first_5000(a, b):
    y = np.array(a * b)
    y.reshape(-1)[5000:] = 0
    return y


def in_order_of_memory(a, b):
    return (a.ravel(order="K") * b.ravel(order="K")).reshape(a.shape)


def uninitialised(a, b):
    y = np.full_like(a, 7)  # in the order of a, as np.empty_like
    y.reshape(-1)[:] = (a * b).reshape(-1)
    return y


def from_the_first_element(a, b):
    """Takes the memory of `a` from its first element on."""
    flat = np.lib.stride_tricks.as_strided(a, (a.size,), (abs(a.strides[-1]),)) if min(a.strides, default=0) < 0 else a
    return flat.reshape(a.shape) * b


BUFFERS: dict = {}


def buffer_of(x, what):
    return BUFFERS.setdefault((what, x.shape, x.dtype), np.empty(x.shape, x.dtype))


def into_a_buffer(a, b):
    return np.multiply(a, b, out=buffer_of(np.asarray(a * b), "y"))


def gradients_into_buffers(g, y, a, b, *, needs):
    found = [np.asarray(x) for x in gradients(g, a, b)]
    return [np.copyto(buffer_of(x, i), x) or buffer_of(x, i)[...] for i, x in enumerate(found)]


def of_one_shape(a, b):
    y = np.empty_like(a)
    for i in np.ndindex(a.shape):
        y[i] = a[i] * b.item(*i)
    return y


def overwriting(which):
    def vjp(g, y, a, b, *, needs):
        found = gradients(g, a, b)
        array = {"g": g, "y": y, "a": a}[which]
        array.flags.writeable = True
        array *= 2
        return found

    return vjp


KERNELS = {
    "wrong in float16": (
        by_half,
        None,
        "the result, by the kernel 'planted', of 'planted' in float16 is wrong: .*1.25",
    ),
    "gradient wrong in float16": (
        None,
        lambda g, y, a, b, *, needs: [x * (2 if a.dtype == np.float16 else 1) for x in gradients(g, a, b)],
        "gradient of operand 'a', by the kernel 'planted.vjp', of 'planted' in float16 is wrong: the gradient is twice",
    ),
    "shape without elements": (
        lambda a, b: a * b if a.size and b.size else np.zeros((1,)),
        None,
        r"the result, by the kernel 'planted', of 'planted' for operands without elements has the shape \(1,\)",
    ),
    "beyond 5,000 elements": (
        first_5000,
        None,
        "kernel 'planted', of 'planted' for operands of 10,000 elements is wrong: .* are wrong, first at .*, 0 for",
    ),
    "on threads": (
        part_of_it,
        None,
        "kernel 'planted', of 'planted' for operands of 10,000 elements is wrong: .* are wrong, first at .*, 0 for",
    ),
    "beyond 100": (
        lambda a, b: np.clip(a, -100, 100) * b,
        None,
        "the kernel 'planted', of 'planted' for numbers beyond 100 is wrong: .* elements are wrong, first at",
    ),
    "computed in float32": (
        None,
        lambda g, y, a, b, *, needs: [x.astype(np.float32).astype(x.dtype) for x in gradients(g, a, b)],
        "operand 'a', by the kernel 'planted.vjp', of 'planted' in float64 is wrong: the error is that of float32",
    ),
    "sign": (
        None,
        lambda g, y, a, b, *, needs: [-gradients(g, a, b)[0], gradients(g, a, b)[1]],
        "operand 'a', by the kernel 'planted.vjp', of 'planted' in float64 is wrong: the sign is flipped",
    ),
    "writes into y": (
        None,
        overwriting("y"),
        "the backward pass of 'planted', by the kernel 'planted.vjp', changed the result: it writes into",
    ),
    "writes into an operand": (
        None,
        overwriting("a"),
        "backward pass of 'planted', by the kernel 'planted.vjp', changed operand 'a'",
    ),
    "layout": (
        in_order_of_memory,
        None,
        "the result, by the kernel 'planted', of 'planted' where 'a' and 'b' lie .* is wrong: ",
    ),
    "layout of the result": (
        uninitialised,
        None,
        "by the kernel 'planted', of 'planted' where 'a' and 'b' lie by columns, as a transposed array, is wrong: ",
    ),
    "negative strides": (
        from_the_first_element,
        None,
        r"by the kernel 'planted', of 'planted' where 'a' and 'b' lie in reverse, as x\[::-1\], is wrong: ",
    ),
    "strides of 0": (
        lambda a, b: a * b if all(a.strides) else np.zeros_like(a * b),
        None,
        "of 'planted' where 'a' and 'b' lie repeated along axis 0, as by broadcast_to, is wrong: ",
    ),
    "unlike layouts": (
        lambda a, b: (a.ravel("K") * b.ravel("K")).reshape(a.shape, order="F" if a.flags.fnc else "C"),
        None,
        "by the kernel 'planted', of 'planted' where 'a' lies by columns, as a transposed array, is wrong: ",
    ),
    "layout in float32": (
        lambda a, b: in_order_of_memory(a, b) if a.dtype == np.float32 else a * b,
        None,
        "the result, by the kernel 'planted', of 'planted' where 'a' and 'b' lie .* is wrong: ",
    ),
    "gradient of a sum": (
        None,
        lambda g, y, a, b, *, needs: gradients(g if all(g.strides) else np.zeros_like(g), a, b),
        "gradient of operand 'a', by the kernel 'planted.vjp', of 'planted' for a gradient of the result that lies rep",
    ),
    "gradient of a transposed result": (
        None,
        lambda g, y, a, b, *, needs: gradients(g.reshape(-1, order="F" if g.flags.fnc else "C").reshape(g.shape), a, b),
        "for a gradient of the result that lies by columns, as a transposed array, is wrong: .* are wrong, first",
    ),
    "one buffer for all results": (
        into_a_buffer,
        None,
        "the result, by the kernel 'planted', of 'planted' lies in the same memory in two calls: the second call over",
    ),
    "one buffer for all gradients": (
        None,
        gradients_into_buffers,
        "gradient of operand 'a', by the kernel 'planted.vjp', of 'planted' lies in the same memory in two calls",
    ),
    "no broadcasting": (
        of_one_shape,
        None,
        "by the kernel 'planted', of 'planted' for operand 'a' without axis 0, of shape .*, which is broadcast, has",
    ),
    "wrong when broadcast": (
        lambda a, b: a * b if a.shape == b.shape else a + b,
        None,
        "by the kernel 'planted', of 'planted' for operand '[ab]' .*, of shape .*, which is broadcast, is wrong",
    ),
    "no numbers": (
        lambda a, b: a * b if a.dtype == b.dtype else NotImplemented,
        None,
        "the kernel 'planted' raises AttributeError: 'float' object has no attribute 'dtype'.* for the number .* 'b'",
    ),
    "NaN hidden": (
        lambda a, b: np.nan_to_num(a, posinf=np.inf, neginf=-np.inf) * b,
        None,
        r"by the kernel 'planted', of 'planted' where operand 'a' has nan is wrong: -?0 at .*definition is nan",
    ),
    "infinity cut": (
        lambda a, b: a * np.clip(b, -1e6, 1e6),
        None,
        "the result, by the kernel 'planted', of 'planted' where operand 'b' has inf is wrong: .* definition is ",
    ),
    "NaN hidden from a gradient": (
        None,
        lambda g, y, a, b, *, needs: [np.nan_to_num(x) for x in gradients(g, a, b)],
        "gradient of operand 'b', by the kernel 'planted.vjp', of 'planted' where operand 'a' has nan is wrong: 0",
    ),
    "raises": (
        lambda a, b: a * b / (0 if a.size == 1 else 1) if a.size > 1 else int("no"),
        None,
        "the kernel 'planted' raises ValueError: invalid literal .* it may return NotImplemented",
    ),
    "writes into an operand, forward": (
        lambda a, b: np.multiply(a, b, out=a),
        None,
        "the forward pass of 'planted', by the kernel 'planted', changed operand 'a': it writes into its memory",
    ),
    "integers": (
        lambda a, b: np.asarray(a * b * 1.5 if a.dtype.kind == "i" else a * b),
        None,
        "the result, by the kernel 'planted', of 'planted' for integers is float32, that of the definition int64",
    ),
    "never runs": (
        None,
        lambda g, y, a, b, *, needs: NotImplemented,
        "the kernel 'planted.vjp' declined all of 25 samples, so it never ran",
    ),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "fault", [pytest.param(name, marks=pytest.mark.compiled) if name == "on threads" else name for name in KERNELS]
)
def test_a_fault_of_a_kernel_is_named(fault):
    forward, vjp, words = KERNELS[fault]

    def two(d):  # of one shape, with any number of rows
        shape = d.integer(1, 4), d.integer(1, 3)
        return (d.array(REAL, shape), d.array(REAL, shape)), {}

    op = op_of(lambda a, b: a * b, lambda g, y, a, b: g * b, lambda g, y, a, b: g * a, sample=two)
    for name, function in (("planted", forward), ("planted.vjp", vjp)):
        if function:
            function.__module__ = __name__
            kernel(name, "cpu")(function)
    assert re.search(words, words_of(op))
