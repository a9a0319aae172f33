"""Input that makes no sense is an error that names it."""

from contextlib import nullcontext

import numpy as np
import pytest

from tinygrad_bn import Tensor, composed, nn, primitive
from tinygrad_bn import functional as F
from tinygrad_bn.backend import kernels_disabled
from tinygrad_bn.sample import REAL, elementwise

ROUTES = {"kernels": nullcontext, "reference": kernels_disabled, "composed": composed}


@pytest.mark.parametrize(
    "call",
    [
        lambda: nn.GroupNorm(10, 10)(np.ones((1, 10, 1))),
        lambda: F.group_norm(np.ones((1, 10, 1)), 10),
        lambda: F.instance_norm(np.ones((2, 10, 1))),
        lambda: F.batch_norm(np.ones((1, 10)), training=True),
        lambda: F.batch_norm(np.ones((1, 10, 1, 1))),
        lambda: F.batch_norm_steps(Tensor(np.ones((1, 3)))),
        lambda: F.batch_norm_training(Tensor(np.ones((1, 3))), None, None, eps=1e-5),
        lambda: F.batch_norm_relu(np.ones((1, 3, 1), np.float32), None, None, eps=1e-5),
        lambda: nn.InstanceNorm1d(3)(np.ones((2, 3, 1))),
        lambda: nn.BatchNorm1d(3)(np.ones((1, 3))),
    ],
)
def test_one_value_cannot_be_normalised(call):
    for route in ROUTES.values():
        with route(), pytest.raises(ValueError, match="more than one value per"):
            call()


@pytest.mark.parametrize("dtype", [object, complex, str, "M8[s]"])
def test_tensors_hold_real_numbers(dtype):
    with pytest.raises(TypeError, match="real numbers"):
        Tensor([1.0]).astype(dtype)
    with pytest.raises(TypeError, match="floating-point"):
        nn.Linear(2, 3).astype(int)
    with pytest.raises(TypeError, match=r"exp takes real numbers"):
        F.exp(np.array([1], object))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: F.layer_norm(Tensor([[1.0, 2.0]]), ()), "normalized_shape is empty"),
        (lambda: F.flatten(Tensor([[1.0]]), 2), "no axis 2"),
        (lambda: F.flatten(Tensor([[1.0]]), -3), "no axis -3"),
        (lambda: F.softmax_cross_entropy(Tensor([[1.0, 2.0]]), np.array([0]), None, reduction="avg"), "reduction"),
        (lambda: F.softmax_cross_entropy(Tensor([[1.0, 2.0]]), np.array([0]), None, smoothing=-0.5), r"in \[0, 1\]"),
        (lambda: F.nll_loss(Tensor([[1.0, 2.0]]), np.array([0]), reduction=["mean"]), "reduction"),
        (lambda: F.batch_norm_training(Tensor([[1.0], [2.0]]), None, None, eps=-0.1), "eps has to be 0 or more"),
        (lambda: F.batch_norm_inference(Tensor([[1.0]]), *[np.ones(1)] * 2, None, None, eps=np.nan), "eps has to be"),
    ],
)  # fmt: skip
def test_options_out_of_range_are_named(call, words):
    for route in ROUTES.values():
        with route(), pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize(
    ("data", "dtype"),
    [([300], np.uint8), ([-1], np.uint8), ([1000], np.int8), ([np.nan], np.int64), ([1e30], np.int32)],
)
def test_data_that_a_dtype_cannot_hold_are_refused(data, dtype):
    with pytest.raises((OverflowError, ValueError)):
        Tensor(data, dtype=dtype)


def test_integers_beyond_int64_that_a_dtype_holds():
    assert Tensor([2**64, -1], dtype=np.float64).numpy().tolist() == [2.0**64, -1.0]
    assert Tensor([2**63 + 1, 1], dtype=np.uint64).numpy().tolist() == [2**63 + 1, 1]
    for data in ([2**64], [None, 1.0], ["1"]):
        with pytest.raises(TypeError, match="real numbers"):
            Tensor(data, dtype=None if data == [2**64] else np.float64)


def test_the_error_of_a_users_op_is_not_its_own_cause():
    @primitive(lambda g, y, x: g, formula="y = x", sample=elementwise(REAL))
    def failing_op(x):
        return {}["missing"]

    with pytest.raises(KeyError) as raised:
        failing_op(Tensor([1.0]))
    assert raised.value.__cause__ is None
