"""Transformations of functions: against each other, known derivatives, and the engine's own gradients."""

import math
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.framework.test_ops import BUILT_IN, HypothesisDraw
from tinygrad_bn import Tensor, manual_seed, nn, no_grad, optim
from tinygrad_bn import functional as F
from tinygrad_bn import grad as gradients
from tinygrad_bn.tensor import OPS
from tinygrad_bn.testing.calls import cast_real, split_differentiable
from tinygrad_bn.transforms import functional_call, grad, hessian, hvp, jacobian, jvp, value_and_grad, vjp

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
X, V = RNG.normal(size=(2, 5))


def curve(x):
    return (F.tanh(x) ** 2 * x).sum() + F.exp(x[0] * x[1])


@pytest.mark.parametrize("name", [name for name in BUILT_IN if OPS[name].differentiable])
@given(data=st.data(), seed=st.integers(0, 99))
def test_forward_and_reverse_agree_for_every_op(name, data, seed):
    """⟨g, jvp(v)⟩ = ⟨vjp(g), v⟩, and the same of the gradient."""
    xs, params = OPS[name].sample(HypothesisDraw(data))
    f, real = split_differentiable(OPS[name], cast_real(xs, np.float64), params)
    if not real:
        return
    rng = np.random.default_rng(seed)

    def dots(a, b):
        return sum(float(np.sum(np.asarray(p) * np.asarray(q))) for p, q in zip(a, b, strict=True))

    def expect_adjoint(function, primals):
        vs = [rng.normal(size=x.shape) for x in primals]
        y, moved = jvp(function, primals, vs)
        again, pull = vjp(function, *primals)
        ys, moves = (y, moved) if isinstance(y, tuple) else ((y,), (moved,))
        gs = tuple(rng.normal(size=part.shape) for part in ys)
        pulled = pull(gs if isinstance(y, tuple) else gs[0])
        for a, b in zip(ys, again if isinstance(again, tuple) else (again,), strict=True):
            np.testing.assert_array_equal(a, b)
        scale = 1 + sum(np.abs(np.asarray(p)).max(initial=0) for p in (*pulled, *moves))
        assert math.isclose(dots(gs, moves), dots(pulled, vs), rel_tol=1e-8, abs_tol=1e-8 * scale * (1 + len(vs)))

    expect_adjoint(f, real)
    g = rng.normal(size=np.shape(f(*map(Tensor, real))))
    expect_adjoint(lambda *ts: vjp(f, *ts)[1](g), real)


def test_derivatives_agree_with_each_other():
    second = hessian(curve)(X).numpy()
    np.testing.assert_allclose(second, second.T, rtol=1e-12)
    np.testing.assert_allclose(hvp(curve, X, V), second @ V, rtol=1e-12)
    slope, moved = jvp(grad(curve), (X,), (V,))
    np.testing.assert_allclose(moved, second @ V, rtol=1e-12)
    np.testing.assert_allclose(slope, grad(curve)(X), rtol=1e-15)
    np.testing.assert_allclose(jacobian(grad(curve))(X), second, rtol=1e-12)
    third = jacobian(hessian(curve))(X).numpy()
    np.testing.assert_allclose(third @ V, jvp(hessian(curve), (X,), (V,))[1], rtol=1e-10)


def test_a_numeric_derivative():
    h = 1e-6
    numeric = (curve(Tensor(X + h * V)) - curve(Tensor(X - h * V))).item() / (2 * h)
    assert jvp(curve, (X,), (V,))[1].item() == pytest.approx(numeric, rel=1e-7)
    assert float(grad(curve)(X).numpy() @ V) == pytest.approx(numeric, rel=1e-7)


