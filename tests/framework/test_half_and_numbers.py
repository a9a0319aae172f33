"""Numbers beside arrays: the dtype of the result, half precision rounded once, products that do not overflow."""

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.framework.test_ops import BUILT_IN
from tinygrad_bn import Tensor, backend, composed, grad
from tinygrad_bn import functional as F
from tinygrad_bn.sample import RandomDraw
from tinygrad_bn.tensor import OPS

HALF = np.float16
LOSSES = [F.mse_loss, F.l1_loss, F.huber_loss, F.binary_cross_entropy_with_logits]


def half(*values: float, requires_grad: bool = False) -> Tensor:
    return Tensor(np.array(values, HALF), requires_grad=requires_grad)


# ---- one rule of promotion ------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("make", [np.asarray, Tensor])
def test_a_loss_keeps_the_dtype_beside_integer_targets(loss: Any, dtype: Any, make: Any) -> None:
    x, target = make(np.array([0.5, -2.0], dtype)), np.array([1, 0])
    assert loss(x, target).dtype == dtype
    assert loss(x, [1, 0]).dtype == dtype
    assert loss(x, target.astype(np.float64)).dtype == np.float64
    weights = {"weight": np.array([2, 3]), "pos_weight": np.array([1, 4])}
    assert F.binary_cross_entropy_with_logits(x, target, **weights).dtype == dtype


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div", "pow", "maximum", "minimum"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_scalar_of_numpy_beside_an_array_is_a_number(name: str, dtype: Any) -> None:
    x, op = np.array([0.3, 1.7], dtype), OPS[name].function
    for number in (np.float64(1.3), np.float32(1.3), np.int64(3)):
        for operands in ((x, number), (number, x)):
            got, expected = op(*operands), op(*[Tensor(o) if o is x else o for o in operands]).numpy()
            assert got.dtype == dtype
            assert np.array_equal(got, expected)


@pytest.mark.parametrize("f", [F.leaky_relu, F.elu])
def test_an_option_of_numpy_does_not_change_the_dtype(f: Any) -> None:
    x = np.array([-1.0, 2.0], np.float32)
    assert f(x, np.float64(0.2)).dtype == np.float32
    assert np.array_equal(f(x, np.float64(0.2)), f(Tensor(x), 0.2).numpy())


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("make", [np.asarray, Tensor])
def test_where_with_a_floating_condition_and_two_numbers(dtype: Any, make: Any) -> None:
    x = make(np.array([0.0, 2.0], dtype))
    assert F.where(x, 1.0, 0.5).dtype == dtype
    assert F.where(x > 0, 1.0, 0.5).dtype == np.float32  # as of integers and a float


def test_an_integer_that_the_dtype_cannot_hold_is_an_error() -> None:
    x, mask = Tensor(np.array([1, 2], np.int8)), np.array([True, False])
    for call in (lambda: F.where(mask, x, 200), lambda: F.where(mask, -129, x), lambda: x + 200, lambda: x * 200):
        with pytest.raises(OverflowError, match="int8"):
            call()
    assert F.where(mask, x, 127).numpy().tolist() == [1, 127]


# ---- half precision is rounded once ---------------------------------------------------------------------

NUMBERS = st.floats(-1e8, 1e8).filter(lambda n: abs(n) > 1e-9)
ELEMENTS = st.floats(-60000, 60000, width=16).filter(lambda n: n != 0)


@given(ELEMENTS, NUMBERS, st.sampled_from(["add", "sub", "mul", "div"]), st.booleans(), st.booleans())
def test_arithmetic_with_a_number_is_rounded_once(
    element: float, number: float, name: str, swapped: bool, kernels: bool
) -> None:
    x, op = half(element, requires_grad=True), OPS[name].function
    wide = Tensor(x.numpy().astype(np.float32), requires_grad=True)
    with nullcontext() if kernels else backend.kernels_disabled(), np.errstate(over="ignore", under="ignore"):
        y, expected = (op(number, t) if swapped else op(t, number) for t in (x, wide))
        assert y.dtype == HALF
        assert np.array_equal(y.numpy(), expected.numpy().astype(HALF))
        for create_graph in (False, True):
            slope = grad(op(number, x) if swapped else op(x, number), x, create_graph=create_graph).numpy()
            if name in ("add", "sub", "mul"):
                assert np.array_equal(slope, grad(expected, wide).numpy().astype(HALF))


def test_numbers_that_half_precision_cannot_hold() -> None:
    assert (half(1e-3) * 1e6).item() == 1000.5
    assert (half(60000) / 1e6).item() == pytest.approx(0.06, rel=1e-3)
    assert (1e6 / half(1000)).item() == 1000
    assert (half(1000, 2) ** 0.5).dtype == HALF
    assert (half(1e-3) * np.float64(1e6)).item() == 1000.5
    x = half(1e-3, requires_grad=True)
    ((x * 1e6) * 1e-6).sum().backward()
    assert x.grad is not None
    assert np.isfinite(x.grad.numpy()).all()


def test_a_comparison_rounds_the_number_unless_it_would_be_infinite() -> None:
    x = half(0.1, 65504, np.inf)
    assert (x == 0.1).numpy().tolist() == [True, False, False]
    assert (x == 1e6).numpy().tolist() == [False, False, False]
    assert (x < 65510).numpy().tolist() == [True, True, False]


