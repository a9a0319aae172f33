"""Operators of ONNX one by one: their gradients, and what the node tests do not show."""

import inspect

import numpy as np
import pytest

from tinygrad_bn import Tensor
from tinygrad_bn.onnx.operators import OPERATORS
from tinygrad_bn.testing import gradcheck

POSITIVE, WIDE = np.array([[0.3, 1.7, 2.2], [0.9, 0.4, 3.1]]), np.array([[-1.6, 0.3, 2.2], [0.9, -0.7, 3.1]])
PLANES = np.random.default_rng(0).permutation(72).reshape(2, 2, 3, 6) / 20.0
# Operators of floating-point numbers, with operands and attributes.
SMOOTH = {
    **{
        name: ([WIDE], {})
        for name in (
            "Abs",
            "Exp",
            "Neg",
            "Erf",
            "Sigmoid",
            "Softplus",
            "Tanh",
            "Relu",
            "LeakyRelu",
            "Elu",
            "Celu",
            "Selu",
            "ThresholdedRelu",
            "HardSigmoid",
            "HardSwish",
            "Softsign",
            "Mish",
            "Swish",
            "Gelu",
            "Identity",
            "Softmax",
            "LogSoftmax",
            "Flatten",
            "Transpose",
            "LpNormalization",
            "Shrink",
        )
    },
    **{name: ([POSITIVE], {}) for name in ("Log", "Sqrt", "Reciprocal")},
    **{
        name: ([WIDE, WIDE[:1] + 0.05], {})
        for name in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean", "PRelu")
    },
    **{
        name: ([WIDE], {"axes": [1]})
        for name in (
            "ReduceSum",
            "ReduceMean",
            "ReduceMax",
            "ReduceMin",
            "ReduceL1",
            "ReduceL2",
            "ReduceSumSquare",
            "ReduceLogSumExp",
        )
    },
    "ReduceLogSum": ([POSITIVE], {"axes": [1]}),
    "Pow": ([POSITIVE, np.array(1.3)], {}),
    "Clip": ([WIDE, np.array(-0.5), np.array(2.0)], {}),
    "Mod": ([POSITIVE, np.array(0.7)], {"fmod": 1}),
    "MatMul": ([WIDE, WIDE.T], {}),
    "Gemm": ([WIDE, WIDE, np.ones((1, 2))], {"transB": 1, "alpha": 0.5, "beta": 2.0}),
    "Conv": ([PLANES, PLANES[:1, :, :2, :2], np.ones(1)], {"pads": [1, 0, 0, 1], "strides": [2, 1]}),
    "ConvTranspose": ([PLANES, PLANES[:, :1, :2, :2], np.ones(1)], {"strides": [2, 2], "output_padding": [1, 0]}),
    "MaxPool": ([PLANES], {"kernel_shape": [2, 2], "ceil_mode": 1}),
    "AveragePool": ([PLANES], {"kernel_shape": [2, 2], "pads": [1, 1, 0, 0]}),
    "LpPool": ([PLANES + 0.1], {"kernel_shape": [2, 2]}),
    **{
        name: ([PLANES + 0.1], {})
        for name in ("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool", "MeanVarianceNormalization")
    },
    "LRN": ([PLANES], {"size": 3}),
    "BatchNormalization": ([PLANES, WIDE[0, :2], WIDE[1, :2], POSITIVE[0, :2], POSITIVE[1, :2]], {}),
    "InstanceNormalization": ([PLANES, WIDE[0, :2], WIDE[1, :2]], {}),
    "LayerNormalization": ([WIDE, WIDE[0], WIDE[1]], {}),
    "RMSNormalization": ([WIDE, WIDE[0]], {}),
    "GroupNormalization": ([PLANES, WIDE[0, :2], WIDE[1, :2]], {"num_groups": 1}),
    "Concat": ([WIDE, WIDE[:1]], {"axis": 0}),
    "Slice": ([WIDE], {"starts": [2], "ends": [-4], "axes": [1], "steps": [-1]}),
    "Split": ([WIDE], {"axis": 1, "split": [1, 2]}),
    "Pad": ([WIDE], {"pads": [1, -1, 0, 2]}),
    "Squeeze": ([WIDE[:, None]], {"axes": [1]}),
    "Unsqueeze": ([WIDE], {"axes": [0, -1]}),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_of_an_operator(name):
    operands, attributes = SMOOTH[name]
    function = OPERATORS[name]
    given = {"opset": 21, "outputs": len(attributes.get("split", [0])), "training": False}
    extra = {key: given[key] for key in inspect.signature(function).parameters.keys() & given.keys()}

    def compute(*xs):
        y = function(*xs, **attributes, **extra)
        return y[0] if isinstance(y, tuple) else y

    gradcheck(compute, *operands)


def test_every_operator_of_floating_numbers_has_its_gradient_checked():
    """But for those that only move elements by integers, or have no derivative."""
    others = {
        "And",
        "ArgMax",
        "ArgMin",
        "BitwiseAnd",
        "BitwiseNot",
        "BitwiseOr",
        "BitwiseXor",
        "Cast",
        "CastLike",
        "Ceil",
        "Constant",
        "ConstantOfShape",
        "Dropout",
        "Equal",
        "Expand",
        "Floor",
        "Gather",
        "GatherElements",
        "GatherND",
        "Greater",
        "GreaterOrEqual",
        "Hardmax",
        "IsInf",
        "IsNaN",
        "Less",
        "LessOrEqual",
        "NegativeLogLikelihoodLoss",
        "Not",
        "Or",
        "Range",
        "Reshape",
        "Round",
        "Shape",
        "Sign",
        "Size",
        "SoftmaxCrossEntropyLoss",
        "Tile",
        "Where",
        "Xor",
    }
    assert OPERATORS.keys() - SMOOTH.keys() == others


def test_the_mask_of_dropout_is_that_of_what_was_kept():
    x = np.maximum(np.random.default_rng(0).normal(size=10_000), 0)
    y, mask = OPERATORS["Dropout"](Tensor(x), np.float64(0.1), training=True, outputs=2)
    mask = np.asarray(mask)
    assert abs(mask.mean() - 0.9) < 0.02
    np.testing.assert_allclose(y.numpy(), x * mask / 0.9)


@pytest.mark.parametrize("dtype", [np.int8, np.int64])
def test_integers_are_divided_as_in_c(dtype):
    least = np.iinfo(dtype).min
    a, b = np.array([least, -7, 7, 7, -7, least], dtype), np.array([2, 2, 2, -2, -2, -3], dtype)
    want = [int(x) // int(y) if int(x) * int(y) > 0 else -(-int(x) // int(y)) for x, y in zip(a, b, strict=True)]
    assert OPERATORS["Div"](a, b).tolist() == want
