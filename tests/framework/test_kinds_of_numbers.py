"""Operands of several dtypes, and numbers and sizes of any type of Python and NumPy."""

from contextlib import nullcontext

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_bn import Tensor, composed, nn, optim
from tinygrad_bn import functional as F
from tinygrad_bn.backend import kernels_disabled
from tinygrad_bn.datasets import Batches

ROUTES = {"kernels": nullcontext, "reference": kernels_disabled, "composed": composed}


def leaf(x, dtype=None):
    return Tensor(np.array(x, dtype), requires_grad=True)


# ---- promotion ------------------------------------------------------------------------------------------

FLOATS, INTEGERS = [np.float16, np.float32, np.float64], [np.bool_, np.int8, np.uint8, np.int16, np.int32, np.int64]


@pytest.mark.parametrize("function", [F.add, F.mul, F.div, F.maximum])
@given(dtype=st.sampled_from(FLOATS), integer=st.sampled_from(INTEGERS), swap=st.booleans())
def test_integers_do_not_widen_a_floating_point_operand(function, dtype, integer, swap):
    operands = [Tensor(np.array([1.5, 2.0], dtype)), Tensor(np.array([1, 1], integer))]
    for route in ROUTES.values():
        with route():
            assert function(*(operands[::-1] if swap else operands)).dtype == dtype


@pytest.mark.parametrize("integer", INTEGERS)
@pytest.mark.parametrize("route", ROUTES)
def test_integers_alone_become_float32(integer, route):
    n = Tensor(np.array([1, 1], integer))
    with ROUTES[route]():
        results = [n / 2, n / n, n * 0.5, F.where(n > 0, 1.0, 0.0)]
        results += [function(n) for function in (F.exp, F.sqrt, F.mean, F.var, F.std, F.silu)]
        assert {y.dtype for y in results} == {np.dtype(np.float32)}
        for function, want in {F.exp: np.e, F.sigmoid: 0.7310586, F.softplus: 1.3132617, F.gelu: 0.8413447}.items():
            np.testing.assert_allclose(function(n).numpy(), want, rtol=1e-6)
        assert (n + n).dtype == np.add(n.numpy(), n.numpy()).dtype


def test_losses_and_masks_keep_float32():
    x, n = leaf([0.5, -1.0], np.float32), np.array([1, 0])
    losses = [F.mse_loss(x, n), F.l1_loss(x, n), F.huber_loss(x, n), F.binary_cross_entropy_with_logits(x, n)]
    assert {y.dtype for y in (*losses, x * F.where(x > 0, 1.0, 0.0))} == {np.dtype(np.float32)}


def test_a_float64_operand_widens_and_numbers_do_not():
    x = Tensor(np.float32([1.0]))
    assert (x * np.array([2.0])).dtype == np.float64
    assert (x * 2.0).dtype == (x * np.float64(2)).dtype == (2 / x).dtype == np.float32
    assert isinstance(F.exp(1.0), np.float64)


# ---- numbers and sizes ----------------------------------------------------------------------------------


def test_a_scalar_of_numpy_leaves_the_dtype_of_a_loss():
    x, target = np.zeros(3, np.float32), np.ones(3, np.float32)
    for option in ("weight", "pos_weight"):
        loss = F.binary_cross_entropy_with_logits(x, target, **{option: np.float64(2)})
        assert loss.dtype == np.float32


class Whole(int):
    pass


class Real(float):
    pass


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("made", [np.asarray, Tensor], ids=["arrays", "tensors"])
def test_subclasses_of_numbers_are_numbers(made, dtype):
    x = made(np.array([1.5, -2.0], dtype))
    calls = {
        "mul": lambda n: F.mul(x, n), "reflected": lambda n: F.mul(n, x), "add": lambda n: F.add(x, n),
        "pow": lambda n: F.pow(F.abs(x), n), "maximum": lambda n: F.maximum(x, n), "clip": lambda n: F.clip(x, min=n),
        "leaky_relu": lambda n: F.leaky_relu(x, n), "elu": lambda n: F.elu(x, n),
        "where": lambda n: F.where(x > 0, x, n),
    }  # fmt: skip
    for name, call in calls.items():
        for own, plain in ((Whole(2), 2), (Real(2.0), 2.0), (np.float16(2), 2.0), (np.int8(2), 2)):
            result, want = call(own), call(plain)
            assert result.dtype == want.dtype == dtype, name
            assert np.array_equal(np.asarray(result), np.asarray(want)), name


def test_options_of_small_dtypes_are_not_computed_with_in_them():
    def trained(convert):
        p = nn.Parameter(np.ones(3, np.float32))
        optimizer = optim.AdamW([p], lr=convert(0.01), weight_decay=convert(0.1), betas=(convert(0.5), convert(0.75)))
        schedule = optim.StepLR(optimizer, 1, gamma=convert(0.3))
        for _ in range(15):
            p.grad = Tensor(np.float32([6000, 8000, 1]))
            optim.clip_grad_norm_([p], convert(0.1))
            optimizer.step()
            schedule.step()
        return p.numpy(), optimizer.param_groups[0]["lr"]

    half, wide = trained(np.float16), trained(lambda v: float(np.float16(v)))
    np.testing.assert_array_equal(half[0], wide[0])
    assert half[1] == wide[1] > 0


def test_a_size_may_be_a_small_integer_of_numpy():
    x = np.random.default_rng(0).normal(size=(2, 300, 4)).astype(np.float32)
    assert np.array_equal(F.group_norm(x, np.int8(4)), F.group_norm(x, 4))
    assert nn.GroupNorm(np.int8(100), 300)(x).shape == x.shape
    assert len(Batches(x, x, batch_size=np.int8(2))) == 1
    assert len(Batches(np.arange(800), np.arange(800), batch_size=np.int8(100))) == 8


def test_a_size_may_stand_in_an_array_without_axes():
    x = np.random.default_rng(0).normal(size=(2, 4, 6, 6)).astype(np.float32)
    w = np.ones((2, 4, 3, 3), np.float32)
    two = np.array(2)
    assert np.array_equal(F.conv2d(x, w, stride=two, padding=two), F.conv2d(x, w, stride=2, padding=2))
    assert np.array_equal(F.max_pool2d(x, two), F.max_pool2d(x, 2))
    assert nn.LayerNorm(np.array(6)).weight.shape == (6,)
    assert nn.Conv1d(200, 200, 1, groups=np.int8(100)).weight.shape == (200, 2, 1)
    assert nn.Dropout(np.array(0.5)).p == 0.5
