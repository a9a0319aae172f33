"""gradcheck itself: its error estimate, and the checks that it refuses."""

import numpy as np
import pytest

from tinygrad_bn import Tensor, functional, nn, testing
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
    assert "operand 0: gradient" in str(a)


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
    with pytest.raises(VacuousCheckError):  # a batch of one: the output is the bias, whatever x is
        gradcheck(lambda x: functional.batch_norm(x, training=True), x[:1])
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
