"""Samples that are none, and samples that would let a wrong op pass: `check_op` says what to draw."""

import numpy as np
import pytest
from tinygrad_bn_kernels import kernel

from tests.tools.registries import registries  # noqa: F401 - for all tests of this file
from tinygrad_bn.extend import NONZERO, REAL, broadcast_to, check_op, elementwise, fused, primitive
from tinygrad_bn.testing import GradcheckError, VacuousCheckError


def op_of(forward, *rules, sample):
    forward.__name__ = forward.__qualname__ = "planted"  # one name for all
    return (primitive(*rules, formula="y", sample=sample) if rules else fused(formula="y", sample=sample))(forward)


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        (
            lambda d: d.array(REAL, (3,)),
            "sample of 'planted' fails with ValueError: .*it has to give operands and opt",
        ),
        (
            lambda d: (d.array(REAL, (3,)), {}),
            r"gives \S*array.* for the operands, which are a tuple: \(x,\) for one",
        ),
        (lambda d: ([[1.0, 2.0]], {}), r"gives \[1.0, 2.0\] for operand 'x': give an array, or None"),
        (lambda d: ((np.ones(3, np.float32),), {}), "gives float32 for operand 'x': give float64; the checks convert"),
        (lambda d: ((np.ones(3), np.ones(3)), {}), "gives 2 operands; 'planted' has 1"),
        (lambda d: ((np.ones(3),), {"k": 2}), r"gives the options \['k'\]; 'planted' has \[\]"),
        (lambda d: ((d.arrays(REAL, (3,)),), {}), "fails with AttributeError: .*it has to give operands and options"),
    ],
)
def test_a_sample_that_is_none_is_an_error_in_words(sample, words):
    op = op_of(lambda x: x * 2, lambda g, y, x: g * 2, sample=sample)
    with pytest.raises(GradcheckError, match=words):
        check_op(op)


def test_a_sample_that_is_no_function_and_a_formula_that_is_no_text_are_refused():
    with pytest.raises(TypeError, match=r"sample is a function of a Draw, as elementwise\(REAL\) gives one; got 5"):
        op_of(lambda x: x * 2, sample=5)
    op = fused(formula=3, sample=elementwise(REAL))(doubled)
    with pytest.raises(TypeError, match="the formula of 'doubled' is a text, as 'y = a · b'; got 3"):
        check_op(op)


# ---- options that no sample changes ----------------------------------------------------------------------


def power(x, *, n=3):
    return x**n


def doubled(x, *, twice=False):
    return x * (1.0 + twice)


def total(x, *, axis=None):
    return np.sum(x, axis)


IGNORED = {
    "an integer": (
        lambda: op_of(power, lambda g, y, x, n: g * 3 * x**2, sample=elementwise(NONZERO)),
        r"option n of 'planted' is 3 in all of 25 samples, and 4 gives another result: .* d.choice\(\[3, 4\]\)",
    ),
    "a bool": (
        lambda: op_of(doubled, lambda g, y, x, twice: g, sample=elementwise(REAL)),
        "option twice of 'planted' is False in all of 25 samples, and True gives another result",
    ),
    "an axis": (
        lambda: op_of(total, lambda g, y, x, axis: broadcast_to(g, shape=x.shape), sample=elementwise(REAL)),
        "option axis of 'planted' is None in all of 25 samples, and 0 gives another result",
    ),
    "a number that the sample gives": (
        lambda: op_of(power, lambda g, y, x, n: g * 3 * x**2, sample=elementwise(NONZERO, n=3)),
        "option n of 'planted' is 3 in all of 25 samples",
    ),
}


@pytest.mark.parametrize("option", IGNORED)
def test_a_rule_that_ignores_an_option_is_found_by_the_samples_that_never_change_it(option):
    op, words = IGNORED[option]
    with pytest.raises(VacuousCheckError, match=words):
        check_op(op())


def test_a_kernel_that_ignores_an_option_is_found_too():
    op = op_of(power, sample=elementwise(NONZERO))
    assert check_op(op, examples=3).fixed == {"n": 3}  # a composition cannot ignore it
    kernel("planted", "cpu")(lambda x, *, n: x * x * x)
    with pytest.raises(VacuousCheckError, match="option n of 'planted' is 3 in all"):
        check_op(op)


def test_an_option_of_one_value_passes_where_no_other_is_taken_or_changes_the_result():
    def scaled(x, *, n=3, most=1000, how="twice"):
        if n != 3:
            raise ValueError("n has to be 3")
        return np.minimum(x * 2, most)

    op = op_of(scaled, lambda g, y, x, **_: g * 2, sample=elementwise(REAL))
    assert check_op(op, examples=3).fixed == {"n": 3, "most": 1000, "how": "twice"}


def on_a_middle_axis(a, b):
    return a * b * (0 if b.ndim == 3 and b.shape[1] == 1 != a.shape[1] else 1)


def from_both_sides(a, b):
    return a * b * (0 if a.ndim == b.ndim and a.shape != b.shape and 1 in a.shape and 1 in b.shape else 1)


@pytest.mark.parametrize("wrong", [on_a_middle_axis, from_both_sides])
def test_a_kernel_that_is_wrong_for_some_way_of_broadcasting_is_found(wrong):
    op = op_of(lambda a, b: a * b, sample=elementwise(REAL, REAL))
    kernel("planted", "cpu")(lambda a, b: wrong(a, b))
    with pytest.raises(GradcheckError, match=r"which (is|are) broadcast"):
        check_op(op)