ROUNDED = sorted(name for name in BUILT_IN if OPS[name].differentiable and name != "astype")


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("name", ROUNDED)
def test_every_op_rounds_half_precision_once(name: str, kernels: bool) -> None:
    op = OPS[name]
    for seed in range(12):
        operands, params = op.sample(RandomDraw(seed))
        given = [o.astype(HALF) if getattr(o, "dtype", None) == np.float64 else o for o in operands]
        wide = [o.astype(np.float64) if getattr(o, "dtype", None) == HALF else o for o in given]
        with nullcontext() if kernels else backend.kernels_disabled(), np.errstate(all="ignore"):
            got, want = np.asarray(op.function(*given, **params)), np.asarray(op.function(*wide, **params))
        if got.dtype == HALF:
            once = np.abs(want.astype(HALF) - want) + 0.02 * np.spacing(np.abs(want).astype(HALF)).astype(float)
            assert not (np.abs(got - want) > once).any()  # NaN and infinities are another test's


def test_functions_of_several_steps_are_rounded_once() -> None:
    x, rows = np.linspace(-12, 12, 500).astype(HALF), np.linspace(-12, 12, 500).reshape(20, 25).astype(HALF)
    for f in (F.sigmoid, F.softplus):
        assert np.array_equal(f(Tensor(x)).numpy(), f(x.astype(np.float32)).astype(HALF))
    for f in (F.softmax, F.log_softmax):
        assert np.array_equal(f(Tensor(rows)).numpy(), f(Tensor(rows.astype(np.float32))).numpy().astype(HALF))


X_NEAR_THE_LIMIT, X_SMALL = [[60000.0, 20000.0]], [[10.0, 0.003]]


@pytest.mark.parametrize(("x", "bias", "expected"), [(X_NEAR_THE_LIMIT, -30000.0, 50016.0), (X_SMALL, -10.0, 0.003)])
@pytest.mark.parametrize("route", [nullcontext, composed, backend.kernels_disabled])
def test_a_bias_is_added_before_the_sum_is_rounded(x: Any, bias: float, expected: float, route: Any) -> None:
    row, ones, b = np.array(x, HALF), np.ones((1, 2), HALF), np.array([bias], HALF)
    image, kernel = row.reshape(1, 2, 1, 1), ones.reshape(1, 2, 1, 1)
    with route():
        for y in (
            F.linear(row, ones, b),
            F.conv1d(image[..., 0], kernel[..., 0], b),
            F.conv2d(image, kernel, b),
            F.conv_transpose2d(image, kernel.reshape(2, 1, 1, 1), b),
        ):
            assert np.asarray(y).dtype == HALF
            assert float(np.asarray(y).item()) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("create_graph", [False, True])
def test_the_gradient_of_elu_with_a_large_alpha(create_graph: bool) -> None:
    x = half(-20, -1, requires_grad=True)
    slope = grad(F.elu(x, 1e4), x, half(100, 1), create_graph=create_graph).numpy()
    assert slope == pytest.approx(np.array([100e4 * np.exp(-20), 1e4 * np.exp(-1)]), rel=2e-3)


# ---- losses of half precision ---------------------------------------------------------------------------


@pytest.mark.parametrize("composed", [False, True])
def test_class_weights_beyond_half_precision(composed: bool) -> None:
    x, target, weight = half(0.0, 0.0).reshape(1, 2), np.array([1]), np.array([1.0, 1e6])
    with backend.kernels_disabled() if composed else nullcontext():
        assert F.cross_entropy(x, target, weight).item() == pytest.approx(np.log(2), rel=1e-3)
        assert F.nll_loss(F.log_softmax(x), target, weight).item() == pytest.approx(np.log(2), rel=1e-3)


def test_losses_of_half_precision_are_computed_in_float32() -> None:
    far = half(60000, 0)
    assert F.l1_loss(far, -far).item() == 60000
    assert F.huber_loss(half(2, 2), half(0, 0), delta=1e-3).item() == pytest.approx(2e-3, rel=1e-2)
    weighted = F.binary_cross_entropy_with_logits(half(-1e-3, 12), half(1, 1), np.array([0.0, 1.0]), 1e6)
    assert weighted.item() == pytest.approx(1e6 * np.log1p(np.exp(-12)) / 2, rel=1e-2)


# ---- products that overflow before a factor near 0 --------------------------------------------------------


@pytest.mark.parametrize("f", [OPS["erf"].function, OPS["erfc"].function, F.sigmoid])
@pytest.mark.parametrize(("dtype", "g"), [(np.float16, 6e4), (np.float32, 3.2e38), (np.float64, 1.7e308)])
def test_a_gradient_near_the_limit_of_the_dtype(f: Any, dtype: Any, g: float) -> None:
    x = Tensor(np.array([2.0, -30.0], dtype), requires_grad=True)
    for create_graph in (False, True):
        slope = grad(f(x), x, np.full(2, g, dtype), create_graph=create_graph).numpy()
        assert np.isfinite(slope).all()


@pytest.mark.parametrize("kernels", [False, True])
def test_rms_norm_of_squares_beyond_float64_is_the_composition(kernels: bool) -> None:
    x = Tensor(np.array([[1e160, -2e160, 3e160, 1e160]]), requires_grad=True)
    with nullcontext() if kernels else backend.kernels_disabled(), np.errstate(over="ignore"):
        assert not grad(F.rms_norm(x, 4), x, np.array([[1.0, 2.0, 3.0, 5.0]])).numpy().any()
