"""The checks themselves: what gradcheck and check_op find, in which words, and what they refuse to check."""

import re

import numpy as np
import pytest
from tinygrad_bn_kernels import kernel

from tests.tools.registries import registries  # noqa: F401 - for all tests of this file
from tinygrad_bn import Tensor, functional, fused, held_constant, nn, primitive, testing
from tinygrad_bn.sample import NONZERO, REAL, Domain, broadcasting, elementwise
from tinygrad_bn.testing import GradcheckError, VacuousCheckError, gradcheck, gradgradcheck, gradients


@pytest.mark.parametrize(
    ("f", "derivative"), [(np.sin, 1.0), (lambda t: np.exp(3 * t), 3.0), (lambda t: 1e6 * t + t**3, 1e6)]
)
def test_the_error_estimate_bounds_the_error(f, derivative):
    value, error = gradients.ridders(f)
    assert abs(value - derivative) <= 10 * error + 1e-12 * abs(derivative)
    assert error < 1e-7 * max(1, abs(derivative))


def test_a_report_for_each_operand():
    a, b = gradcheck(lambda x, y: x * functional.exp(y), np.ones(3), np.zeros((2, 3)))
    assert (a.operand, b.operand) == (0, 1)
    assert a.ok
    assert abs(a.analytic - a.numeric) <= a.tolerance
    assert "operand 'x': gradient" in str(a)
    (only,) = gradcheck(lambda *xs: xs[0] * 2, np.ones(3))
    assert "operand 'xs[0]': gradient" in str(only)


def wrong_by(factor):
    """x² whose gradient is off by a factor, through a constant that should not be one."""
    return lambda x: x * x.detach() * factor + x * x * (1 - factor)


@pytest.mark.parametrize("factor", [1.0, 0.01, 1e-4])
def test_a_gradient_that_is_slightly_wrong_is_noticed(factor):
    with pytest.raises(GradcheckError, match="WRONG"):
        gradcheck(wrong_by(factor), np.array([0.5, 1.0, -2.0]))


def test_vacuous_checks_are_refused():
    x = np.random.default_rng(0).normal(size=(4, 3))
    with pytest.raises(VacuousCheckError, match="gradient of zero"):
        gradcheck(functional.relu, -np.ones(3))
    with pytest.raises(VacuousCheckError):
        gradcheck(nn.LayerNorm(3).astype(np.float64), x, g=np.ones((4, 3)))
    with pytest.raises(VacuousCheckError):  # of one value: the output is the bias, whatever x is
        gradcheck(lambda x: functional.layer_norm(x, 1), x[:, :1])
    gradcheck(functional.relu, -np.ones(3), allow_zero=True)


def test_a_kink_and_a_jump_are_named_as_such():
    for f in (functional.relu, functional.abs):
        with pytest.raises(GradcheckError):
            gradcheck(f, np.zeros(3))
    with pytest.raises(GradcheckError, match="not smooth"):
        gradcheck(lambda x: functional.where(x > 0, x + 1, x), np.zeros(2))


def test_what_cannot_be_checked():
    with pytest.raises(TypeError, match=r"float64; xs\[1\] is float32"):
        gradcheck(lambda x, y: x * y, np.ones(2), np.ones(2, np.float32))
    with pytest.raises(GradcheckError, match="has no graph"):
        gradcheck(lambda x: Tensor(x.numpy() * 2), np.ones(2))
    with pytest.raises(GradcheckError, match="no graph"):
        gradgradcheck(lambda x: Tensor(2.0, dtype=np.float64) * x.detach(), np.ones(2))
    with pytest.raises(KeyError, match="no op 'nonsense'; there are abs, ad"):
        testing.check_op("nonsense")


def test_modules_can_be_checked():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).astype(np.float64)
    gradcheck(model, np.random.default_rng(0).normal(size=(5, 3)))
    gradgradcheck(model, np.random.default_rng(0).normal(size=(5, 3)))


