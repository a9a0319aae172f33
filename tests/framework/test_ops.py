"""Every op of the registry has every property, over samples that Hypothesis draws; and planted mistakes are caught."""

import __future__

import dataclasses
import inspect
import math
import textwrap
from contextlib import nullcontext

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tinygrad_bn_kernels import _kernels, lookup, names

from tests.tools.thresholds import thresholds
from tinygrad_bn import Tensor, autograd, functional, grad, more_ops, ops, primitive, sample, testing
from tinygrad_bn.backend import kernels_disabled
from tinygrad_bn.tensor import OPS, Op, apply
from tinygrad_bn.testing import check, properties


class HypothesisDraw:
    """A `sample.Draw` from Hypothesis."""

    def __init__(self, data):
        self.draw = data.draw

    def shape(self, min_dims=0, max_dims=3, min_side=0, max_side=4):
        return self.draw(hnp.array_shapes(min_dims=min_dims, max_dims=max_dims, min_side=min_side, max_side=max_side))

    def broadcastable(self, count):
        shapes = hnp.mutually_broadcastable_shapes(num_shapes=count, max_dims=3, max_side=3, min_side=0)
        return self.draw(shapes).input_shapes

    def array(self, domain, shape):
        x = self.draw(hnp.arrays(np.float64, shape, elements=st.floats(domain.low, domain.high)))
        return np.where(np.abs(x) < domain.gap, domain.gap, x)

    def distinct(self, shape):
        order = self.draw(st.permutations(range(math.prod(shape))))
        return np.array(order, np.float64).reshape(shape) * 0.2 - 1.0

    def integer(self, low, high):
        return self.draw(st.integers(low, high))

    def integers(self, low, high, shape):
        return self.draw(hnp.arrays(np.int64, shape, elements=st.integers(low, high)))

    def choice(self, options):
        return self.draw(st.sampled_from(list(options)))


# Other test modules test the ops that they declare.
BUILT_IN = [name for name, op in OPS.items() if op.forward.__module__.startswith("tinygrad_bn.")]