def test_every_order_of_batch_norm():
    """The derivatives of h(t) = Σ BN(x + t·v)·w at 0; for two values per channel they are known in closed form."""
    for eps in (1e-5, 0.25):
        x = np.array([[0.3], [0.8]])
        v, w = np.array([[1.0], [-1.0]]), np.array([[1.0], [0.0]])

        def h(t, x=x, v=v, w=w, eps=eps):
            return (F.batch_norm(x + t * v, training=True, eps=eps) * w).sum()

        # With d = (x₀ − x₁)/2 + t and q = √(d² + eps) it is d/q, with the derivatives
        # eps q⁻³, −3 eps d q⁻⁵ and 3 eps (4d² − eps) q⁻⁷.
        d, q = -0.25, math.sqrt(0.0625 + eps)
        want = [d / q, eps / q**3, -3 * eps * d / q**5, 3 * eps * (4 * d * d - eps) / q**7]
        derivative = h
        for value in want:
            assert derivative(Tensor(np.float64(0))).item() == pytest.approx(value, rel=1e-9, abs=1e-12)
            derivative = grad(derivative)


def test_an_inner_gradient_is_by_its_own_argument():
    """Perturbation confusion (Siskind & Pearlmutter 2005): d/dx (x · d/dy (x + y)) is 1, not 2."""
    assert grad(lambda x: x * grad(lambda y: x + y)(1.0))(1.0).item() == 1
    assert grad(lambda x: x * grad(lambda y: x * y)(x))(3.0).item() == 6


def test_what_the_function_reads_keeps_its_graph():
    p = Tensor(np.float64(3), requires_grad=True)
    value, slope = value_and_grad(lambda x: p * x**2)(np.float64(2))
    assert (value.requires_grad, slope.requires_grad) == (True, True)
    assert gradients(slope, p).item() == 4
    assert gradients(value, p).item() == 4
    assert p.grad is None
    value, slope = value_and_grad(lambda x: x**2)(np.float64(2))
    assert (value.requires_grad, slope.requires_grad) == (False, False), "nothing else to differentiate by"
    x = Tensor(np.float64(2), requires_grad=True)
    assert gradients(grad(lambda x: x**3)(x), x).item() == 12, "an argument with a graph of its own"


def test_nests_positions_and_by_products():
    def f(state, x, scale):
        y = state["w"] * x + state["b"][0]
        return (y * scale).sum(), "seen"

    state = {"w": np.array([1.0, 2.0]), "b": [np.array([3.0, 4.0])]}
    (value, seen), (of_state, of_scale) = value_and_grad(f, (0, 2))(state, np.array([5.0, 6.0]), 2.0)
    assert (value.item(), seen) == (2 * (5 + 3 + 12 + 4), "seen")
    assert of_state["w"].numpy().tolist() == [10, 12]
    assert of_state["b"][0].numpy().tolist() == [2, 2]
    assert of_scale.item() == 24
    y, pull = vjp(lambda a: {"sum": a.sum(), "square": [a * a]}, X)
    [by_a] = pull({"sum": 2.0, "square": [V]})
    np.testing.assert_allclose(by_a, 2 + 2 * X * V)
    assert set(y) == {"sum", "square"}


def test_under_no_grad_too():
    with no_grad():
        assert grad(lambda x: x**3)(2.0).item() == 12
        assert jvp(lambda x: x**3, (2.0,), (1.0,))[1].item() == 12


def test_results_that_do_not_depend_on_the_argument():
    assert grad(lambda x: Tensor(2.0))(3.0).item() == 0
    assert jacobian(lambda x: Tensor([1.0, 2.0]))(np.zeros((2, 3))).numpy().tolist() == np.zeros((2, 2, 3)).tolist()
    y, dy = jvp(lambda x: Tensor([1.0]), (3.0,), (1.0,))
    assert (y.item(), dy.item()) == (1, 0)


def network() -> nn.Sequential:
    manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def test_a_module_as_a_function_of_its_parameters():
    model = network()
    x, y = RNG.normal(size=(10, 4)).astype(np.float32), RNG.integers(0, 3, 10)
    before = {name: a.tobytes() for name, a in model.state_dict().items()}
    objects = dict(model.named_tensors())

    def loss(state):
        return F.cross_entropy(functional_call(model, state, x), y)

    value, slopes = value_and_grad(loss)({name: p.numpy() for name, p in model.named_parameters()})
    assert before == {name: a.tobytes() for name, a in model.state_dict().items()}, "running statistics too"
    assert all(objects[name] is t for name, t in model.named_tensors())
    by_engine = F.cross_entropy(model(x), y)
    by_engine.backward()
    assert value.item() == by_engine.item()
    for name, p in model.named_parameters():
        np.testing.assert_array_equal(slopes[name], p.grad)
    with pytest.raises(ZeroDivisionError):
        functional_call(Failing(model), {}, x)
    assert all(objects[name] is t for name, t in model.named_tensors())


