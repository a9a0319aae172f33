"""BatchNorm's derivatives of orders 0 to 6, fused and composed, against power series in decimals of 60 digits."""

import math
from contextlib import nullcontext

import numpy as np
import pytest

from tinygrad_bn import Tensor, composed
from tinygrad_bn import functional as F
from tinygrad_bn.datasets.fetch import EMBEDDED
from tinygrad_bn.testing.taylor import batch_norm_derivatives
from tinygrad_bn.transforms import grad

ORDER = 6
X, V, W = np.split(np.loadtxt(EMBEDDED / "high_order.csv", delimiter=",", skiprows=1), 3, axis=1)
RNG = np.random.default_rng(0)
WEIGHT, BIAS, DW, DB = RNG.normal(size=(4, 3))
ZERO = np.zeros(3)
MODES = {"fused": nullcontext, "composed": composed}
DIRECTIONS = {
    "x": (V, ZERO, ZERO),
    "weight": (V * 0, DW, ZERO),
    "bias": (V * 0, ZERO, DB),
    "all": (V, DW, DB),
}


def derivatives(h, mode):
    """Those of orders 0 to 6 at 0."""
    found = []
    with MODES[mode]():
        for _ in range(ORDER + 1):
            found.append(h(Tensor(np.float64(0))).item())
            h = grad(h)
    return found


def expect_close(found, want):
    for order, (a, b) in enumerate(zip(found, want, strict=True)):
        assert math.isclose(a, b, rel_tol=1e-10, abs_tol=1e-10 * max(map(abs, want))), (order, a, b)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("eps", [1e-5, 0.25])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_training(direction, eps, mode):
    dx, dw, db = DIRECTIONS[direction]

    def h(t):
        y = F.batch_norm(X + t * dx, weight=WEIGHT + t * dw, bias=BIAS + t * db, training=True, eps=eps)
        return (y * W).sum()

    want = batch_norm_derivatives((X, WEIGHT, BIAS), (dx, dw, db), W, eps, ORDER)
    expect_close(derivatives(h, mode), want)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_evaluation(direction, mode):
    """With given statistics it is a product of two lines: only the orders 0 to 2 are not 0."""
    dx, dw, db = DIRECTIONS[direction]
    mean, var, eps = X.mean(axis=0), X.var(axis=0), 0.25

    def h(t):
        return (F.batch_norm(X + t * dx, mean, var, WEIGHT + t * dw, BIAS + t * db, eps=eps) * W).sum()

    xhat, slope = ((v / np.sqrt(var + eps) * W).sum(axis=0) for v in (X - mean, dx))
    each = W.sum(axis=0)
    want = [xhat @ WEIGHT + each @ BIAS, slope @ WEIGHT + xhat @ dw + each @ db, 2 * slope @ dw, 0, 0, 0, 0]
    expect_close(derivatives(h, mode), want)


KNOWN = {1e-5: (4.8567, 2.2175, -2.3960, -8.5691, 6.0600), 0.25: (4.1524, 1.9591, -1.4142, -6.1764, 0.7634)}


@pytest.mark.parametrize("eps", KNOWN)
def test_known_values_and_a_closed_form(eps):
    """The reference itself: known digits; and for two samples, d/√(d² + eps) with d = (x₀ − x₁)/2 + t."""
    np.testing.assert_allclose(batch_norm_derivatives((X,), (V,), W, eps, 4), KNOWN[eps], atol=5.1e-5)
    d, q = -0.25, math.sqrt(0.0625 + eps)
    two, along, first = np.array([[0.3], [0.8]]), np.array([[1.0], [-1.0]]), np.array([[1.0], [0.0]])
    found = batch_norm_derivatives((two,), (along,), first, eps, 3)
    want = [d / q, eps / q**3, -3 * eps * d / q**5, 3 * eps * (4 * d * d - eps) / q**7]
    np.testing.assert_allclose(found, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_the_whole_gradient_of_each_operand(wanted):
    """At orders 1, 3 and 5: the gradient by every element, fused and composed, of a directional derivative."""
    x, weight, bias = map(Tensor, (X, WEIGHT, BIAS))
    of = {"x": x, "weight": weight, "bias": bias}

    def along(p, orders):
        operands = {**of, wanted: p}

        def h(t):
            y = F.batch_norm(
                operands["x"] + t * V, weight=operands["weight"] + t * DW, bias=operands["bias"] + t * DB, training=True
            )  # fmt: skip
            return (y * W).sum()

        for _ in range(orders):
            h = grad(h)
        return h(Tensor(np.float64(0)))

    for orders in (0, 2, 4):
        found = grad(lambda p, orders=orders: along(p, orders))(of[wanted]).numpy()
        with composed():
            other = grad(lambda p, orders=orders: along(p, orders))(of[wanted]).numpy()
        np.testing.assert_allclose(found, other, rtol=1e-10, atol=1e-10 * np.abs(found).max())
        step = np.zeros_like(found)
        step.flat[1] = 1e-5
        both = [along(Tensor(of[wanted].numpy() + s * step), orders).item() for s in (1, -1)]
        assert found.flat[1] == pytest.approx((both[0] - both[1]) / 2e-5, rel=1e-6, abs=1e-6)
