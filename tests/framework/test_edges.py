"""Numbers at the edges of a dtype, and NaN."""

import warnings
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_bn import Tensor, composed, grad, nn, optim
from tinygrad_bn import functional as F
from tinygrad_bn.backend import kernels_disabled

ROUTES = {"kernels": nullcontext, "reference": kernels_disabled, "composed": composed}


def leaf(x, dtype=None):
    return Tensor(np.array(x, dtype), requires_grad=True)


def gradients(y, *xs, g=None, create_graph=False):
    g = Tensor(np.full(y.shape, 1 if g is None else g, y.dtype))
    return [d.numpy() for d in grad(y, list(xs), g, create_graph=create_graph)]


# ---- NaN ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("function", "want"),
    [
        (F.relu, 1), (lambda x: F.maximum(x, 0.0), 1), (lambda x: F.minimum(x, 0.0), 1), (F.abs, np.nan),
        (F.leaky_relu, 0.01), (partial(F.clip, min=0), 0), (F.max, np.nan), (F.silu, np.nan), (F.gelu, np.nan),
    ],
)  # fmt: skip
def test_gradients_at_nan_are_pytorchs(function, want, route):
    x = leaf([np.nan], np.float32)
    with ROUTES[route](), np.errstate(invalid="ignore"):
        y = function(x)
        assert np.isnan(y.numpy()).all()
        for create_graph in (False, True):
            (gx,) = gradients(function(x), x, create_graph=create_graph)
            np.testing.assert_array_equal(gx, np.float32([want]))


@pytest.mark.parametrize("shape", [(4, 2), (4, 2, 3)])
def test_a_relu_behind_batch_norm_passes_the_gradient_at_nan(shape):
    values = np.random.default_rng(0).normal(size=shape)
    values[0, 0] = np.nan
    for route in ROUTES.values():
        x, bias = leaf(values), leaf(np.zeros(2))
        with route(), np.errstate(invalid="ignore"):
            y = F.batch_norm_relu(x, None, bias, eps=1e-5)
            gx, gbias = gradients(y, x, bias)
        assert np.isnan(gx[:, 0]).all()
        assert gbias[0] == values[:, 0].size
        assert np.isfinite(gx[:, 1]).all()


# ---- numbers at the edges -------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("x", "dtype", "want"),
    [
        (-3, "f2", -4.05e-3),
        (-6, "f4", -5.9192e-9),
        (-9, "f8", -1.01573e-18),
        (-np.inf, "f4", 0),
        (np.inf, "f4", np.inf),
    ],
)
def test_gelu_has_its_digits_where_it_is_near_0(x, dtype, want, route):
    with ROUTES[route]():
        assert F.gelu(leaf(x, dtype)).item() == pytest.approx(want, rel=1e-3 if dtype == "f2" else 1e-4)


@pytest.mark.compiled  # uncompiled, NumPy's scalars warn
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("function", [F.silu, F.gelu])
@pytest.mark.parametrize(("dtype", "g"), [("f2", 1024), ("f4", 3e38)])
def test_gradients_of_silu_and_gelu_far_out(function, dtype, g, route):
    x = leaf([100, -np.inf, np.inf, -1000], dtype)
    with ROUTES[route](), warnings.catch_warnings():
        warnings.simplefilter("error")
        y = function(x)
        for create_graph in (False, True):
            (gx,) = gradients(function(x), x, g=g, create_graph=create_graph)
            np.testing.assert_array_equal(gx, np.array([g, 0, g, 0], dtype))
    assert y.numpy().tolist() == [100, 0, np.inf, 0]


@pytest.mark.parametrize("function", [F.silu, F.gelu])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_gradients_of_silu_and_gelu_of_denormals(function, dtype):
    """Where y has fewer digits than x, or none."""
    x = leaf(np.finfo(dtype).smallest_subnormal * np.array([1, -1, 3, -7, 17, 901]), dtype)
    for create_graph in (False, True):
        (gx,) = gradients(function(x), x, g=1.0, create_graph=create_graph)
        np.testing.assert_allclose(gx, np.full(6, 0.5, dtype), rtol=2 * np.finfo(dtype).eps)


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=9), st.integers(0, 9))
def test_kernels_of_silu_and_gelu_are_their_compositions(values, seed):
    x, g = leaf(values), np.random.default_rng(seed).normal(size=len(values))
    for function in (F.silu, F.gelu):
        got, want = (grad(function(x), x, Tensor(g), create_graph=c).numpy() for c in (False, True))
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(function(x).numpy(), function.composition(x).numpy(), rtol=1e-13, atol=1e-300)