class Failing(nn.Module):
    def __init__(self, model):
        self.model = model

    def forward(self, x):
        self.model(x)
        raise ZeroDivisionError


def test_gradient_penalty_and_newton_with_fused_kernels():
    """A penalty on ‖∂loss/∂x‖² has the gradient of finite differences, and Newton's method converges on BatchNorm."""
    model, x = network().astype(np.float64), RNG.normal(size=(6, 4))

    def penalty(weight):
        def loss(x):
            return (functional_call(model, {"0.weight": weight}, x) ** 2).sum()

        return (grad(loss)(x_given := Tensor(x)) ** 2).sum() + 0 * x_given.sum()

    weight = model[0].weight.numpy()
    direction, h = RNG.normal(size=weight.shape), 1e-5
    slope = float(np.sum(grad(penalty)(weight).numpy() * direction))
    numeric = (penalty(Tensor(weight + h * direction)) - penalty(Tensor(weight - h * direction))).item() / (2 * h)
    assert slope == pytest.approx(numeric, rel=1e-6)

    target = RNG.normal(size=(6, 2))

    def objective(p):
        y = F.batch_norm(Tensor(x[:, :2]), weight=p[:2], bias=p[2:], training=True)
        return ((y - target) ** 2).sum() + (F.exp(p) * 0.1).sum()

    p = np.array([1.0, 1.0, 0.0, 0.0])
    for _ in range(8):
        p = p - np.linalg.solve(hessian(objective)(p).numpy(), grad(objective)(p).numpy())
    assert np.abs(grad(objective)(p).numpy()).max() < 1e-10


def test_shared_parameters_are_one():
    layer = nn.Linear(3, 3).astype(np.float64)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    x = RNG.normal(size=(4, 3))
    model(x).sum().backward()
    for key in ("0.weight", "2.weight"):
        slopes = grad(lambda w, key=key: functional_call(model, {key: w}, x).sum())(layer.weight.numpy())
        np.testing.assert_allclose(slopes.numpy(), layer.weight.grad.numpy())
    slopes = grad(lambda s: functional_call(model, s, x).sum())(dict(model.named_parameters()))
    np.testing.assert_allclose(slopes["0.weight"].numpy(), layer.weight.grad.numpy())
    w = Tensor(layer.weight)
    np.testing.assert_array_equal(functional_call(model, model.state_dict(), x).numpy(), model(x).numpy())
    assert functional_call(model, {"0.weight": w, "2.weight": w}, x).shape == (4, 3)
    with pytest.raises(ValueError, match=r"0.weight and 2.weight are one parameter"):
        functional_call(model, {"0.weight": w, "2.weight": w * 2}, x)


def test_gradients_by_running_statistics():
    norm, x = nn.BatchNorm1d(3).astype(np.float64).eval(), RNG.normal(size=(4, 3))
    given = {"running_mean": RNG.normal(size=3), "running_var": RNG.uniform(0.5, 2, 3)}
    slopes = grad(lambda s: (functional_call(norm, s, x) ** 2).sum())(given)

    def value(state):
        return (functional_call(norm, state, x).numpy() ** 2).sum()

    for name, slope in slopes.items():
        for i in range(3):
            step = np.eye(3)[i] * 1e-6
            numeric = (value({**given, name: given[name] + step}) - value({**given, name: given[name] - step})) / 2e-6
            assert abs(slope.numpy()[i] - numeric) < 1e-6
    norm.train()
    y = grad(lambda s: functional_call(norm, s, x).sum())(given)
    assert not any(v.numpy().any() for v in y.values())  # the batch's own statistics normalise
    assert norm.running_mean.numpy().tolist() == [0, 0, 0]