@pytest.mark.parametrize("check", properties.PROPERTIES, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", BUILT_IN)
@given(data=st.data(), seed=st.integers(0, 999))
def test_property(name, check, data, seed):
    xs, params = OPS[name].sample(HypothesisDraw(data))
    with thresholds() if check is properties.kernels_match_reference else nullcontext():
        check(OPS[name], xs, params, seed)


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_samples_of_an_op_can_show_a_mistake(name):
    samples = [OPS[name].sample(sample.RandomDraw(seed)) for seed in range(25)]
    check.expect_telling(OPS[name], samples, allow_zero=name == "sign")
    check.expect_rules_that_take_the_options(OPS[name])
    check.expect_no_kernel_with_nearly_the_name(OPS[name])


@pytest.mark.parametrize("name", BUILT_IN)
def test_check_op_draws_operands_that_depend_on_the_seed_alone(name):
    for seed in range(3):
        (xs, params), (again, same) = (OPS[name].sample(sample.RandomDraw(seed)) for _ in range(2))
        assert repr(params) == repr(same)
        for a, b in zip(xs, again, strict=True):
            np.testing.assert_array_equal(a, b)
        OPS[name].forward(*xs, **params)


def test_no_kernel_without_an_op_and_no_op_without_a_formula():
    for name, _device in names():
        assert name.removesuffix(".vjp") in OPS or name.startswith("array.")
    for op in OPS.values():
        assert op.formula.startswith("y")


# ---- the harness catches ---------------------------------------------------------------------------------


def with_rules(name, *rules):
    """The op `name` with other rules."""
    return dataclasses.replace(OPS[name], name="mutant", rules=rules)


MUTANT_RULES = {
    "sign flipped": lambda: with_rules("mul", lambda g, y, a, b: -g * b, lambda g, y, a, b: g * a),
    "rules swapped": lambda: with_rules("mul", lambda g, y, a, b: g * a, lambda g, y, a, b: g * b),
    "factor missing": lambda: with_rules("tanh", lambda g, y, x: 1 - y * y),
    "raw array in a rule": lambda: with_rules("exp", lambda g, y, x: g * np.asarray(y)),
    "rule cut from the graph": lambda: with_rules("exp", lambda g, y, x: Tensor(np.asarray(g * y))),
    "wrong only in order 2": lambda: with_rules(
        "log", lambda g, y, x: g / (x.detach() if isinstance(x, Tensor) else x)
    ),
    "wrong only in order 3": lambda: with_rules(
        "log", lambda g, y, x: g / x + g * (x - (x.detach() if isinstance(x, Tensor) else x)) ** 2
    ),
    "lengths assumed equal": lambda: dataclasses.replace(
        OPS["concatenate"],
        name="mutant",
        each=lambda i, g, y, *xs, axis: more_ops._part(g, axis, i * xs[0].shape[axis], (i + 1) * xs[0].shape[axis]),
    ),
    "float32 operand mutated": lambda: dataclasses.replace(
        OPS["exp"], name="mutant", forward=lambda x: np.exp(x.__imul__(1.5) if x.dtype == np.float32 else x)
    ),
    "operand mutated": lambda: dataclasses.replace(OPS["neg"], name="mutant", forward=lambda x: np.negative(x, out=x)),
    "float64 result": lambda: dataclasses.replace(OPS["exp"], name="mutant", forward=lambda x: np.exp(np.float64(x))),
    "layout assumed": lambda: dataclasses.replace(
        OPS["neg"],
        name="mutant",
        forward=lambda x: -np.lib.stride_tricks.as_strided(x, x.shape, np.empty(x.shape, x.dtype).strides),
    ),
}


@pytest.mark.parametrize("mutant", MUTANT_RULES)
def test_a_wrong_op_is_caught(mutant, monkeypatch):
    monkeypatch.setitem(OPS, "mutant", MUTANT_RULES[mutant]())
    with pytest.raises((AssertionError, TypeError, ValueError)):
        testing.check_op("mutant", examples=40)


ADDED = 'run(OPS["add"], (grads[x], gx), {})[0]'

# A line of the engine, the mistake in its place, and the op whose check has to notice.
MUTANT_LINES = {
    "no un-broadcast": ("_fit", "if gx.shape != x._data.shape:", "if False:", "mul"),
    "dtype not restored": (
        "_fit",
        "gx if gx.dtype == x._data.dtype else run",
        "gx.astype('f8') if True else run",
        "mul",
    ),
    "overwrite instead of accumulate": ("_backprop", f"{ADDED} if x in grads else gx", "gx", "mul"),
    "accumulate in place": (
        "_backprop",
        f"grads[x] = {ADDED} if x in grads else gx",
        "grads[x] = grads[x].__iadd__(gx) if x in grads else gx",
        "add",
    ),
    "kernel under create_graph": (
        "_pull",
        "if not create_graph:",
        "if not create_graph or op.fused:",
        "softmax_cross_entropy",
    ),
    "gradients share memory": ("_separate", "or id(gt._data) in taken", "", "add"),
    "one handle for two operands": (
        "_pull_composition",
        'apply(reshape, (x,), {"shape": x.shape})[0] if isinstance(x, Tensor) else x for x in node.inputs',
        "x for x in node.inputs",
        "fused_product",
    ),
}


def product_composed(a, b):
    return a * b + a * 0.5


def fused_like(name, composition, sample):
    """An op that fuses a composition and has no kernel."""
    return Op(name, composition, (), None, True, (), (), "y", sample)


FUSED = {
    "fused_square": fused_like("fused_square", lambda a: a * a, OPS["exp"].sample),
    "fused_product": fused_like("fused_product", product_composed, OPS["mul"].sample),
}


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_op_without_kernels_has_the_gradients_of_its_composition(name, monkeypatch):
    monkeypatch.setitem(OPS, name, FUSED[name])
    testing.check_op(name)


def test_a_fused_op_does_not_walk_the_graph_behind_its_operands(monkeypatch):
    monkeypatch.setitem(OPS, "fused_square", FUSED["fused_square"])
    walked = []
    walk = autograd._topological

    def counting(*args, **options):
        order = walk(*args, **options)
        walked.append(len(order))
        return order

    monkeypatch.setattr(autograd, "_topological", counting)
    x = y = Tensor(np.array(1.0), requires_grad=True)
    for _ in range(100):
        y, _ = apply(OPS["fused_square"], (y,), {})
    grad(y, x)
    assert 100 < sum(walked) < 10 * 100


@pytest.mark.parametrize("mutant", MUTANT_LINES)
def test_a_wrong_engine_is_caught(mutant, monkeypatch):
    function, line, mistake, op = MUTANT_LINES[mutant]
    monkeypatch.setitem(OPS, op, {**FUSED, **OPS}[op])
    source = textwrap.dedent(inspect.getsource(getattr(autograd, function)))
    assert line in source, "the line that this mutant changes is gone"

    def install(text):
        annotations = __future__.annotations.compiler_flag
        exec(compile(text, "<mutant>", "exec", dont_inherit=True, flags=annotations), namespace := dict(vars(autograd)))
        monkeypatch.setattr(autograd, function, namespace[function])

    install(source)
    testing.check_op(op, examples=3)  # planting a line changes nothing by itself
    install(source.replace(line, mistake))
    with pytest.raises((AssertionError, AttributeError, TypeError, ValueError)):
        testing.check_op(op, examples=40)


def test_the_kernel_check_notices_a_term_lost_in_a_kernel(monkeypatch):
    right = lookup("softmax_cross_entropy.vjp", "cpu")

    def wrong(*operands, smoothing, **rest):
        return right(*operands, smoothing=0.0, **rest)

    monkeypatch.setitem(_kernels, ("softmax_cross_entropy.vjp", "cpu"), wrong)
    with pytest.raises(AssertionError, match=r"\S") as caught:
        testing.check_op("softmax_cross_entropy", examples=20)
    assert "in kernels_match_reference of 'softmax_cross_entropy', example" in caught.value.__notes__[0]


@pytest.mark.parametrize("mistake", ["mean detached in the variance", "variance path dropped", "mean path dropped"])
def test_a_wrong_batch_norm_is_caught(mistake):
    def cut(t):
        return t.detach() if isinstance(t, Tensor) else t

    def batch_norm(x):
        mu = functional.mean(x, 0, keepdims=True)
        if mistake == "mean path dropped":
            mu = cut(mu)
        xmu = x - mu
        sq = (x - cut(mu)) ** 2 if mistake == "mean detached in the variance" else xmu * xmu
        var = functional.mean(sq, 0, keepdims=True)
        return xmu * functional.rsqrt((cut(var) if mistake == "variance path dropped" else var) + 0.1)

    x = np.random.default_rng(0).normal(size=(5, 3))
    if mistake == "mean detached in the variance":  # right to first order, which is how it goes unnoticed
        testing.gradcheck(batch_norm, x)
        with pytest.raises(testing.GradcheckError):
            testing.gradgradcheck(batch_norm, x)
    else:
        with pytest.raises(testing.GradcheckError):
            testing.gradcheck(batch_norm, x)


# ---- declaring -------------------------------------------------------------------------------------------


def test_a_declaration_needs_one_kind_of_rule_and_a_new_name():
    sample = OPS["exp"].sample
    with pytest.raises(ValueError, match="`each`; got neither"):
        primitive(formula="y = x", sample=sample)
    with pytest.raises(ValueError, match="`each`; got both"):
        primitive(lambda g, y, x: g, formula="y = x", sample=sample, each=lambda i, g, y, x: g)
    with pytest.raises(ValueError, match="already"):
        primitive(lambda g, y, x: g, formula="y = x", sample=sample)(ops.exp.__wrapped__)


# ---- values that the properties leave out ----------------------------------------------------------------


@pytest.mark.parametrize("b", [-2, -1.0, 0, 0.5, 1, 2, 3])
def test_scalar_exponents(b):
    x = np.array([0.5, 1.0, 2.5])
    testing.gradcheck(lambda t: t**b, x, allow_zero=b == 0)
    assert np.allclose((Tensor(x) ** b).numpy(), x**b)


def test_the_power_rule_is_finite_where_the_formula_is_zero_times_infinity():
    x = Tensor([0.0, 0.0, 2.0], requires_grad=True)
    (x ** Tensor([0.0, 2.0, 0.0])).sum().backward()
    assert x.grad.numpy().tolist() == [0, 0, 0]
    e = Tensor([2.0, 0.0], requires_grad=True)
    (Tensor([0.0, 3.0]) ** e).sum().backward()
    assert np.allclose(e.grad.numpy(), [0, np.log(3)])


@pytest.mark.parametrize(
    "f", [more_ops.sigmoid, more_ops.softplus, functional.silu, functional.elu, functional.log_softmax]
)
def test_no_overflow_at_extreme_values(f):
    x = Tensor(np.array([-1e4, -750.0, 0.0, 750.0, 1e4]), requires_grad=True)
    y = f(x)
    y.backward(np.ones(5))
    assert np.isfinite(y.numpy()).all()
    assert np.isfinite(x.grad.numpy()).all()


@pytest.mark.parametrize("route", [nullcontext, kernels_disabled])
@given(st.integers(0, 6), st.sampled_from([np.float16, np.float32]))
def test_sums_accumulate_in_float64(route, power, dtype):
    x = np.full((10**power, 2), 0.1, dtype)  # two columns: NumPy adds one in pairs, which is exact enough
    exact = np.float64(x[0, 0]) * len(x)
    assume(exact < np.finfo(dtype).max)
    with route():
        for total in (ops.sum(Tensor(x), axis=0), ops.sum_to(Tensor(x), shape=(1, 2))):
            assert np.abs(total.numpy() - exact).max() <= exact * np.finfo(dtype).eps


@pytest.mark.parametrize("route", [nullcontext, kernels_disabled])
def test_sums_of_integers_are_exact(route):
    with route():
        assert ops.sum(Tensor(np.array([2**53, 1]))).item() == 2**53 + 1


def test_nan_propagates_through_reductions_and_activations():
    x = Tensor([1.0, np.nan, 3.0])
    for f in (ops.sum, more_ops.max, more_ops.min, functional.mean, functional.var, functional.logsumexp):
        assert np.isnan(f(x).item()), f
    for f in (ops.relu, more_ops.abs, ops.exp, more_ops.sigmoid, more_ops.tanh):
        assert np.isnan(f(x).numpy()).tolist() == [False, True, False], f
    assert np.isnan(more_ops.clip(x, min=0.0, max=2.0).numpy()[1])