def moments(x):
    wide = x.astype(np.float64)
    return wide.mean(axis=0), wide.var(axis=0)


SIBLINGS = {
    "batch norm": lambda x, w, b, eps: F.batch_norm_training(x, w, b, eps=eps),
    "batch norm of planes": lambda x, w, b, eps: F.batch_norm_training(F.reshape(x, shape=(2, 1, 2)), w, b, eps=eps),
    "running statistics": lambda x, w, b, eps: F.batch_norm_inference(x, *moments(x.numpy()), w, b, eps=eps),
    "group norm": lambda x, w, b, eps: F.group_norm(F.reshape(x, shape=(1, 1, 4)), 1, w, b, eps=eps),
    "layer norm": lambda x, w, b, eps: F.layer_norm(F.reshape(x, shape=(1, 4)), 4, eps=eps) * w + b,
}  # fmt: skip


@pytest.mark.compiled  # uncompiled, NumPy's scalars warn
@pytest.mark.parametrize("name", SIBLINGS)
@pytest.mark.parametrize(("scale", "eps"), [(3e38, 1e-5), (1e30, 1e-5), (1e-40, 0.0), (1e-30, 0.0), (1, 1e-5)])
def test_normalisation_of_any_scale(name, scale, eps):
    x, w, b = leaf([[scale], [-scale], [-scale], [-scale]], np.float32), leaf([1], np.float32), leaf([0], np.float32)
    y = SIBLINGS[name](x, w, b, eps)
    np.testing.assert_allclose(y.numpy().reshape(-1), np.array([3, -1, -1, -1]) / np.sqrt(3), rtol=2e-5)
    cotangent = np.float32([1, 2, -1, 0.5]).reshape(y.shape)
    leaves = [w, b] if scale == 1e-40 else [w, b, x]  # the gradient of x is near 1 / scale
    got, want = (grad(SIBLINGS[name](x, w, b, eps), leaves, Tensor(cotangent), create_graph=c) for c in (False, True))
    for a, e in zip(got, want, strict=True):
        np.testing.assert_allclose(a.numpy(), e.numpy(), rtol=1e-4, atol=1e-6 / scale if scale < 1 else 1e-6)


@pytest.mark.parametrize("shape", [(3, 2), (2, 2, 3)])
@pytest.mark.parametrize("weight", [np.inf, 1e38, 1e-38])
def test_an_extreme_weight_gives_the_numbers_of_the_composition(shape, weight):
    x = leaf(np.random.default_rng(0).normal(size=shape), np.float32)
    w, b = leaf([weight, 1], np.float32), leaf([0.5, 0], np.float32)
    results = []
    for route in (nullcontext, composed):
        with route(), np.errstate(invalid="ignore", over="ignore"):
            y = F.batch_norm_relu(x, w, b, eps=1e-5)
            results.append([y.numpy(), *gradients(y, x, w, b)])
    for got, want in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.compiled  # uncompiled, NumPy's scalars warn
def test_a_batch_beyond_the_square_root_of_float64():
    x, bias = leaf([[1e300], [2e300], [-1e300]]), leaf([0.0])
    with np.errstate(over="ignore"):
        y = F.batch_norm(x, bias=bias, training=True)
        assert gradients(y, bias)[0].tolist() == [3]
        assert y.numpy().tolist() == F.batch_norm_steps(x, bias=bias).out.numpy().tolist()


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize(
    ("base", "exponent", "want"),
    [
        (0, -0.3, (-np.inf, -np.inf)),
        (0, 0, (0, 0)),
        (0, 2, (0, 0)),
        (1e-40, 0, (0, -92.1034)),
        (2, 0, (0, np.log(2))),
    ],
)
def test_gradients_of_a_power_near_0(base, exponent, want, create_graph):
    a, b = leaf([base], np.float32), leaf([exponent], np.float32)
    with np.errstate(divide="ignore"):
        got = gradients(a**b, a, b, create_graph=create_graph)
    np.testing.assert_allclose(got, np.array(want).reshape(2, 1), rtol=1e-5)


