"""Wrong numbers that other suites and fuzzing found: the smallest input, and the right value."""

import warnings

import numpy as np
import pytest

from tinygrad_bn import Tensor, grad, nn, optim
from tinygrad_bn import functional as F


@pytest.mark.parametrize("value", [np.ones(3), Tensor(np.ones(3)), "2 x", nn.Buffer(np.ones(3)), 1.0])
def test_a_parameter_is_not_replaced_by_anything_else(value):
    layer = nn.BatchNorm1d(3)
    value = layer.weight * 2 if isinstance(value, str) else value
    with pytest.raises(TypeError, match=r"BatchNorm1d.weight is a Parameter; assign a Parameter or None, or .*\.data"):
        layer.weight = value
    with pytest.raises(TypeError, match=r"BatchNorm1d\.running_mean is a Buffer"):
        layer.running_mean = np.ones(3)
    layer.weight = nn.Parameter(np.full(3, 2.0, np.float32))
    assert layer(np.eye(3)).shape == (3, 3)
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    layer.weight = None
    assert list(layer.state_dict()) == ["bias", "running_mean", "running_var", "num_batches_tracked"]


def test_rms_norm_of_half_precision_takes_the_eps_of_float32():
    x = np.array([0.01, -0.02, 0.03, 0.01])
    y = F.rms_norm(Tensor(x, dtype=np.float16), 4)
    np.testing.assert_allclose(y.numpy(), [0.516, -1.033, 1.549, 0.516], rtol=2e-3)


def test_losses_of_half_precision_are_counted_wider():
    scores = np.full((1, 2, 256, 256), np.log(0.5), np.float16)
    target = np.zeros((1, 256, 256), np.int64)
    assert F.nll_loss(Tensor(scores), target).item() == pytest.approx(0.693, abs=1e-3)
    x = Tensor(np.zeros((1, 2, 256, 256), np.float16), requires_grad=True)
    plain, differentiable = (grad(F.cross_entropy(x, target), x, create_graph=c).numpy() for c in (False, True))
    np.testing.assert_array_equal(plain, differentiable)
    assert (plain != 0).all()


@pytest.mark.parametrize(
    ("x", "dtype", "want"),
    [([0, 600], "f2", 300), ([0, 1e-4], "f2", 5e-5), ([0, 1e20], "f4", 5e19), ([0, 1e-25], "f4", 5e-26)],
)
def test_the_root_of_a_variance_is_taken_before_rounding(x, dtype, want):
    assert F.std(Tensor(np.array(x, dtype))).item() == pytest.approx(want, rel=2e-3)


def test_centred_rmsprop_stays_finite_under_a_constant_gradient():
    p = nn.Parameter(np.zeros(1, np.float32))
    optimizer = optim.RMSprop([p], centered=True)
    for _ in range(1500):
        p.grad = Tensor(np.full(1, 0.1, np.float32))
        optimizer.step()
    assert np.isfinite(p.numpy()).all()


@pytest.mark.parametrize("stride", [5, 2**20, 2**31, 2**40])
def test_one_window_needs_no_stride(stride):
    x = Tensor(np.arange(16.0).reshape(1, 1, 4, 4), requires_grad=True)
    weight = Tensor(np.ones((1, 1, 2, 2)), requires_grad=True)
    y = F.conv2d(x, weight, stride=stride)
    y.sum().backward()
    assert y.numpy().tolist() == [[[[10]]]]
    assert weight.grad.numpy().reshape(-1).tolist() == [0, 1, 4, 5]
    back = F.conv_transpose2d(Tensor(np.full((1, 1, 1, 1), 2.0)), weight, stride=stride)
    assert back.numpy().reshape(-1).tolist() == [2] * 4
    assert F.conv1d(Tensor(np.ones((1, 1, 3))), np.ones((1, 1, 2)), stride=stride).item() == 2


def test_a_mean_of_integers_does_not_overflow():
    assert F.mean(Tensor(np.full(10, 17 * 10**17))).item() == pytest.approx(1.7e18)


def test_the_huber_loss_is_smooth_at_its_target():
    x = Tensor(np.array([0.0, 0.5, 3.0]), requires_grad=True)
    dx = grad(F.huber_loss(x, np.zeros(3), reduction="sum"), x, create_graph=True)
    assert dx.numpy().tolist() == [0, 0.5, 1]
    assert grad(dx.sum(), x).numpy().tolist() == [1, 1, 0]


def test_clipping_half_precision_does_not_round_the_factor():
    p = nn.Parameter(np.zeros(2, np.float16), dtype=np.float16)
    p.grad = Tensor(np.full(2, 60000, np.float16))
    optim.clip_grad_norm_([p], 0.001)
    assert np.linalg.norm(p.grad.numpy().astype(float)) == pytest.approx(0.001, rel=2e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_dampening_that_is_not_finite_is_refused(value):
    with pytest.raises(ValueError, match="dampening has to be finite"):
        optim.SGD([nn.Parameter([1.0])], momentum=0.9, dampening=value)


@pytest.mark.parametrize("shape", [(3, 5), (20, 90), (2, 3, 5)])
def test_no_product_warns_of_a_flag_that_some_processors_raise(shape):
    """BLAS pads vectors with 0, and 0 · inf raises the invalid flag; here a product raises it on every processor."""
    a = np.full(shape, np.inf)
    b = np.zeros((shape[-1], 40))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(F.matmul(a, b)).all()
        assert np.isnan(F.linear(a, b.T, np.zeros(40))).all()
        assert np.isnan(F.linear(a, b.T)).all()