# ---- faults planted in an op, and the words that name each -----------------------------------------------


ANY = elementwise(REAL)


def planted(forward, *rules, sample=ANY, name="planted", **how):
    """An op of `forward`: a primitive if it has rules, else a composition."""
    forward.__name__ = name
    if rules or "each" in how:
        return primitive(*rules, formula="y", sample=sample, **how)(forward)
    return fused(formula="y", sample=sample, **how)(forward)


def fixed(*shapes, domain=REAL):
    """A sample of operands of these shapes; None for an operand that is left out."""
    return lambda d: (tuple(None if s is None else d.array(domain, s) for s in shapes), {})


PAIR = broadcasting(REAL, REAL)
MATRICES = fixed((3, 2), (4, 2))

# name: forward or composition, its rules and sample, and the essential words of the error.
FAULTS = {
    "option that the rule does not take": (
        (lambda x, *, k=2.0: x * k, lambda g, y, x: g * 2),
        {},
        "rule of operand 'x' of 'planted' does not take the option k",
    ),
    "operand that the rule does not take": (
        (lambda a, b: a * b, lambda g, y, a: g * a, lambda g, y, a, b: g * a),
        {"sample": PAIR},
        r"rule of operand 'a' of 'planted' has to take \(g, y, a, b\)",
    ),
    "option that the rule ignores and the sample never changes": (
        (lambda x, *, k=2.0: x * k, lambda g, y, x, **_: g * 2),
        {},
        r"option k of 'planted' is 2.0 in all .* d.choice\(\[2.0, ",
    ),
    "rule None of an operand that counts": (
        (lambda a, b: a * b, lambda g, y, a, b: g * b, None),
        {"sample": PAIR},
        "operand 'b' has the rule None, but the result varies with it .* held_constant",
    ),
    "sample of zeros": (
        (lambda x: x * x, lambda g, y, x: g * 3 * x),
        {"sample": elementwise(Domain(0, 0))},
        "operand 'x' of 'planted' is zero in all of 25 samples",
    ),
    "sample of nothing": (
        (lambda x: x * x, lambda g, y, x: g * 77),
        {"sample": fixed((0, 3))},
        "operand 'x' of 'planted' is empty in all of 25 samples",
    ),
    "operand that is never given": (
        (lambda x, b: x, lambda g, y, x, b: g, lambda g, y, x, b: g * 77),
        {"sample": fixed((3,), None)},
        "operand 'b' of 'planted' is None in all of 25 samples",
    ),
    "sample without a gradient": (
        (lambda x: np.maximum(x, 0), lambda g, y, x: g * 0),
        {"sample": elementwise(Domain(-3, -1))},
        "gradient of operand 'x' of 'planted' is 0 in all of 25 samples",
    ),
    "batches of one": (
        (lambda x: x - functional.mean(x, axis=0),),
        {"sample": fixed((1, 3))},
        "gradient of operand 'x' of 'planted' is 0 in all of 25 samples",
    ),
    "float32 result": (
        (lambda x: (x * x).astype(np.float32), lambda g, y, x: g * 2 * x),
        {},
        "float64 operands gave float32: the forward narrows",
    ),
    "float32 on the way": (
        (lambda x: np.exp(x.astype(np.float32)).astype(x.dtype), lambda g, y, x: g * y),
        {},
        "operand 'x': the result moves in steps: the function computes in less than float64",
    ),
    "0 / 0 in the rule of a product": (
        (lambda x: np.prod(x, keepdims=True), lambda g, y, x: g * y / x),
        {"sample": fixed((3,))},
        "operand 'x': gradient [+]nan.*not finite: .* g · y / x does at x = 0",
    ),
    "wrong second derivative": (
        (lambda x: x * x, lambda g, y, x: g * 2 * (x.detach() if isinstance(x, Tensor) else x)),
        {},
        "rule of operand .x. of .planted. detaches a tensor: higher derivatives lose the path",
    ),
    "transposed gradient": (
        (
            lambda x, w: x @ w.T,
            lambda g, y, x, w: functional.matmul(g, w),
            lambda g, y, x, w: functional.matmul(functional.transpose(x), g),
        ),
        {"sample": MATRICES},
        r"rule of operand 'w' of 'planted' gives a gradient of shape \(2, 4\) for an operand of shape \(4, 2\)"
        r".*example 0: shapes \[\(3, 2\), \(4, 2\)\]",
    ),
    "gradient that fits no operand": (
        (lambda x: np.sum(x, axis=0), lambda g, y, x: g),
        {"sample": fixed((2, 3))},
        r"rule of operand 'x' of 'planted' gives a gradient of shape \(3,\) for an operand of shape \(2, 3\)",
    ),
    "gradient that fits no part": (
        (lambda *xs: np.concatenate(xs),),
        {"each": lambda i, g, y, *xs: g, "sample": fixed((2,), (2,))},
        r"rule of 'planted', for operand 'xs\[0\]', gives a gradient of shape \(4,\)",
    ),
    "NumPy's function in a rule": (
        (lambda x: np.sin(x), lambda g, y, x: g * np.cos(x)),
        {},
        "rule of operand 'x' of 'planted' calls NumPy on tensors.*tinygrad_bn.functional",
    ),
    "NumPy's array in a rule": (
        (lambda x: np.sin(x), lambda g, y, x: g * np.cos(np.asarray(x))),
        {},
        "rule of operand 'x' of 'planted' calls NumPy on tensors",
    ),
    "NumPy's choice in a rule": (
        (lambda x: np.maximum(x, 0), lambda g, y, x: np.where(y > 0, g, 0)),
        {"sample": elementwise(NONZERO)},
        "rule of operand 'x' of 'planted' calls NumPy on tensors",
    ),
    "NumPy's function in a composition": (
        (lambda x: x * np.asarray(x),),
        {},
        "composition of 'planted' calls NumPy on tensors",
    ),
    "wrong sign": (
        (lambda a, b: a - b, lambda g, y, a, b: g, lambda g, y, a, b: g),
        {"sample": PAIR},
        "operand 'b': gradient .*the sign is flipped",
    ),
    "sum for a mean": (
        (lambda x: np.mean(x, axis=1), lambda g, y, x: functional.reshape(g, shape=(2, 1)) * np.ones((2, 5))),
        {"sample": fixed((2, 5))},
        "the gradient is 5 times too large, and 5 is the length of axis 1 of the operand",
    ),
    "mean for a sum": (
        (lambda x: np.sum(x, keepdims=True), lambda g, y, x: g / x.size * np.ones((2, 5))),
        {"sample": fixed((2, 5))},
        "the gradient is 10 times too small, and 10 is the size of the operand",
    ),
    "path counted twice": (
        (lambda x: x * x, lambda g, y, x: g * 4 * x),
        {"sample": fixed((3,))},
        "twice the right one",
    ),
    "path counted twice, or a sum for a mean": (
        (lambda x: x * x, lambda g, y, x: g * 4 * x),
        {"sample": fixed((2,))},
        "the gradient is 2 times too large, .* or a path that is counted twice",
    ),
    "path dropped": (
        (lambda x: x * x, lambda g, y, x: g * 0),
        {},
        "operand 'x': gradient [+-]0, .*its path is dropped",
    ),
    "path cut in a composition": (
        (lambda x, w: x * Tensor(w, dtype=np.float64) if isinstance(w, Tensor) else x * w,),
        {"sample": fixed((3,), (3,))},
        "operand 'w': gradient [+-]0, .*its path is dropped",
    ),
}


