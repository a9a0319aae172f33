"""Calls that cannot be right are refused, with an error that names the op, the operand or the option."""

import copy

import numpy as np
import pytest

from tinygrad_bn import Tensor, composed, nn
from tinygrad_bn import functional as F
from tinygrad_bn.ops import reshape
from tinygrad_bn.tensor import OPS

NO_NUMBERS = {
    "object": np.array([object()]), "complex": np.array([1j]), "text": np.array(["a"]),
    "date": np.array(["2020-01-01"], "M8[D]"), "duration": np.array([3], "m8[D]"),
}  # fmt: skip
ONE = np.ones(1)
CALLS = {
    "first": lambda v: F.add(v, ONE),
    "second": lambda v: F.add(ONE, v),
    "after a number": lambda v: F.mul(2, v),
    "unary": F.relu,
    "reduction": F.sum,
    "composition": F.mean,
    "comparison": lambda v: F.equal(ONE, v),
    "chosen": lambda v: F.where(np.array([True]), ONE, v),
    "joined": lambda v: F.concatenate([ONE, v]),
    "index": F.argmax,
    "shape": lambda v: reshape(v, shape=(1, 1)),
    "product": lambda v: F.matmul(np.ones((1, 1)), v.reshape(1, 1)),
    "softmax": lambda v: F.softmax(v, 0),
    "target": lambda v: F.mse_loss(ONE, v),
    "with a tensor": lambda v: Tensor([1.0]) + v,
    "module": lambda v: nn.Linear(1, 1)(v.reshape(1, 1)),
}


@pytest.mark.parametrize("kind", NO_NUMBERS)
@pytest.mark.parametrize("call", CALLS)
def test_arrays_that_hold_no_real_numbers(call, kind):
    with pytest.raises(TypeError, match="real numbers"):
        CALLS[call](NO_NUMBERS[kind])


