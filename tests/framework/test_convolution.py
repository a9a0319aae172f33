"""Convolution and pooling: shapes, layers, errors. Gradients of every order are tested for every op in test_ops.py."""

from contextlib import nullcontext

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tools.processes import output, python
from tinygrad_bn import Tensor, composed, grad, manual_seed, nn, optim
from tinygrad_bn import functional as F
from tinygrad_bn.backend import kernels_disabled
from tinygrad_bn.functional import convolution

X = np.random.default_rng(0).normal(size=(2, 4, 6, 5))
W = np.random.default_rng(1).normal(size=(6, 4, 3, 3))


def test_a_convolution_by_hand():
    x = np.arange(12.0).reshape(1, 1, 3, 4)
    weight = np.array([[[[1.0, 0.0], [0.0, -1.0]]]])
    np.testing.assert_array_equal(F.conv2d(x, weight), np.full((1, 1, 2, 3), -5.0))
    np.testing.assert_array_equal(F.conv2d(x, weight, np.array([5.0])), np.zeros((1, 1, 2, 3)))
    shifted = F.conv2d(x, np.ones((1, 1, 1, 1)), padding=((1, 0), (0, 2)))
    np.testing.assert_array_equal(shifted[0, 0], np.pad(x[0, 0], ((1, 0), (0, 2))))


def test_pooling_by_hand():
    x = np.array([[[[1.0, 2.0, 0.0], [4.0, 3.0, 9.0]]]])
    np.testing.assert_array_equal(F.max_pool2d(x, 2), [[[[4.0]]]])
    np.testing.assert_array_equal(F.max_pool2d(x, 2, ceil_mode=True), [[[[4.0, 9.0]]]])
    np.testing.assert_array_equal(F.avg_pool2d(x, (2, 1)), [[[[2.5, 2.5, 4.5]]]])
    np.testing.assert_array_equal(F.adaptive_avg_pool(x, 1), np.mean(x).reshape(1, 1, 1, 1))


