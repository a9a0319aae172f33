"""Compositions: statistics, softmax family, losses with all their options, and errors."""

from contextlib import nullcontext

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_bn import Tensor, composed, grad, testing
from tinygrad_bn import functional as F
from tinygrad_bn.backend import kernels_disabled
from tinygrad_bn.functional.basics import dropout_by_key

RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, 3))
UNIT = RNG.random((4, 3))

SMOOTH = {
    "mean": F.mean,
    "var": lambda x: F.var(x, 0, correction=1),
    "std": lambda x: F.std(x, 1),
    "logsumexp": lambda x: F.logsumexp(x, 1),
    "logsumexp of all": F.logsumexp,
    "softmax": lambda x: F.softmax(x, 0),
    "log_softmax": F.log_softmax,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "silu": F.silu,
    "gelu": F.gelu,
    "mse_loss": lambda x: F.mse_loss(x, UNIT),
    "l1_loss": lambda x: F.l1_loss(x, UNIT, reduction="sum"),
    "huber_loss": lambda x: F.huber_loss(x, UNIT, delta=0.4, reduction="none"),
    "bce": lambda x: F.binary_cross_entropy_with_logits(x, UNIT, UNIT[0], pos_weight=UNIT[1] + 1),
    "nll_loss": lambda x: F.nll_loss(F.log_softmax(x), np.array([0, 2, 1, 1]), ignore_index=1),
    "layer_norm": lambda x: F.layer_norm(x, (3,), UNIT[0], UNIT[1]),
    "rms_norm": lambda x: F.rms_norm(x, (3,), UNIT[0]),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_first_and_second_gradients(name):
    testing.gradcheck(SMOOTH[name], X)
    testing.gradgradcheck(SMOOTH[name], X, allow_zero=True)


@given(hnp.arrays(np.float64, hnp.array_shapes(max_dims=3, max_side=4), elements=st.floats(-5, 5)), st.data())
def test_statistics_are_numpys(x, data):
    axis = data.draw(st.sampled_from([None, *range(-x.ndim, x.ndim), tuple(range(x.ndim))]))
    keepdims = data.draw(st.booleans())
    np.testing.assert_allclose(F.mean(x, axis, keepdims), x.mean(axis, keepdims=keepdims), atol=1e-12)
    np.testing.assert_allclose(F.var(x, axis, keepdims), x.var(axis, keepdims=keepdims), atol=1e-12)
    np.testing.assert_allclose(F.std(x, axis, keepdims), x.std(axis, keepdims=keepdims), atol=1e-12)
    want = np.log(np.exp(x).sum(axis, keepdims=keepdims))
    np.testing.assert_allclose(F.logsumexp(x, axis, keepdims), want, atol=1e-12)


def test_the_gradient_of_std_is_0_where_the_variance_is_0():
    x = Tensor(np.ones((3, 2)), requires_grad=True)
    F.std(x, 0).sum().backward()
    assert x.grad.numpy().tolist() == [[0, 0]] * 3


def test_logsumexp_of_infinities():
    x = np.array([[-np.inf, -np.inf], [0.0, -np.inf], [np.inf, 0.0]])
    with np.errstate(divide="ignore", over="ignore"):
        assert np.asarray(F.logsumexp(x, 1)).tolist() == [-np.inf, 0, np.inf]
    big = Tensor([1e4, 1e4], requires_grad=True, dtype=np.float32)
    F.logsumexp(big).backward()
    assert big.grad.numpy().tolist() == [0.5, 0.5]


@given(
    st.integers(0, 999),
    st.sampled_from([(5, 3), (2, 3, 4), (2, 3, 2, 2)]),
    st.booleans(),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.sampled_from([-100, 1]),
    st.sampled_from(["mean", "sum", "none"]),
)
def test_cross_entropy_equals_its_definition(seed, shape, weighted, smoothing, ignore, reduction):
    rng = np.random.default_rng(seed)
    x, target = rng.normal(size=shape), rng.integers(0, 3, (shape[0], *shape[2:]))
    target.flat[0] = 0  # one that counts
    weight = rng.random(3) + 0.5 if weighted else np.ones(3)
    log_p = np.moveaxis(x - np.log(np.exp(x).sum(1, keepdims=True)), 1, -1)
    q = np.full(log_p.shape, smoothing / 3) + (1 - smoothing) * np.eye(3)[target]
    loss = -(q * log_p * weight).sum(-1) * (target != ignore)
    want = {"none": loss, "sum": loss.sum(), "mean": loss.sum() / (weight[target] * (target != ignore)).sum()}
    options = {"ignore_index": ignore, "reduction": reduction, "label_smoothing": smoothing}
    got = F.cross_entropy(x, target, weight if weighted else None, **options)
    np.testing.assert_allclose(got, want[reduction], atol=1e-12)
    with kernels_disabled():
        np.testing.assert_allclose(F.cross_entropy(x, target, weight, **options), want[reduction], atol=1e-12)
    if smoothing == 0:
        nll = F.nll_loss(F.log_softmax(x, 1), target, weight, ignore_index=ignore, reduction=reduction)
        np.testing.assert_allclose(nll, want[reduction], atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weight", [None, np.array([0.5, 1.0, 3.0])])
@pytest.mark.parametrize("context", [nullcontext, kernels_disabled, composed])
def test_an_ignored_row_counts_0_though_its_loss_is_infinite(context, weight, reduction):
    """A row of class 0 of probability 0: as a number its loss times 0 would be NaN."""
    x = np.array([[-np.inf, 0.0, 0.0], [0.5, 0.25, -1.0], [1.0, -np.inf, -np.inf]])
    target, ignored = np.array([-100, 2, 0]), np.array([-100, 2, -100])
    log_p = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    for classes in (target, ignored):
        each = -log_p[range(3), classes.clip(0)] * (1 if weight is None else weight[classes.clip(0)])
        loss, total = np.where(classes < 0, 0, each), np.ones(3) if weight is None else weight[classes.clip(0)]
        want = {"none": loss, "sum": loss.sum(), "mean": loss.sum() / total[classes >= 0].sum()}[reduction]
        for function, rows in ((F.nll_loss, log_p), (F.cross_entropy, x)):
            logits = Tensor(rows, requires_grad=True)
            with context():
                got = function(logits, classes, weight, reduction=reduction)
                got.backward(np.ones(got.shape))
            np.testing.assert_allclose(got.numpy(), want, rtol=1e-12, atol=1e-15)
            assert logits.grad.numpy()[0].tolist() == [0, 0, 0]
            assert np.isfinite(logits.grad.numpy()).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_cross_entropy_keeps_the_dtype_and_takes_any_integers(dtype):
    for target in (np.array([0, 2], np.uint8), Tensor([0, 2]), np.array([0, 2], np.int32)):
        x = Tensor(X[:2], requires_grad=True, dtype=dtype)
        loss = F.cross_entropy(x, target)
        loss.backward()
        assert loss.dtype == x.grad.dtype == dtype


def test_cross_entropy_does_not_overflow():
    x = Tensor([[1e4, -1e4], [0.0, 1e30]], requires_grad=True)
    loss = F.cross_entropy(x, np.array([1, 1]))
    loss.backward()
    assert loss.item() == 1e4
    assert np.isfinite(x.grad.numpy()).all()


ERRORS = [
    (
        lambda: F.cross_entropy(X, np.zeros(4, int), ignore_index=None),
        TypeError,
        "ignore_index has to be an integer; got None",
    ),
    (lambda: F.cross_entropy(X, np.array([0, 1, 2, 3])), ValueError, "target 3 is not one of the 3 classes 0 to 2"),
    (
        lambda: F.cross_entropy(X, np.array([0, 1, 2, 2**64 - 100], np.uint64)),
        ValueError,
        "target 18446744073709551516",
    ),
    (lambda: F.cross_entropy(X, np.zeros(4, int), label_smoothing=1.5), ValueError, r"\[0, 1\]"),
    (lambda: F.group_norm(np.ones((2, 3)), 2), ValueError, "2 groups"),
    (lambda: F.layer_norm(X, (4,)), ValueError, "normalized_shape"),
    (lambda: F.batch_norm(np.ones((2, 3), int), training=True), TypeError, "floating-point input; got int64"),
    (lambda: F.batch_norm(X, np.zeros(3)), ValueError, "go together"),
    (lambda: F.batch_norm(X, np.zeros(5), np.ones(5)), ValueError, r"running_mean has to be one .*got shape \(5,\)"),
    (lambda: F.batch_norm_training(X, np.ones(2), np.ones(3), eps=0.1), ValueError, "expected vectors of shape"),
    (lambda: F.cross_entropy(X, np.zeros(4, int), Tensor(np.ones(3), requires_grad=True)), ValueError, "constants"),
    (
        lambda: F.cross_entropy(np.ones((4, 3), int), np.zeros(4, int)),
        TypeError,
        "cross-entropy takes floating-point input",
    ),
    (lambda: F.batch_norm(np.ones((2, 1), int), np.ones(1), np.ones(1)), TypeError, "floating-point input"),
    (lambda: F.softmax_cross_entropy(X, np.array([0, 1, 2, 7]), np.ones(3)), ValueError, "target 7 .* 0 to 2"),
    (lambda: F.softmax_cross_entropy(X, np.array([0]), np.ones(3), smoothing=0.0), ValueError, "expected logits"),
    (lambda: F.clip(X), ValueError, "min, max, or both"),
    (lambda: F.cross_entropy(X, np.zeros(4, int), ignore_index=2**70), ValueError, "ignore_index"),
    (lambda: F.cross_entropy(X.tolist(), np.zeros(4, int)), TypeError, "got a list: make a Tensor of it"),
    (lambda: F.batch_norm(X.tolist(), training=True), TypeError, "got a list: make a Tensor of it"),
    (lambda: F.batch_norm(X, training=True, eps=Tensor(1e-5)), TypeError, "eps has to be a number; got Tensor"),
    (lambda: F.layer_norm(X, 3, eps=np.array([1e-5])), TypeError, "eps has to be a number; got array"),
    (lambda: F.instance_norm(X[0]), ValueError, r"\(N, C, \.\.\.\); got \(3,\)"),
    (lambda: F.rms_norm(np.ones((2, 3), int), 3), TypeError, "floating-point input; got int64"),
    (lambda: F.mean(np.ma.ones(10_000)), TypeError, "filled"),
    (lambda: F.linear(X, X[:2], X[:, :2]), ValueError, r"bias \(out,\); got \(2, 3\) and \(4, 2\)"),
    (lambda: F.sum_of_squares(np.full(3, 200, np.uint8)), TypeError, "may not hold squares"),
    (lambda: F.batch_norm(np.ones((3, 2)), training=True, eps=-1.0), ValueError, "eps has to be 0 or more"),
    (lambda: F.layer_norm(np.ones((2, 3, 4)), (3, 4), np.ones((4, 3))), ValueError, r"has to be \(3, 4\)"),
    (lambda: F.group_norm(np.ones((2, 4, 3)), 2, np.ones(3)), ValueError, r"has to be \(4,\)"),
    (lambda: F.dropout(np.ones(4, int)), TypeError, "floating-point"),
    (lambda: F.linear(X, X[0], np.ones(1)), ValueError, r"weight has to be \(out, in\)"),
]


@pytest.mark.parametrize(("wrong", "kind", "message"), ERRORS)
def test_errors(wrong, kind, message):
    with pytest.raises(kind, match=message):
        wrong()


def test_half_precision_does_not_overflow_in_a_sum():
    ones = np.ones(70_000, np.float16)
    assert F.mean(ones) == 1
    assert F.var(ones * np.float16(3)) == 0
    x = Tensor(np.zeros((70_000, 2), np.float16), requires_grad=True)
    loss = F.cross_entropy(x, np.zeros(70_000, np.int64))
    loss.backward()
    assert abs(loss.item() - np.log(2)) < 1e-3
    assert loss.dtype == x.grad.dtype == np.float16
    for norm in (lambda x: F.group_norm(x, 1, np.ones(2, np.float32)), lambda x: F.layer_norm(x, 2, np.ones(2))):
        assert norm(x).dtype == np.float16


@pytest.mark.parametrize("disable", [False, True])
def test_a_class_masked_by_minus_infinity(disable):
    x = Tensor([[0.0, -np.inf, 1.0]], requires_grad=True)
    with kernels_disabled() if disable else nullcontext():
        loss = F.cross_entropy(x, np.array([0]))
        loss.backward()
    assert abs(loss.item() - np.log(1 + np.e)) < 1e-6
    np.testing.assert_allclose(x.grad.numpy(), [[-0.7310586, 0, 0.7310586]], rtol=1e-6)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("disable", [False, True])
def test_the_logits_of_an_ignored_row_do_not_count_even_if_they_are_nan(disable, create_graph):
    x = Tensor(np.array([[np.nan, 1.0], [1.0, 1.0]]), requires_grad=True)
    with kernels_disabled() if disable else nullcontext():
        dx = grad(F.cross_entropy(x, np.array([-100, 0])), x, create_graph=create_graph)
    np.testing.assert_allclose(dx.numpy(), [[0, 0], [-0.5, 0.5]])


@pytest.mark.parametrize("rows", [2, 5000])
def test_lists_and_matrices_are_made_tensors(rows):
    x = np.random.default_rng(0).normal(size=(rows, 3)).astype(np.float32)
    for made in (x.tolist(), tuple(map(tuple, x.tolist())), x.view(np.matrix)):
        np.testing.assert_array_equal(F.mean(made, 0), F.mean(Tensor(x), 0))
    want = F.batch_norm(Tensor(x), training=True)
    np.testing.assert_array_equal(F.batch_norm(x.view(np.matrix), training=True), want)


def test_std_of_nan_is_nan_and_of_constants_zero():
    assert np.isnan(F.std(Tensor([1.0, np.nan])).item())
    assert F.std(Tensor([2.0, 2.0])).item() == 0


@pytest.mark.parametrize("size", [50, 70_000])
def test_exponentials_of_half_precision_add_up(size):
    x = np.linspace(-3, 3, size).astype(np.float16)
    want = np.log(np.exp(x, dtype=np.float64).sum())
    assert F.logsumexp(x).dtype == F.log_softmax(x).dtype == np.float16
    np.testing.assert_allclose([F.logsumexp(x).item(), F.log_softmax(x)[0]], [want, -3 - want], rtol=1e-3)


def test_squares_of_half_precision_add_up():
    assert F.sum_of_squares(Tensor(np.full(10_000, 1e-4), dtype=np.float16)).item() == pytest.approx(1e-4, rel=1e-2)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_reference_of_dropout_drops_as_often_as_its_kernel(p):
    x = np.ones(100_000, np.float32)
    with kernels_disabled():
        y = dropout_by_key(x, p=p, key=3)
    np.testing.assert_array_equal(y, dropout_by_key(x, p=p, key=3))
    assert abs((y == 0).mean() - p) < 0.005
    assert abs(y.mean() - 1) < 0.02


def test_the_slope_of_elu_at_0_is_that_of_its_negative_side():
    x = Tensor([0.0, -0.0], requires_grad=True)
    assert grad(F.elu(x, 2.0), x, [1.0, 1.0]).numpy().tolist() == [2, 2]


@pytest.mark.parametrize("operands", [(2.0, X), (X, 2.0), (2.0, 2.0)])
def test_matmul_is_not_for_numbers(operands):
    with pytest.raises(ValueError, match="at least one axis; for a number use"):
        F.matmul(*(np.asarray(o) for o in operands))