def test_named_tuples_and_ordered_dictionaries():
    Pair = namedtuple("Pair", "a b")
    slopes = grad(lambda p: (p.a * p.b).sum())(Pair(X, V))
    assert type(slopes) is Pair
    np.testing.assert_array_equal(slopes.a.numpy(), V)
    slopes = grad(lambda d: (d["a"] ** 2).sum())(OrderedDict(a=X))
    assert type(slopes) is OrderedDict
    steps = vjp(lambda x: F.batch_norm_steps(x[:, None]), X)[0]
    assert type(steps) is F.Normalization


def test_integer_results_have_no_derivative():
    (_, place), (dy, none) = jvp(lambda x: (x * x, F.argmax(x)), (X,), (V,))
    np.testing.assert_allclose(dy.numpy(), 2 * X * V)
    assert (place.item(), none.item(), none.dtype) == (X.argmax(), 0, np.int64)
    (value, other), _ = value_and_grad(lambda x: ((x * x).sum(), x * 2))(X)
    assert not value.requires_grad
    assert not other.requires_grad


def test_reverse_over_forward():
    moved = grad(lambda x: jvp(curve, (x,), (V,))[1])(X)
    np.testing.assert_allclose(moved.numpy(), hvp(curve, X, V).numpy(), rtol=1e-10)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: grad(lambda x: x * x)(np.ones(3)), ValueError, r"one number; the function gave shape \(3,\)"),
        (lambda: grad(lambda x: 3)(1.0), TypeError, "has to return tensors; it returned .*int"),
        (lambda: grad(lambda x: x)(np.array(1)), TypeError, "argument 0 has to be floating-point.*got int64"),
        (lambda: grad(lambda x: x, 2)(1.0), ValueError, "there is no argument 2.*given 1"),
        (lambda: grad(lambda x, y: x, (0, 0))(1.0, 2.0), ValueError, r"names an argument twice: \(0, 0\)"),
        (lambda: jvp(lambda x: x, 1.0, 1.0), TypeError, "primals holds one entry for each argument, in a tuple"),
        (lambda: hvp(lambda s: Tensor(1.0), {}, {}), ValueError, "nothing to differentiate by"),
        (lambda: F.batch_norm_gradient(X[:, None], X[None], None, eps=0.1), ValueError, r"\(1, 5\); got \(5, 1\)"),
        (lambda: grad(lambda x: x, -1)(1.0), ValueError, "argnums has to be at least 0"),
        (lambda: vjp(lambda x: x, np.ones(2))[1](np.ones(3)), ValueError, r"shape \(2,\) is needed; got \(3,\)"),
        (lambda: vjp(lambda x: x, np.ones(2))[1]([np.ones(2)]), ValueError, r"the form tensor; got \[tensor\]"),
        (lambda: jvp(lambda x: x, (1.0,), (1.0, 2.0)), ValueError, r"form \(tensor,\); got \(tensor, tensor\)"),
        (lambda: jacobian(lambda x: x["a"])({"a": np.ones(2)}), TypeError, "by one tensor; argument 0 is"),
        (lambda: functional_call(network(), {"9.weight": 1}, X), KeyError, "has no 9.weight; it has 0.weight"),
        (lambda: functional_call(network(), {"0.bias": X}, X), ValueError, r"0.bias has the shape \(8,\); got \(5,\)"),
    ],
)  # fmt: skip
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_training_in_functional_style():
    """The gradients are those of `backward`."""
    x, y = RNG.normal(size=(10, 4)).astype(np.float32), RNG.integers(0, 3, 10)
    ours, theirs = network(), network()
    rates = [optim.SGD(m.parameters(), lr=0.1) for m in (ours, theirs)]
    for _ in range(3):
        slopes = grad(lambda s: F.cross_entropy(functional_call(ours, s, x), y))(dict(ours.named_parameters()))
        for name, p in ours.named_parameters():
            p.grad = slopes[name].detach()
        rates[0].step()
        rates[1].zero_grad()
        F.cross_entropy(theirs(x), y).backward()
        rates[1].step()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        np.testing.assert_allclose(p, q, rtol=1e-6, atol=1e-7, err_msg=name)