def test_the_first_of_a_tie_gets_the_gradient_and_nan_wins():
    x = Tensor(np.ones((1, 1, 2, 2)), requires_grad=True)
    F.max_pool2d(x, 2).backward(np.ones((1, 1, 1, 1)))
    np.testing.assert_array_equal(x.grad.numpy()[0, 0], [[1, 0], [0, 0]])
    x = X.copy()
    x[0, 0, 1, 1] = np.nan
    assert np.isnan(F.max_pool2d(x, 2)[0, 0, 0, 0])
    x[:] = -np.inf
    assert (F.max_pool2d(x, 3, 1, 1) == -np.inf).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_dtype_is_kept(dtype):
    x, weight = Tensor(X, dtype=dtype, requires_grad=True), Tensor(W, dtype=dtype, requires_grad=True)
    y = F.max_pool2d(F.conv2d(x, weight, padding=1), 2)
    y.backward(np.ones(y.shape))
    assert y.dtype == x.grad.dtype == weight.grad.dtype == dtype
    np.testing.assert_allclose(
        y.numpy().astype(float), F.max_pool2d(F.conv2d(X, W, padding=1), 2), rtol=0.05, atol=0.05
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: F.conv2d(X[0], W), ValueError, "4 axes"),
        (lambda: F.conv2d(X, W[:, :3]), ValueError, "do not fit 1 groups"),
        (lambda: F.conv2d(X, W, np.ones(5)), ValueError, "6 output channels"),
        (lambda: F.conv2d(X, W, stride=0), ValueError, "stride has to be an integer of at least 1"),
        (lambda: F.conv2d(X, W, stride=1.0), ValueError, "stride has to be an integer of at least 1"),
        (lambda: F.conv2d(X, W, padding=1.5), ValueError, "padding has to be an integer of at least 0"),
        (lambda: F.conv2d(X, W, padding=None), ValueError, "padding has to be an integer of at least 0"),
        (lambda: F.conv2d(X, W, groups=1.0), TypeError, "groups has to be an integer"),
        (lambda: F.max_pool2d(X, 2.0), ValueError, "kernel_size has to be an integer of at least 1"),
        (lambda: F.conv2d(X, W, padding="full"), ValueError, "'same', 'valid'"),
        (lambda: F.conv2d(X, W, padding="same", stride=2), ValueError, "needs stride 1"),
        (lambda: F.conv2d(X, W, padding=((1, 1), (1, -1))), ValueError, "pair"),
        (lambda: F.conv2d(X, W, padding=((1, 0), 2)), ValueError, "pair"),
        (lambda: F.conv2d(X, W, padding=((1.5, 0), (0, 0))), ValueError, "pair"),
        (lambda: F.conv2d(X, W[:, :, :0]), ValueError, "at least one element"),
        (lambda: F.conv2d(X, W, dilation=3), ValueError, "does not fit"),
        (lambda: F.conv2d(X.astype(int), W), TypeError, "floating-point"),
        (lambda: F.conv_transpose2d(X, np.ones((3, 2, 2, 2))), ValueError, "do not fit"),
        (lambda: F.conv_transpose2d(X, np.ones((4, 2, 2, 2)), output_padding=1), ValueError, "smaller than stride"),
        (lambda: F.max_pool2d(X, 2, padding=2), ValueError, "more than half"),
        (lambda: F.avg_pool2d(X, 7), ValueError, "does not fit"),
        (lambda: F.max_pool1d(X, 2), ValueError, "3 axes"),
        (lambda: F.adaptive_avg_pool(X, 0), ValueError, "output_size"),
        (lambda: nn.Conv2d(3, 4, 3, groups=2), ValueError, "do not divide into 2 groups"),
        (lambda: nn.Conv2d(3, 4, (3, 3, 3)), ValueError, "kernel_size"),
        (lambda: nn.Conv2d(3, 4, 3)(X), ValueError, r"takes \(N, 3, H, W\)"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_small_network_learns_where_a_bright_pixel_is():
    manual_seed(0)
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, 64)
    x = rng.normal(size=(64, 1, 6, 6)).astype(np.float32) * 0.1
    x[np.arange(64), 0, 1 + 3 * (y // 2), 1 + 3 * (y % 2)] += 2
    layers = (
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(3),
        nn.Flatten(),
        nn.Linear(16, 4),
    )
    model = nn.Sequential(*layers)
    optimizer = optim.Adam(model.parameters(), lr=0.05)
    for _ in range(30):
        loss = F.cross_entropy(model(Tensor(x)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    assert "kernel_size=(3, 3), padding=1" in repr(model)


# ---- windows far outside the input -----------------------------------------------------------------------

FAR = [2**15, 2**20, 2**31, 2**32, 2**33, 2**40, 2**60]


@pytest.mark.parametrize("context", [nullcontext, composed, kernels_disabled])
@pytest.mark.parametrize("far", FAR)
def test_windows_far_outside_the_input_see_zeros(far, context):
    x = Tensor(np.arange(4.0**2).reshape(1, 1, 4, 4), requires_grad=True)
    weight = Tensor(np.ones((1, 1, 2, 2)), requires_grad=True)
    with context():
        y = F.conv2d(x, weight, np.array([0.5]), stride=far, padding=far)
        gx, gweight = grad(y.sum(), [x, weight], create_graph=True)
        (second,) = grad((gx * gx).sum(), [weight])
    want = np.full((3, 3), 0.5)
    want[1, 1] = 0 + 1 + 4 + 5 + 0.5
    np.testing.assert_array_equal(y.numpy()[0, 0], want)
    np.testing.assert_array_equal(gx.numpy()[0, 0], np.pad(np.ones((2, 2)), (0, 2)))
    np.testing.assert_array_equal(gweight.numpy()[0, 0], [[0, 1], [4, 5]])
    np.testing.assert_array_equal(second.numpy()[0, 0], np.full((2, 2), 2.0))


@pytest.mark.parametrize("context", [nullcontext, composed, kernels_disabled])
@pytest.mark.parametrize("far", FAR)
def test_a_transposed_convolution_whose_outputs_lie_far_apart(far, context):
    x = Tensor(np.arange(9.0).reshape(1, 1, 3, 3), requires_grad=True)
    weight = Tensor([[[[1.0, 2.0], [3.0, 4.0]]]], requires_grad=True, dtype=np.float64)
    with context():
        y = F.conv_transpose2d(x, weight, stride=far, padding=far)
        gx, gweight = grad(y.sum(), [x, weight], create_graph=True)
        (second,) = grad((gx * gx).sum(), [weight])
    np.testing.assert_array_equal(y.numpy()[0, 0], [[4, 8], [12, 16]])  # the element in the middle is 4
    np.testing.assert_array_equal(gx.numpy()[0, 0], np.pad([[10]], 1))
    np.testing.assert_array_equal(gweight.numpy()[0, 0], np.full((2, 2), 4))
    np.testing.assert_array_equal(second.numpy()[0, 0], np.full((2, 2), 20))


def test_far_windows_of_layers_and_other_ranks():
    far = 2**40
    x = Tensor(np.arange(1.0, 5, dtype=np.float32).reshape(1, 1, 4))
    assert F.conv1d(x, np.ones((1, 1, 2), np.float32), stride=far, padding=far).numpy().tolist() == [[[0, 3, 0]]]
    both = F.conv1d(x, np.array([[[1.0, 10.0]]], np.float32), stride=far, padding=far, dilation=far)
    assert both.numpy().tolist() == [[[10, 1]]]
    cube = Tensor(np.ones((1, 1, 2, 2, 2), np.float16))
    y = F.conv3d(cube, np.ones((1, 1, 2, 2, 2), np.float16), stride=far, padding=far)
    assert (y.dtype, y.numpy().sum(), y.numpy()[0, 0, 1, 1, 1]) == (np.float16, 8, 8)
    layer = nn.Conv2d(1, 2, 2, stride=far, padding=far)
    layer(np.ones((3, 1, 4, 4), np.float32)).sum().backward()
    assert layer.bias.grad.numpy().tolist() == [27, 27]
    infinite = F.conv1d(x, np.array([[[np.inf, 1.0]]], np.float32), stride=far, padding=far)
    assert np.isnan(infinite.numpy()[0, 0, [0, 2]]).all()  # 0 · ∞, as near the input


def test_far_windows_do_not_end_the_process():
    """They once did: a process of its own, so that a return of the fault fails one test."""
    program = """if True:
        import numpy as np
        from tinygrad_bn import functional as F
        for dtype in (np.float32, np.float64):
            x, w = np.ones((1, 1, 4, 4), dtype), np.ones((1, 1, 2, 2), dtype)
            for far in (2**31, 2**32, 2**33, 2**40, 2**60):
                assert F.conv2d(x, w, stride=far, padding=far).sum() == 4
                assert F.conv_transpose2d(x[..., :3, :3], w, stride=far, padding=far).sum() == 4
        print("all there")
    """
    assert output(python(program)) == "all there"


@st.composite
def convolutions(draw):
    """Sizes and options of any convolution of one to three axes with small numbers."""
    ndim = draw(st.integers(1, 3))
    each = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(ndim))  # noqa: E731
    return (
        each(1, 5),
        each(1, 3),
        draw(st.integers(1, 2)),
        each(1, 5),
        tuple(zip(each(0, 8), each(0, 8), strict=True)),
        each(1, 5),
    )


@given(convolutions(), st.integers(0, 99))
def test_distant_windows_are_those_of_the_padded_input(geometry, seed):
    """The route that never writes the padding down gives the values and gradients of the one that does."""
    size, kernel, groups, stride, padding, dilation = geometry
    rng, ndim = np.random.default_rng(seed), len(size)
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[ndim]
    shapes = (2, 2 * groups, *size), (3 * groups, 2, *kernel), (3 * groups,)
    leaves = [Tensor(rng.normal(size=shape), requires_grad=True) for shape in shapes]
    results = []
    for distant in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(convolution, "NEAR", -1)
            patch.setattr(convolution, "_is_distant", lambda *_, is_it=distant: is_it)
            try:
                y = function(*leaves, stride, padding, dilation, groups)
            except ValueError:  # it does not fit
                return
            first = grad(y, leaves, Tensor(np.sin(np.arange(y.size)).reshape(y.shape)), create_graph=True)
            second = grad((first[0] ** 2).sum() + (first[1] ** 2).sum(), leaves[:2])
            results.append([y, *first, *second])
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-10, atol=1e-10)