X = Tensor(np.ones((2, 3, 4), np.float32))
IMAGE, WEIGHT = np.ones((1, 1, 4, 4), np.float32), np.ones((1, 1, 2, 2), np.float32)
BN = nn.BatchNorm1d
REFUSED = [
    (lambda: F.pad(np.ones(3, int), width=((1, 1),), value=0.5), ValueError, r"pad\(int64.*cannot hold the value"),
    (lambda: F.pad(Tensor([1, 2]), width=((1, 1),), value=np.nan), ValueError, r"pad\(int64"),
    (lambda: F.pad(Tensor([1], dtype=np.int8), width=((1, 1),), value=300), OverflowError, r"pad\(int8"),
    (lambda: F.pad(Tensor([True]), width=((1, 1),), value=2), ValueError, "x bool cannot hold"),
    *[
        (lambda f=f, c=c: f(X, correction=c), (ValueError, TypeError), "correction has to be")
        for f in (F.var, F.std, F.mean_and_var)
        for c in (np.nan, np.inf, -np.inf, True)
    ],
    *[
        (lambda f=f, k=k: f(X, axis=0, keepdims=k), TypeError, "keepdims has to be True or False; got")
        for f in (F.sum, F.max, F.var, F.logsumexp, F.argmax)
        for k in (2, 0, 1.0, [])
    ],
    (lambda: F.flatten(X, True), TypeError, "start_axis has to be an integer; got True"),
    (lambda: F.flatten(X, 0.5), TypeError, "start_axis has to be an integer; got 0.5"),
    (lambda: nn.Softmax(True), TypeError, "axis has to be an integer"),
    (lambda: F.cross_entropy(X, np.ones((2, 4), int), ignore_index=True), TypeError, "ignore_index has to be an int"),
    (lambda: F.conv2d(IMAGE, WEIGHT, padding=2**23), MemoryError, r"conv\(float32 \(1, 1, 4, 4\).*padding=\(\(8388608"),
    (lambda: F.conv2d(IMAGE, WEIGHT, padding=2**40), MemoryError, r"output of conv2d would have the shape \(1, 1, 21"),
    (lambda: F.conv2d(IMAGE, WEIGHT, padding=2**62), ValueError, r"padding may be at most 2\*\*60; got 4611"),
    (lambda: F.conv2d(IMAGE, WEIGHT, dilation=2**70), ValueError, r"dilation may be at most 2\*\*60; got 1180"),
    (lambda: F.conv2d(IMAGE, WEIGHT, padding=((0, 2**70), (0, 0))), ValueError, r"padding .*may be at most 2\*\*60"),
    (lambda: F.conv2d(IMAGE, WEIGHT, padding=((0, True), (0, 0))), ValueError, "padding .*has to be an integer"),
    (lambda: F.conv_transpose2d(IMAGE, WEIGHT, stride=2**40), MemoryError, r"conv_transpose2d would have the shape"),
    (
        lambda: OPS["conv"].function(
            IMAGE, WEIGHT, stride=(2**32,) * 2, padding=((2**32, 2**32),) * 2, dilation=(1, 1), groups=1
        ),
        (MemoryError, ValueError),
        r"^conv\(float32",
    ),
    (lambda: F.conv_transpose2d(IMAGE, WEIGHT, stride=2**23), MemoryError, r"conv_input\(float32.*stride=\(8388608"),
    (lambda: F.pad(IMAGE, width=((2**44, 0), *[(0, 0)] * 3)), MemoryError, r"pad\(float32.*width=\(\(17592186044416"),
    (lambda: BN.keras(3, momentum=None), TypeError, "momentum has to be a number; got None"),
    (lambda: BN.onnx(3, momentum="a"), TypeError, "momentum has to be a number; got 'a'"),
    (lambda: BN.keras(3, momentum=2.0), ValueError, r"momentum has to be in \[0, 1\]; got 2.0"),
    (lambda: F.batch_norm_training(np.ones((2, 2)), None, None, eps="a"), TypeError, "eps has to be a number; got 'a'"),
    (lambda: F.batch_norm_training(np.ones((2, 2)), None, None, eps=None), TypeError, "eps may not be None"),
    (lambda: F.batch_norm_relu(np.ones((2, 2)), None, None, eps=-1.0), ValueError, "eps has to be 0 or more; got -1"),
    (lambda: F.batch_norm_relu(np.ones((2, 2)), None, None, eps=True), TypeError, "eps has to be a number; got True"),
    *[
        (lambda t=t: F.softmax_cross_entropy(np.ones((2, 2)), np.array(t), None), TypeError, "targets are class ind")
        for t in ([0.0, 1.0], [True, False])
    ],
    *[
        (lambda o=o: F.softmax_cross_entropy(np.ones((2, 2)), np.array([0, 1]), None, **o), error, next(iter(o)))
        for o, error in (
            ({"smoothing": True}, TypeError),
            ({"smoothing": 1.5}, ValueError),
            ({"ignore_index": 1.5}, TypeError),
            ({"ignore_index": True}, TypeError),
            ({"ignore_index": 2**70}, ValueError),
            ({"reduction": "avg"}, ValueError),
        )
    ],
    (lambda: F.batch_norm_inference(*[np.ones((2, 1)), ONE, ONE, None, None], eps="a"), TypeError, "eps has to be a"),
    *[
        (lambda f=f, a=a: f(X, axis=a), (IndexError, TypeError), rf"^{f.__name__}\(\): {words}")
        for f in (F.softmax, F.log_softmax)
        for a, words in ((5, r"x \(2, 3, 4\) has no axis 5"), (1.5, "axis is an integer"), (True, "axis is an integer"))
    ],
    (lambda: F.mul(ONE, None), TypeError, "an operand is None"),
    (lambda: F.exp(None), TypeError, r"exp\(None\): an operand is None"),
    *[
        (lambda f=f, t=t: f(X, t), TypeError, "the target of a loss is a tensor, an array or a list; got a ")
        for f in (F.mse_loss, F.l1_loss, F.huber_loss, F.binary_cross_entropy_with_logits, F.cross_entropy, F.nll_loss)
        for t in (None, "a")
    ],
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "words"), REFUSED)
def test_wrong_calls_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
    with composed(), pytest.raises(error):
        call()


def test_calls_that_look_alike_are_right():
    assert F.pad(Tensor([True]), width=((1, 1),), value=True).numpy().tolist() == [True] * 3
    assert F.pad(Tensor([1]), width=((0, 1),), value=2.0).numpy().tolist() == [1, 2]
    assert F.sum(X, axis=np.int32(0), keepdims=np.bool_(True)).shape == (1, 3, 4)
    assert F.var(np.ones(3), correction=np.float32(1)) == 0
    assert F.flatten(X, np.int64(-2)).shape == (2, 12)
    assert F.softmax(Tensor(2.0), -1).item() == 1
    assert F.mse_loss(Tensor([1.0]), [2]).item() == 1


def test_results_in_lists_of_a_module_cannot_be_copied():
    model = nn.Linear(1, 1)
    model.kept = {"outputs": [model(np.ones((1, 1), np.float32))]}
    with pytest.raises(RuntimeError, match=r"Linear\.kept is a result with a graph"):
        copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=r"only leaf tensors can be copied.*detach\(\)"):
        copy.deepcopy(model.kept)
    model.kept["outputs"][0] = model.kept["outputs"][0].detach()
    assert copy.deepcopy(model).kept["outputs"][0].shape == (1, 1)
