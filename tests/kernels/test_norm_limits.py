"""Where the loops of BatchNorm are not used: the limits of their arithmetic, and what is asked of a kernel."""

import numpy as np
import pytest
from tinygrad_bn_kernels.cpu import norm, norm_gradient, norm_inference, norm_terms
from tinygrad_bn_kernels.cpu.norm_rows import _rows_statistics

from tinygrad_bn import Tensor, grad
from tinygrad_bn import functional as F
from tinygrad_bn.backend import kernels_disabled

RNG = np.random.default_rng(0)
ONE, ZERO = np.ones(1), np.zeros(1)


@pytest.mark.parametrize(
    ("weight", "mean", "var", "good"),
    [
        (1, 0, 1, True), (0, 0, 1, True), (1e17, 0, 1, True), (-1e-17, 0, 1, True), (1e19, 0, 1, False),
        (-1e-19, 0, 1, False), (1, 1e29, 1, True), (1, 1e31, 1, False), (1, 0, 1e34, True), (1, 0, 1e38, False),
        (1, np.nan, np.nan, True), (1, np.inf, np.nan, True), (1e19, np.nan, np.nan, False),
    ],
)  # fmt: skip
def test_ordinary_numbers(weight, mean, var, good):
    arrays = np.array([weight], np.float32), np.array([mean], float), np.array([var], float)
    assert norm_terms.is_ordinary(*arrays, 1e-5) == good


@pytest.mark.parametrize(
    ("gweight", "n", "var", "good"),
    [
        (1, 1, 1, True), (0, 1, 1, True), (np.inf, 1, 1, False), (np.nan, 1, 1, False), (1e-36, 1, 1, True),
        (1e-36, 1000, 1, False), (1, 1, 0, True), (1, 1, 1e-62, True), (1, 1, 1e-66, False),
    ],
)  # fmt: skip
def test_sound_gradients(gweight, n, var, good):
    """In float32: p = gweight / (n √(var + eps)), and the deviation √var / √(var + eps) of x̂."""
    assert norm_terms.are_sound(np.array([gweight], float), ZERO, np.array([var], float), 1e-5, n, 4) == good
    assert not norm_terms.are_sound(ONE, np.array([np.inf]), ONE, 1e-5, 1, 4)


@pytest.mark.parametrize("shape", [(1000, 1), (100, 1, 10)])
def test_a_kernel_declines_gradients_whose_digits_would_be_lost(shape):
    x = RNG.normal(size=shape).astype(np.float32)
    mean, var = np.array([x.mean(dtype=float)]), np.array([x.var(dtype=float)])
    options = {"needs": [True, True, True], "eps": 1e-5, "mean": mean, "var": var}
    weight = bias = np.ones(1, np.float32)
    for scale, declined in ((1.0, False), (1e-30, False), (1e-37, True)):
        g = (x * scale / np.abs(x).sum()).astype(np.float32)  # Σ g x̂ is about `scale`
        found = norm.batch_norm_training_vjp(g, None, x, weight, bias, **options)
        assert (found is NotImplemented) == declined, scale


def test_one_far_shift_is_enough_for_a_second_pass():
    far, near = (1e4, 1e8 + 1), (0.0, 1.0)  # Σ (x − shift) and its square, of one element
    for columns, good in (((near, near), True), ((far, near), False), ((near, far), False)):
        sums, shift, mean, var = np.array(columns).T[None].copy(), np.zeros(2), np.zeros(2), np.zeros(2)
        assert _rows_statistics(sums, 1, shift, mean, var) == good


def test_what_kernels_of_batch_norm_take():
    assert norm.takes(np.ones((2, 1), np.float32))
    assert not norm.takes(np.ones(2, np.float32))
    assert not norm.takes(np.ones((2, 1), int))
    x, g = RNG.normal(size=(2, 5, 3)), RNG.normal(size=(2, 5, 3))
    compute, of_weight = norm_gradient.batch_norm_gradient, norm_gradient.batch_norm_weight_gradient
    assert compute(g, x, None, eps=0.1).shape == x.shape
    assert of_weight(g, x, eps=0.1).shape == (5,)
    for wrong in (g[:1], g.astype(np.float32), g[..., 0]):
        assert compute(wrong, x, None, eps=0.1) is NotImplemented
        for operands in ((wrong, None, g, x, None), (g, None, wrong, x, None)):
            assert norm_gradient.batch_norm_gradient_vjp(*operands, needs=[True] * 3, eps=0.1) is NotImplemented
    one = RNG.normal(size=(1, 5))
    assert compute(one, one, None, eps=0.1) is NotImplemented


def test_gradients_that_nobody_needs_are_none():
    x, g, v = RNG.normal(size=(6, 2)), RNG.normal(size=(6, 2)), np.ones(2)
    given = {"eps": 0.1}
    found = norm_inference.batch_norm_inference_vjp(
        g, None, x, v, v, v, v, needs=[True, False, False, False, False], **given
    )
    assert found[3] is found[4] is None
    found = norm.batch_norm_training_vjp(g, None, x, v, v, needs=[True, False, False], mean=v, var=v, **given)
    assert found[1] is found[2] is None
    found = norm_gradient.batch_norm_gradient_vjp(g, None, g, x, v, needs=[True, True, False], **given)
    assert found[2] is None
    found = norm_gradient.batch_norm_weight_gradient_vjp(v, None, g, x, needs=[False, True], **given)
    assert found[0] is None


def second(*arrays):
    """The gradients of ⟨batch_norm_gradient, v⟩ by g, x and the weight; v is the last array."""
    ts = [Tensor(a, requires_grad=True) for a in arrays[:3]]
    return [d.numpy() for d in grad(F.batch_norm_gradient(*ts, eps=1e-5), ts, Tensor(arrays[3]))]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(7, 3), (4, 3, 5), (4, 3, 2, 2, 2)])
@pytest.mark.parametrize("power", [0, 1, -1])
def test_second_derivatives_equal_those_of_the_definition(shape, dtype, power):
    """At large and small scales of x too."""
    scale = (1e12 if dtype == np.float32 else 1e80) ** power  # beyond, the definition itself underflows in float64
    g, x, v = RNG.normal(size=(3, *shape))
    arrays = [a.astype(dtype) for a in (g, x * scale, RNG.normal(size=3), v)]
    with kernels_disabled():
        wanted = second(*(a.astype(np.float64) for a in arrays))
    for got, want in zip(second(*arrays), wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
