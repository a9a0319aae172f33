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
        (lambda: F.concatenate([Tensor([1.0])] * 2, axis=None), r"concatenate\(\): axis may not be None"),
        (lambda: F.var(Tensor([1.0, 2.0, 4.0]), correction=None), r"var\(\): correction may not be None"),
        (lambda: F.softmax(Tensor([1, 2])), "softmax takes floating-point input; got int64"),
        (lambda: F.softmax([1.0, 2.0]), "softmax takes a tensor or an array; got a list"),
        (lambda: F.mse_loss([1.0], [1.0]), "a loss takes a tensor or an array; got a list"),
        (lambda: F.conv2d([[[[1.0]]]], np.ones((1, 1, 1, 1))), "conv2d takes a tensor or an array; got a list"),
        (lambda: F.max_pool1d([[[1.0]]], 1), "pooling takes a tensor or an array; got a list"),
        (lambda: F.flatten(2.0), "flatten takes a tensor or an array; got a float"),
        (lambda: Tensor([1.0]) @ 2.0, r"matmul\(float32 \(1,\), 2.0\): matmul takes operands of at least one axis"),
        (lambda: F.clip(Tensor([1.0]), min="a"), r"clip\(\): min has to be a number; got 'a'"),
        (lambda: F.var(Tensor([1.0]), correction="a"), r"var\(\): correction has to be a number; got 'a'"),
        (lambda: F.elu(Tensor([1.0]), "a"), "alpha has to be a number; got 'a'"),
        (lambda: F.huber_loss(Tensor([1.0]), np.ones(1), delta="a"), "delta has to be a number"),
        (lambda: F.avg_pool2d(np.ones((1, 1, 2, 2)), 1, ceil_mode="no"), "ceil_mode has to be True or False"),
        (lambda: F.dropout(Tensor([1.0]), training="no"), "training has to be True or False"),
        (lambda: nn.BatchNorm1d(3, momentum=True), "momentum has to be a number; got True"),
        (lambda: F.mean("abc"), "mean takes tensors, arrays or numbers; got a str"),
        (lambda: F.linear(Tensor([[1.0]]), 2.0), r"linear\(.*\): takes tensors or arrays"),
        (lambda: nn.Linear(2, 3)(2.0), "Linear takes a tensor or an array; got a float"),
        (lambda: nn.BatchNorm1d(3, affine="no"), "affine has to be True or False; got 'no'"),
        (lambda: nn.BatchNorm1d(2.5), "num_features has to be an integer; got 2.5"),
        (lambda: nn.LeakyReLU("steep"), "negative_slope has to be a number; got 'steep'"),
    ],
)
def test_input_of_a_wrong_type_is_named(call, words):
    with pytest.raises((TypeError, ValueError), match=words):
        call()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: F.layer_norm(Tensor([[1.0, 2.0]]), ()), "normalized_shape is empty"),
        (lambda: nn.LayerNorm(()), "normalized_shape is empty"),
        (lambda: nn.RMSNorm(0), "normalized_shape has to be an integer of at least 1"),
        (lambda: F.flatten(Tensor([[1.0]]), 2), "no axis 2"),
        (lambda: F.flatten(Tensor([[1.0]]), -3), "no axis -3"),
        (lambda: nn.Conv2d(16, 32, 3, stride=2, padding="same"), "padding='same' needs stride 1"),
        (lambda: nn.Conv2d(16, 32, 3, padding="not_same"), "padding is 'same', 'valid', or in numbers"),
        (lambda: nn.Conv2d(16, 32, 3, padding=-1), "padding has to be an integer of at least 0"),
        (lambda: nn.Conv2d(16, 32, 3, dilation=0), "dilation has to be an integer"),
        (lambda: nn.ConvTranspose2d(1, 1, 3, output_padding=2), "output_padding"),
        (lambda: nn.MaxPool2d(2, padding=2), "more than half of the kernel"),
        (lambda: nn.AvgPool1d(0), "kernel_size has to be an integer"),
        (lambda: nn.AdaptiveAvgPool2d((1, 2, 3)), "output_size has to be an integer of at least 1, or 2 of them"),
        (lambda: F.softmax_cross_entropy(Tensor([[1.0, 2.0]]), np.array([0]), None, reduction="avg"), "reduction"),
        (lambda: F.softmax_cross_entropy(Tensor([[1.0, 2.0]]), np.array([0]), None, smoothing=-0.5), r"in \[0, 1\]"),
        (lambda: F.nll_loss(Tensor([[1.0, 2.0]]), np.array([0]), reduction=["mean"]), "reduction"),
        (lambda: F.batch_norm_training(Tensor([[1.0], [2.0]]), None, None, eps=-0.1), "eps has to be 0 or more"),
        (lambda: F.batch_norm_inference(Tensor([[1.0]]), *[np.ones(1)] * 2, None, None, eps=np.nan), "eps has to be"),
        (lambda: nn.BatchNorm1d(3, eps=np.inf), "eps has to be finite"),
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