@given(
    st.integers(0, 4),
    st.sampled_from([0.0, 1e-40, 1e-30, -1e-30, 1e-12, -2.5]),
    st.sampled_from([np.float32, np.float64]),
    st.sampled_from([int, float, np.array]),
)
def test_every_derivative_of_a_whole_power(n, x, dtype, exponent):
    x = leaf([x if dtype == np.float32 else x**5], dtype)
    y, factor = F.pow(x, exponent(n)), 1.0
    for order in range(n + 3):
        want = factor * x.numpy().astype(np.float64) ** max(n - order, 0)
        np.testing.assert_allclose(y.numpy(), want, rtol=1e-6, atol=2 * np.finfo(dtype).smallest_subnormal)
        (y,) = grad(y.sum(), [x], create_graph=True)
        factor *= max(n - order, 0)


@pytest.mark.parametrize(("dtype", "values"), [("f2", [-9, -12]), ("f4", [-20, -90]), ("f8", [-40, -700])])
@pytest.mark.parametrize("function", [F.elu, F.expm1])
def test_derivatives_of_elu_far_out(function, dtype, values):
    x, want = leaf(values, dtype), np.exp(np.array(values, float))
    rtol = {"f2": 1e-2, "f4": 1e-4, "f8": 1e-12}[dtype]
    for create_graph in (False, True):
        (dx,) = grad(function(x).sum(), [x], create_graph=create_graph)
        np.testing.assert_allclose(dx.numpy(), want, rtol=rtol)
    np.testing.assert_allclose(gradients(dx.sum(), x)[0], want, rtol=rtol)


@pytest.mark.parametrize("exponent", [np.inf, -np.inf, np.nan])
def test_a_power_that_is_no_number_is_numpys(exponent):
    x = np.array([2.0, 0.5, -2.0, 1.0])
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(F.pow(x, exponent), np.power(x, exponent))


@pytest.mark.compiled  # loops in Python warn of the overflow
@pytest.mark.parametrize("shape", [(64, 2), (8, 2, 8)])
def test_a_gradient_whose_sums_overflow_float32(shape):
    rng = np.random.default_rng(0)
    x, w, b = leaf(rng.normal(size=shape), "f4"), leaf([1e-3, 1e-3], "f4"), leaf([0, 0], "f4")
    g = Tensor((np.where(rng.random(shape) < 0.5, -1, 1) * 1e38).astype(np.float32))
    got, want = (grad(F.batch_norm_training(x, w, b, eps=1e-5), [x], g, create_graph=c) for c in (False, True))
    for a, e in zip(got, want, strict=True):
        np.testing.assert_allclose(a.numpy(), e.numpy(), rtol=1e-4, atol=1e-5 * np.abs(e.numpy()).max())


@pytest.mark.parametrize("shape", [(2,), (2, 5000), (5000, 2)])
def test_a_variance_that_overflows_is_infinite(shape):
    x = np.full(shape, 1e200)
    x[1::2] *= -1
    for route in ROUTES.values():
        with route(), np.errstate(over="ignore", invalid="ignore"):
            assert np.isinf(F.var(x, axis=0)).all()
            assert np.isinf(F.std(x, axis=0)).all()
            assert np.isnan(F.var(np.where(x > 0, np.inf, 0.0), axis=0)).all()


def test_a_power_of_a_number_keeps_the_digits_of_float64():
    b = leaf([0.5, 2.0])
    np.testing.assert_allclose(gradients(2.3**b, b)[0], 2.3 ** b.numpy() * np.log(2.3), rtol=1e-15)


def test_the_mixed_derivative_of_a_power_at_exponent_0():
    a, b = leaf([3.0]), leaf([0.0])
    (da,) = grad(a**b, [a], create_graph=True)
    assert gradients(da, b)[0] == pytest.approx(1 / 3)


@given(st.floats(-1e3, 1e3), st.integers(-9, 9), st.sampled_from([np.float32, np.float64]))
def test_whole_powers_are_numpys(x, n, dtype):
    x = np.array([x, -x, 0.0, -0.0, np.inf, -np.inf, np.nan], dtype)
    with np.errstate(all="ignore"):
        got, want = F.pow(x, n), np.power(x.astype(np.float64), n)
    np.testing.assert_allclose(got, want.astype(dtype), rtol=4 * np.finfo(dtype).eps, atol=np.finfo(dtype).tiny)
    np.testing.assert_array_equal(np.signbit(got[:-1]), np.signbit(want[:-1]))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("axis", [None, 0, -1, ()])