def error_of(check):
    """The words of the error that a check raises, with its notes, on one line."""
    with pytest.raises((AssertionError, TypeError, ValueError)) as caught:
        check()
    return " ".join("\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])]).split())


@pytest.mark.parametrize("fault", FAULTS)
def test_check_op_names_a_fault(fault):
    functions, how, words = FAULTS[fault]
    assert re.search(words, error_of(lambda: testing.check_op(planted(*functions, **how))))


RIGHT = {
    "constant by choice": (
        (lambda x, target: (x - target) ** 2, lambda g, y, x, target: g * 2 * (x - target), held_constant),
        {"sample": PAIR},
    ),
    "step": ((lambda x, s: x * np.sign(s), lambda g, y, x, s: g * functional.sign(s), None), {"sample": PAIR}),
    "product": (
        (lambda x: x[:1] * x[1:], lambda g, y, x: functional.concatenate([g * x[1:], g * x[:1]])),
        {"sample": fixed((2,))},
    ),
    "option": (
        (lambda x, *, k=2.0: x * k, lambda g, y, x, k: g * k),
        {"sample": lambda d: ((d.array(REAL, d.shape()),), {"k": d.choice([2.0, -0.5])})},
    ),
    "tiny": ((lambda x: 1e-13 * x * x, lambda g, y, x: g * 2e-13 * x), {}),
    "an option with one sensible value": (
        (lambda x, *, n=3: x * [2.0][n - 3], lambda g, y, x, n: g * 2),
        {},
    ),
    "ends in float32 when asked": (
        (lambda x, *, dtype: x.astype(dtype), lambda g, y, x, dtype: g),
        {"sample": lambda d: ((d.array(REAL, d.shape()),), {"dtype": d.choice([np.float64])})},
    ),
}


@pytest.mark.parametrize("op", RIGHT)
def test_check_op_accepts_what_is_right(op):
    functions, how = RIGHT[op]
    report = testing.check_op(planted(*functions, **how))
    assert (report.op, report.samples, report.kernels) == ("planted", 25, {})


def test_the_options_of_check_op_are_checked():
    for examples in (0, -3):
        with pytest.raises(ValueError, match=f"examples has to be at least 1; got {examples}"):
            testing.check_op("exp", examples=examples)
    with pytest.raises(TypeError, match=r"examples has to be an integer; got 2.5"):
        testing.check_op("exp", examples=2.5)
    with pytest.raises(ValueError, match="seed has to be at least 0; got -1"):
        testing.check_op("exp", seed=-1)
    with pytest.raises(KeyError, match="no op 'rleu'; did you mean 'relu'"):
        testing.check_op("rleu")


def test_a_gradient_of_zero_everywhere_is_accepted_when_said():
    testing.check_op("sign", allow_zero=True)
    with pytest.raises(VacuousCheckError):
        testing.check_op("sign")


def test_a_gradient_of_the_wrong_shape_is_an_error_in_use():
    op = planted(lambda x: x.T * 1.0, lambda g, y, x: g, sample=fixed((2, 3)))
    x = Tensor(np.ones((2, 3)), requires_grad=True)
    assert re.search(
        r"gradient of an operand of shape \(2, 3\) came out as \(3, 2\) in the backward pass of planted",
        error_of(lambda: op(x).backward(np.ones((3, 2)))),
    )


def test_an_operand_held_constant_gets_no_gradient():
    squared = planted(lambda x, t: (x - t) ** 2, lambda g, y, x, t: g * 2 * (x - t), held_constant, sample=PAIR)
    x, t = (Tensor([v], requires_grad=True) for v in (3.0, 1.0))
    squared(x, t).backward()
    assert (x.grad.item(), t.grad) == (4, None)


# ---- kernels ---------------------------------------------------------------------------------------------


def product(a, b, c):
    return a * b * c


# The kernel's name and the kernel of y = a · b · c, and the words of the error.
KERNELS = {
    "two gradients of three": (
        "planted.vjp",
        lambda g, y, a, b, c, *, needs: (g * b * c, g * a * c),
        "kernel 'planted.vjp' returned 2 gradients; its op has 3 operands",
    ),
    "an array for a list": (
        "planted.vjp",
        lambda g, y, a, b, c, *, needs: g * b * c,
        "kernel 'planted.vjp' returned a ndarray",
    ),
    "wrong gradient": (
        "planted.vjp",
        lambda g, y, a, b, c, *, needs: (g * b * c, g * a * c, g * a * b * 1.01),
        "the gradient of operand 'c', by the kernel 'planted.vjp', of 'planted' in float64 is wrong: .*1.01 times",
    ),
    "wrong in float32": (
        "planted.vjp",
        lambda g, y, a, b, c, *, needs: (g * b * c, g * a * c, g * a * b * (1.01 if a.dtype == np.float32 else 1)),
        "the gradient of operand 'c', by the kernel 'planted.vjp', of 'planted' in float32 is wrong: .*1.01 times",
    ),
    "wrong result in float32": (
        "planted",
        lambda a, b, c: a * b * c * (1 + 5e-4 * (a.dtype == np.float32)),
        "the result, by the kernel 'planted', of 'planted' in float32 is wrong",
    ),
    "misspelt op": ("plantde.vjp", lambda *_: None, "cpu kernel 'plantde.vjp' belongs to no op .* 'planted.vjp'"),
    "misspelt vjp": ("planted.vpj", lambda *_: None, "'planted.vpj' belongs to no op and never runs"),
    "underscore": ("planted_vjp", lambda *_: None, "'planted_vjp' belongs to no op"),
    "another suffix": ("planted.backward", lambda *_: None, "'planted.backward' .* is it 'planted.vjp'"),
    "another suffix, underscore": ("planted_backward", lambda *_: None, "'planted_backward' .* is it 'planted.vjp'"),
    "capitals": ("PLANTED.vjp", lambda *_: None, "'PLANTED.vjp' belongs to no op .* is it 'planted.vjp'"),
    "a capital": ("Planted", lambda *_: None, "'Planted' belongs to no op .* is it 'planted'"),
    "forward": ("planted_forward", lambda *_: None, "'planted_forward' belongs to no op .* is it 'planted'"),
}


@pytest.mark.parametrize("fault", KERNELS)
def test_check_op_names_a_fault_of_a_kernel(fault):
    name, function, words = KERNELS[fault]
    kernel(name, "cpu")(function)
    op = planted(product, sample=fixed((2, 3), (2, 3), (3,)))
    assert re.search(words, error_of(lambda: testing.check_op(op)))


def test_the_report_names_the_kernels_that_were_tested():
    op = planted(product, sample=fixed((3,), (3,), (3,)))
    kernel("planted", "cpu")(product)
    kernel("planted.vjp", "cpu")(lambda g, y, a, b, c, *, needs: [g * b * c, g * a * c, g * a * b])
    kernel("planted.vjp", "cuda")(product)
    kernel("plank", "cpu")(product)  # of no op, and no near name
    report = testing.check_op(op, examples=5)
    assert report.kernels == {"planted": 5, "planted.vjp": 5}
    assert report.orders == (1, 2, 3)
    assert "half_precision" in report.checks
    assert "many_elements" not in report.checks  # all samples have three elements
    assert {name: error < 1e-6 for name, error in report.errors.items()} == {"planted": True, "planted.vjp": True}
    assert str(report) == (
        "planted: 5 samples; derivatives of order 1, 2, 3; kernels: planted (took 5 of 5), planted.vjp (took 5 of 5); "
        "not run: planted.vjp (cuda)"
    )
    assert "; only with ignore_index=-100" in str(testing.check_op("softmax_cross_entropy", examples=5))


def test_a_kernel_that_takes_float32_only_is_checked():
    def single(a, b, c):
        return a * b * c if a.dtype == np.float32 else NotImplemented

    kernel("planted", "cpu")(single)
    op = planted(product, sample=fixed((3,), (3,), (3,)))
    assert testing.check_op(op).kernels == {"planted": 25}
    kernel("planted", "cpu")(lambda a, b, c: a + b if a.dtype == np.float32 else NotImplemented)
    said = error_of(lambda: testing.check_op(op))
    assert "the result, by the kernel 'planted', of 'planted' in float32 is wrong" in said


def test_a_kernel_that_is_nan_where_the_definition_has_a_limit_is_found_and_one_that_has_the_limit_is_not():
    op = planted(lambda x: functional.exp(-functional.exp(-x)))  # 0 at −∞
    kernel("planted", "cpu")(lambda x: np.exp(-np.exp(-x)))
    testing.check_op(op, examples=3)
    kernel("planted", "cpu")(lambda x: np.exp(-np.exp(-x)) + 0 * x)
    words = "by the kernel 'planted', of 'planted' where operand 'x' has inf is wrong: nan at .*definition is 1"
    assert re.search(words, error_of(lambda: testing.check_op(op)))
    op = planted(lambda x: x * functional.sigmoid(x), name="planted2")  # −∞ · 0 at −∞
    kernel("planted2", "cpu")(lambda x: np.where(x < -100, 0.0, x / (1 + np.exp(-np.maximum(x, -100)))))
    testing.check_op(op, examples=3)


@pytest.mark.parametrize(
    ("name", "device", "words"),
    [
        ("planted", "gpu", "the kernel 'planted' is for a device 'gpu'; there are cpu and cuda"),
        ("planted", "CPU", "the kernel 'planted' is for a device 'CPU'; there are cpu and cuda"),
        ("cpu", "planted", r"there are cpu and cuda: the name comes first, as in kernel\('planted', 'cpu'\)"),
        (product, "cpu", "the name of a kernel is a text, as 'mul' or 'mul.vjp'; got <function product"),
    ],
)
def test_a_kernel_has_a_name_and_a_device(name, device, words):
    assert re.search(words, error_of(lambda: kernel(name, device)))


# ---- declaring an op twice -------------------------------------------------------------------------------

CELL = """
from tinygrad_bn import fused, primitive
from tinygrad_bn.sample import REAL, elementwise

@{how}(RULES formula="y", sample=elementwise(REAL))
def declared(x):
    return x * {factor}
"""


def run(how, factor, file, module="__main__"):
    """Run a notebook cell, and give the op that it declares."""
    cell = CELL.replace("RULES", "" if how == "fused" else f"lambda g, y, x: g * {factor},")
    space = {"__name__": module}
    exec(compile(cell.format(how=how, factor=factor), file, "exec"), space)
    return space["declared"]


@pytest.mark.parametrize("how", ["primitive", "fused"])
def test_a_cell_that_runs_again_replaces_its_op(how):
    first = run(how, 2.0, "<cell 1>")
    for file, factor in (("<cell 1>", 2.0), ("<cell 2>", 3.0), ("/tmp/cell/3.py", 4.0)):
        op = run(how, factor, file)
        assert op(Tensor([1.0])).numpy().tolist() == [factor]
        testing.check_op(op, examples=3)
    assert first(Tensor([1.0])).numpy().tolist() == [2]  # it stays what it was


def test_a_module_that_is_loaded_again_replaces_its_op_and_another_does_not():
    run("primitive", 2.0, "here.py", "here")
    run("primitive", 3.0, "here.py", "here")
    for file, module in (("there.py", "there"), ("<cell>", "__main__")):
        with pytest.raises(ValueError, match=r"'declared' already exists: here.py, line 5, declares it; choose"):
            run("fused", 2.0, file, module)
    with pytest.raises(ValueError, match=r"'mean' already exists: .*statistics.py, line \d+"):
        planted(lambda x: x, name="mean")


def test_one_function_that_declares_two_ops_of_one_name_is_an_error():
    def declare(k):
        def twice(x):
            return x * k

        return fused(formula="y", sample=elementwise(REAL))(twice)

    declare(2.0)
    with pytest.raises(ValueError, match="'twice' already exists"):
        declare(3.0)
