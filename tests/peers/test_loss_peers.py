"""The losses of tinygrad_bn.functional against PyTorch's, with all their options: values and gradients."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.peers.compare import TOLERANCE, check, close, peer, torch
from tinygrad_bn import Tensor
from tinygrad_bn import functional as F

P = torch.nn.functional
DTYPES = st.sampled_from(list(TOLERANCE))
REDUCTIONS = st.sampled_from(["mean", "sum", "none"])
SPATIAL = st.sampled_from([(), (2,), (2, 3)])
SEEDS = st.integers(0, 2**32)


def draw_classification(rng, dtype, classes, spatial, weighted, ignore_index):
    """Scores, targets (the first is never ignored), and class weights or None."""
    x = rng.normal(0, 3, (3, classes, *spatial)).astype(dtype)
    target = rng.integers(0, classes, (3, *spatial))
    if ignore_index < 0:
        target[rng.random(target.shape) < 0.3] = ignore_index
    target.flat[0] = (ignore_index + 1) % classes if ignore_index >= 0 else 0
    return x, target, rng.uniform(0.2, 2, classes).astype(dtype) if weighted else None


@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss"])
@given(
    seed=SEEDS,
    dtype=DTYPES,
    classes=st.integers(2, 5),
    spatial=SPATIAL,
    weighted=st.booleans(),
    ignore_index=st.sampled_from([-100, -1, 1]),
    reduction=REDUCTIONS,
    smoothing=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)
def test_classification(name, seed, dtype, classes, spatial, weighted, ignore_index, reduction, smoothing):
    rng = np.random.default_rng(seed)
    x, target, weight = draw_classification(rng, dtype, classes, spatial, weighted, ignore_index)
    options = {"ignore_index": ignore_index, "reduction": reduction}
    options |= {"label_smoothing": smoothing} if name == "cross_entropy" else {}
    check(
        lambda x: getattr(F, name)(x, target, weight, **options),
        lambda x: getattr(P, name)(x, peer(target), peer(weight), **options),
        [x],
        TOLERANCE[dtype],
    )


@pytest.mark.parametrize("logit", [1e4, -1e4])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_cross_entropy_of_extreme_logits(dtype, logit):
    x, target = np.array([[logit, 0.0, 0.0], [logit, logit + 1, 0.0]], dtype), np.array([1, 0])
    check(
        lambda x: F.cross_entropy(x, target, reduction="none"),
        lambda x: P.cross_entropy(x, peer(target), reduction="none"),
        [x],
        TOLERANCE[dtype],
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_cross_entropy_where_every_target_is_ignored(reduction, smoothing):
    target, options = np.full(2, -100), {"reduction": reduction, "label_smoothing": smoothing}
    check(
        lambda x: F.cross_entropy(x, target, **options),
        lambda x: P.cross_entropy(x, peer(target), **options),
        [np.ones((2, 3))],
        TOLERANCE["float64"],
    )


def test_the_mean_over_no_target_is_nan_and_has_gradient_zero():
    x, target = np.ones((2, 3)), np.full(2, -100)
    ours, theirs = Tensor(x, requires_grad=True), peer(x).requires_grad_()
    with np.errstate(invalid="ignore", divide="ignore"):
        y, z = F.cross_entropy(ours, target), P.cross_entropy(theirs, peer(target))
        y.backward()
        z.backward()
    close(y, z, TOLERANCE["float64"])
    close(ours.grad, theirs.grad, TOLERANCE["float64"])


@given(
    seed=SEEDS,
    dtype=DTYPES,
    scale=st.sampled_from([1.0, 50.0]),
    weight_shape=st.sampled_from([None, (3,), (4, 1), (4, 3)]),
    pos_weight_shape=st.sampled_from([None, (3,), (1,)]),
    reduction=REDUCTIONS,
)
def test_binary_cross_entropy_with_logits(seed, dtype, scale, weight_shape, pos_weight_shape, reduction):
    rng = np.random.default_rng(seed)
    x, target = rng.normal(0, scale, (4, 3)).astype(dtype), rng.random((4, 3)).astype(dtype)
    target[0] = [0, 1, 0]
    weight, pos_weight = (
        None if shape is None else rng.uniform(0.2, 3, shape).astype(dtype)
        for shape in (weight_shape, pos_weight_shape)
    )
    check(
        lambda x, t: F.binary_cross_entropy_with_logits(x, t, weight, pos_weight, reduction),
        lambda x, t: P.binary_cross_entropy_with_logits(
            x, t, peer(weight), pos_weight=peer(pos_weight), reduction=reduction
        ),
        [x, target],
        TOLERANCE[dtype],
    )


REGRESSION = {
    "mse": (F.mse_loss, P.mse_loss, {}),
    "l1": (F.l1_loss, P.l1_loss, {}),
    "huber, delta 1": (F.huber_loss, P.huber_loss, {}),
    "huber, delta 0.3": (F.huber_loss, P.huber_loss, {"delta": 0.3}),
    "huber, delta 5": (F.huber_loss, P.huber_loss, {"delta": 5.0}),
}


@pytest.mark.parametrize("name", REGRESSION)
@given(seed=SEEDS, dtype=DTYPES, shape=st.sampled_from([(), (3,), (2, 3), (2, 1, 4)]), reduction=REDUCTIONS)
def test_regression_losses(name, seed, dtype, shape, reduction):
    ours, theirs, options = REGRESSION[name]
    rng = np.random.default_rng(seed)
    check(
        lambda x, t: ours(x, t, reduction=reduction, **options),
        lambda x, t: theirs(x, t, reduction=reduction, **options),
        [rng.normal(0, 2, shape).astype(dtype), rng.normal(size=shape).astype(dtype)],
        TOLERANCE[dtype],
    )