@pytest.mark.parametrize("keepdims", [False, True])
def test_a_0d_tensor_counts_as_one_element(axis, keepdims, route):
    wants = {F.sum: (3, 1), F.mean: (3, 1), F.max: (3, 1), F.logsumexp: (3, 1), F.var: (0, 0), F.std: (0, 0)}
    for function, (value, slope) in wants.items():
        x = leaf(3.0)
        with ROUTES[route](), warnings.catch_warnings():
            warnings.simplefilter("error")
            y = function(x, axis=axis, keepdims=keepdims)
            assert (y.shape, y.item(), gradients(y, x)[0].item()) == ((), value, slope)


@pytest.mark.parametrize("function", [F.mean, F.var, F.std, F.sum, F.mean_and_var])
def test_derivatives_of_reductions_of_nothing_are_0(function):
    x = leaf(np.ones((0, 3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = function(x, axis=0)
        assert function is F.sum or np.isnan(y.numpy()).all()
        g = leaf(np.ones(y.shape))
        (gx,) = grad(y, [x], g, create_graph=True)
        assert gradients(gx, g)[0].tolist() == np.zeros(y.shape).tolist()


@pytest.mark.parametrize("route", ROUTES)
def test_one_value_of_a_sample_is_normalised_to_the_bias(route):
    x, bias = leaf([[3.0], [4.0]]), leaf([0.5])
    with ROUTES[route]():
        y = F.layer_norm(x, 1, bias=bias)
        assert y.numpy().tolist() == [[0.5], [0.5]]
        assert [g.tolist() for g in gradients(y.sum(), x, bias)] == [[[0.0], [0.0]], [2.0]]


def test_the_gradient_of_an_index_that_repeats_is_not_added_up_in_half_precision():
    x = leaf([1.0, 2.0], np.float16)
    (g,) = gradients(x[np.zeros(4000, int)], x, g=0.125)
    assert g.tolist() == [500.0, 0.0]


HUGE_GRADIENTS = {  # a function that shrinks a gradient of 2e38, where, and its derivative
    "power of -2": (lambda x: x**-2.0, 4.0, -2 / 64),
    "power of 3": (lambda x: x**3.0, 0.25, 3 / 16),
    "divisor": (lambda x: 1000.0 / x, 100.0, -0.1),
}


@pytest.mark.parametrize(("function", "at", "slope"), HUGE_GRADIENTS.values(), ids=HUGE_GRADIENTS)
def test_a_huge_gradient_that_shrinks_does_not_overflow_on_the_way(function, at, slope):
    x = Tensor(np.float32([at]), requires_grad=True)
    function(x).backward(np.float32([2e38]))
    np.testing.assert_allclose(x.grad.numpy(), [2e38 * slope], rtol=1e-6)


def test_a_state_whose_squares_overflowed_is_loaded():
    p = nn.Parameter(np.ones(2, np.float32))
    optimizer = optim.Adam([p])
    p.grad = Tensor(np.float32([1e22, 1]))
    with np.errstate(over="ignore"):
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert np.isinf(optimizer.state[p]["exp_avg_sq"]).any()


def test_a_class_beside_module_is_initialised():
    class Beside:
        def __init__(self):
            super().__init__()
            self.beside = 1

    class Net(nn.Module, Beside):
        def __init__(self):
            super().__init__()

    assert Net().beside == 1


@pytest.mark.parametrize("name", ["sum", "mean", "max", "min", "var", "std", "logsumexp", "softmax"])
def test_a_tuple_of_one_axis_is_that_axis(name):
    function = getattr(F, name)
    for x in (np.float32([3.0])[0], np.float32([1, 2, 4])):
        t = Tensor(x, requires_grad=True)
        (y := function(t, axis=(0,))).backward(np.ones(y.shape, np.float32))
        got = t.grad.numpy()
        t.zero_grad()
        (want := function(t, axis=0)).backward(np.ones(y.shape, np.float32))
        assert np.array_equal(y.numpy(), want.numpy())
        assert np.array_equal(got, t.grad.numpy())
