"""Functions and slopes that are near 0 because something is near 1: every digit, at every order."""

from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_bn import Tensor, composed, grad
from tinygrad_bn import functional as F
from tinygrad_bn.backend import kernels_disabled
from tinygrad_bn.more_ops import log1p, sech_squared

ROUTES = {"kernels": nullcontext, "reference": kernels_disabled, "composed": composed}
FLOATS = [np.float16, np.float32, np.float64]
FAR = {np.float16: 9.0, np.float32: 80.0, np.float64: 600.0}  # there e⁻ˣ is not yet a denormal


def close(got, want, dtype, ulps=8):
    np.testing.assert_allclose(got, np.asarray(want).astype(dtype), rtol=ulps * np.finfo(dtype).eps, atol=0)


def slope_of_sigmoid(x):
    e = np.exp(-np.abs(x))
    return e / (1 + e) ** 2


def slope_of_tanh(x):
    return 4 * slope_of_sigmoid(2 * x)


CURVES = {  # the function, its first and its second derivative
    "sigmoid": (F.sigmoid, slope_of_sigmoid, lambda x: -slope_of_sigmoid(x) * np.tanh(x / 2)),
    "tanh": (F.tanh, slope_of_tanh, lambda x: -2 * slope_of_tanh(x) * np.tanh(x)),
    "softplus": (F.softplus, lambda x: 1 / (1 + np.exp(-x)), slope_of_sigmoid),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", CURVES)
@given(st.sampled_from(FLOATS), st.lists(st.floats(-1, 1), min_size=1, max_size=5))
def test_slopes_keep_their_digits_where_the_function_is_flat(name, route, dtype, parts):
    function, slope, second = CURVES[name]
    values = (FAR[dtype] / (2 if name == "tanh" else 1) * np.array(parts)).astype(dtype)
    values[np.abs(values) < 1e-3] = 1e-3
    x, one = Tensor(values, requires_grad=True), Tensor(np.ones_like(values))
    with ROUTES[route]():
        close(grad(function(x), x, one).numpy(), slope(values.astype(float)), dtype)
        dx = grad(function(x), x, one, create_graph=True)
        close(dx.numpy(), slope(values.astype(float)), dtype)
        close(grad(dx, x, one).numpy(), second(values.astype(float)), dtype, ulps=16)


@given(st.floats(0.5, 20))
def test_the_third_derivative_of_tanh(value):
    """tanh‴ = 2 s (2 − 3 s), with s = 1 / cosh²."""
    x = Tensor(value, requires_grad=True, dtype=np.float64)
    y = F.tanh(x)
    for _ in range(3):
        y = grad(y, x, create_graph=True)
    s = slope_of_tanh(value)
    np.testing.assert_allclose(y.item(), 2 * s * (2 - 3 * s), rtol=1e-10, atol=1e-13)


def test_new_primitives_at_the_ends():
    x = np.array([0.0, np.inf, -np.inf, np.nan])
    np.testing.assert_array_equal(sech_squared(x), [1, 0, 0, np.nan])
    np.testing.assert_array_equal(log1p(x[:2]), [0, np.inf])


# ---- sums of exponentials --------------------------------------------------------------------------------


def pairs(values):
    """Rows (0, x) of logits."""
    return F.stack([Tensor(np.zeros(values.shape, values.dtype)), values], axis=1)


CLASSES = {"class 0": 0, "class 1": 1}
LOSSES = {
    "cross-entropy": lambda x, c: F.cross_entropy(x, np.full(len(x), c), reduction="none"),
    "log-softmax": lambda x, c: -F.log_softmax(x)[:, c],
    "logsumexp": lambda x, c: F.logsumexp(x - x[:, c : c + 1], axis=1),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("c", CLASSES)
@pytest.mark.parametrize("name", LOSSES)
@given(st.sampled_from(FLOATS), st.lists(st.floats(-1, 1), min_size=1, max_size=5))
def test_a_class_that_is_almost_certain_has_a_loss(name, c, route, dtype, parts):
    """−log softmax of (0, x) is log(1 + eˣ), or log(1 + e⁻ˣ): near 0 it is e⁻ˣ and not log 1."""
    values = (FAR[dtype] * np.array(parts)).astype(dtype)
    sign = -1 if CLASSES[c] else 1
    with ROUTES[route]():
        loss = LOSSES[name](pairs(Tensor(values)), CLASSES[c])
    wide = sign * values.astype(float)
    close(loss.numpy(), np.maximum(wide, 0) + np.log1p(np.exp(-np.abs(wide))), dtype)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@given(st.sampled_from(FLOATS), st.floats(0, 1), st.sampled_from([1.0, 0.3]))
def test_the_gradient_of_cross_entropy_at_an_almost_certain_class(smoothing, dtype, part, weight):
    """p − 1 of the target is −(p of the other class)."""
    value = (FAR[dtype] * np.array([part])).astype(dtype)
    x = Tensor(np.stack([np.zeros_like(value), value], axis=1), requires_grad=True)
    loss = F.cross_entropy(x, np.array([1]), weight=np.array([1, weight]), reduction="sum", label_smoothing=smoothing)
    loss.backward()
    p = 1 / (1 + np.exp(value.astype(float)))  # of class 0
    one, two = smoothing / 2, weight * (1 - smoothing / 2)  # q · w of the classes
    want = p * (one + two) - one
    close(x.grad.numpy()[0], np.array([want, -want]).reshape(2), dtype, ulps=8 if smoothing == 0 else 64)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("ties", [1, 2, 3])
def test_derivatives_of_logsumexp_where_elements_tie(ties, route):
    values = np.array([1.0] * ties + [0.5, -2.0])
    p = np.exp(values) / np.exp(values).sum()
    for function in (F.logsumexp, lambda x: F.log_softmax(x)[0] * -1 + x[0]):
        x = Tensor(values, requires_grad=True)
        with ROUTES[route]():
            y = function(x)
            np.testing.assert_allclose(y.numpy(), np.log(np.exp(values).sum()), rtol=1e-14)
            dx = grad(y, x, create_graph=True)
            hessian = [grad(dx[i], x).numpy() for i in range(len(p))]
        np.testing.assert_allclose(dx.numpy(), p, rtol=1e-13)
        np.testing.assert_allclose(hessian, np.diag(p) - np.outer(p, p), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("route", ROUTES)
def test_logsumexp_of_infinities_and_of_nothing(route):
    with ROUTES[route](), np.errstate(divide="ignore", invalid="ignore"):
        rows = np.array([[-np.inf, -np.inf], [np.inf, 0], [np.nan, 0], [-np.inf, 0]])
        np.testing.assert_array_equal(F.logsumexp(Tensor(rows), axis=1).numpy(), [-np.inf, np.inf, np.nan, 0])
        assert F.logsumexp(Tensor(np.zeros((2, 0))), axis=1).numpy().tolist() == [-np.inf] * 2


# ---- kinks and edges --------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("create_graph", [False, True])
def test_clip_with_limits_in_the_wrong_order_is_constant(route, create_graph):
    x = Tensor(np.array([-2.0, -1, 0, 1, 2]), requires_grad=True)
    with ROUTES[route]():
        y = F.clip(x, min=1, max=-1)
        assert y.numpy().tolist() == [-1] * 5
        assert grad(y, x, Tensor(np.ones(5)), create_graph=create_graph).numpy().tolist() == [0] * 5
        kept = grad(F.clip(x, min=1, max=1), x, Tensor(np.ones(5)))
        assert kept.numpy().tolist() == [0, 0, 0, 1, 0]


@pytest.mark.parametrize(
    "norm", [F.instance_norm, partial(F.group_norm, num_groups=1), partial(F.batch_norm, training=True)]
)
def test_no_channels_are_normalised_to_nothing(norm):
    x = Tensor(np.ones((2, 0, 4)), requires_grad=True)
    y = norm(x)
    y.backward(np.ones(y.shape))
    assert y.shape == x.grad.shape == (2, 0, 4)


@pytest.mark.parametrize("create_graph", [False, True])
def test_the_zeroth_power_of_nan_has_no_slope(create_graph):
    a, b = (Tensor(np.array([value]), requires_grad=True) for value in (np.nan, 0.0))
    y = a**b
    assert y.item() == 1
    assert grad(y, a, create_graph=create_graph).item() == 0


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("function", [F.var, F.std, partial(F.var, axis=1), partial(F.var, axis=0)])
def test_the_gradient_of_a_variance_with_an_infinity_is_nan(function, route):
    values = np.arange(12.0).reshape(4, 3)
    values[1, 2] = np.inf
    x = Tensor(values, requires_grad=True)
    with ROUTES[route](), np.errstate(invalid="ignore"):
        y = function(x)
        got, want = (grad(y, x, Tensor(np.ones(y.shape)), create_graph=c).numpy() for c in (False, True))
    np.testing.assert_allclose(got, want)
    assert np.isnan(got[1, 2])


ROW = np.array([[100.0, 200.0, 400.0, 800.0]], np.float32)
STEEP = {
    "layer_norm": lambda x, w: F.layer_norm(x, 4, w),
    "rms_norm": lambda x, w: F.rms_norm(x, 4, w),
    "group_norm": lambda x, w: F.group_norm(x, 1, w),
    "instance_norm": lambda x, w: F.instance_norm(x.reshape(1, 1, 4)).reshape(1, 4),
}


@pytest.mark.parametrize("weight", [1.0, 300.0])
@pytest.mark.parametrize("name", STEEP)
def test_a_gradient_whose_terms_overflow_is_that_of_the_composition(name, weight):
    g = np.array([[3e38, -3e38, 1e38, 2e38]], np.float32) / np.float32(weight)
    gradients = []
    for route in (nullcontext, composed):
        with route(), np.errstate(over="ignore"):  # uncompiled loops warn
            x = Tensor(ROW, requires_grad=True)
            STEEP[name](x, Tensor(np.full(4, weight, np.float32))).backward(g)
        gradients.append(x.grad.numpy())
    assert np.isfinite(gradients[1]).all()
    np.testing.assert_allclose(*gradients, rtol=1e-5)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", [(4, 1), (300, 3), (4, 2, 3, 3)])
def test_gradients_of_batch_norm_whose_sums_overflow_float32(shape, relu):
    rng = np.random.default_rng(0)
    x, g = (
        rng.normal(scale=4, size=shape).astype(np.float32),
        (rng.choice([-1, 1], size=shape) * 1e38).astype(np.float32),
    )
    normalise = F.batch_norm_relu if relu else F.batch_norm_training
    found = []
    for route in (nullcontext, composed):
        for graph in (False, True):
            t = Tensor(x, requires_grad=True)
            with route():
                y = normalise(t, None, None, eps=1e-5)
            found.append(grad(y, t, g, create_graph=graph).numpy())
    assert np.isfinite(found[0]).all()
    for other in found[1:]:
        np.testing.assert_allclose(found[0], other, rtol=1e-5, atol=1e33)
