"""Dropout's counter-based generator, the kernels' exponential, and cross-entropy's kernel against its composition."""

import itertools

import numpy as np
import pytest
from tinygrad_bn_kernels.cpu import exponential, jit

from tinygrad_bn import Tensor, grad, nn
from tinygrad_bn import functional as F
from tinygrad_bn.backend import find_kernel, kernels_disabled
from tinygrad_bn.functional.basics import dropout_by_key
from tinygrad_bn.random import philox

KEYS = [0, 1, 2**32 - 1, 2**32, 0xA4093822299F31D0 >> 1, 2**63 - 1]
SIZES = [0, 1, 2, 3, 4, 5, 7, 8, 1023, 4098]


# ---- the generator ---------------------------------------------------------------------------------------


def philox4x32(counter, key):
    """Philox4x32-10 of one counter, in Python's integers."""
    c, (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = (p1 >> 32) ^ c[1] ^ k0, p1 % 2**32, (p0 >> 32) ^ c[3] ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c


def test_known_answers():
    """From Random123's kat_vectors; `philox` can only reach the counter of the first."""
    ones, zeros = (2**32 - 1,) * 4, (0,) * 4
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    assert philox4x32(zeros, zeros[:2]) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox4x32(ones, ones[:2]) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    assert philox4x32(*pi) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)
    for key in [*KEYS, 2**64 - 1]:
        want = [word for i in range(20) for word in philox4x32((i, 0, 0, 0), (key % 2**32, key >> 32))]
        for count in (0, 1, 3, 4, 79, 80):
            assert philox(key, count).tolist() == want[:count]


# ---- dropout ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_kernels_mask_is_that_of_the_reference_and_of_the_generator(dtype, driver):
    for key, p, shape in itertools.product(KEYS, [0.1, 0.5, 0.999], [*SIZES, (), (3, 5), (2, 0), (2, 3, 7)]):
        x = np.asarray(np.random.default_rng(1).normal(size=shape) + 9, dtype)
        got = find_kernel("dropout_by_key", "cpu")(x, p=p, key=key)
        with kernels_disabled():
            want = np.asarray(dropout_by_key(x, p=p, key=key))
        kept = (philox(key, x.size) >= round(p * 2**32)).reshape(x.shape)
        assert (got.shape, got.dtype) == (want.shape, want.dtype) == (x.shape, x.dtype)
        np.testing.assert_array_equal(got != 0, kept)
        np.testing.assert_array_equal(want != 0, kept)
        np.testing.assert_allclose(got, np.where(kept, x / (1 - p), 0), rtol=3 * np.finfo(dtype).eps)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.9])
def test_the_share_kept_is_within_5_sigma_and_neighbours_are_independent(p, key):
    n = 40_000
    kept = np.asarray(dropout_by_key(np.ones(n), p=p, key=key)) != 0
    assert abs(kept.mean() - (1 - p)) <= 5 * np.sqrt(p * (1 - p) / n)
    for lag in (1, 2, 3, 4):
        both = np.mean((kept[lag:] - (1 - p)) * (kept[:-lag] - (1 - p)))
        assert abs(both) <= 5 * p * (1 - p) / np.sqrt(n - lag)


def test_one_seed_gives_one_mask_and_others_give_others():
    x = Tensor(np.ones((50, 7), np.float32))
    masks = [F.dropout(x, 0.5, rng=np.random.default_rng(seed)).numpy() for seed in (3, 3, 4)]
    np.testing.assert_array_equal(masks[0], masks[1])
    assert (masks[0] != masks[2]).any()
    rng = np.random.default_rng(3)
    again = [F.dropout(x, 0.5, rng=rng).numpy() for _ in range(2)]
    np.testing.assert_array_equal(again[0], masks[0])
    assert (again[0] != again[1]).any()


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("p", [0.0, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("shape", [(), (5,), (30, 7), (0, 2)])
def test_gradients_of_order_1_and_2_use_the_forward_mask(key, p, shape):
    rng = np.random.default_rng(key)
    x, g = (Tensor(rng.normal(size=shape) + 9, requires_grad=True) for _ in range(2))
    y = dropout_by_key(x, p=p, key=key)
    slope = np.where(philox(key, x.size) >= p * 2**32, 1 / (1 - p) if p < 1 else 0.0, 0.0).reshape(shape)
    np.testing.assert_allclose(y.numpy(), x.numpy() * slope, rtol=1e-15)
    gx = grad(y * y, x, g, create_graph=True)  # 2 · slope² · x · g
    np.testing.assert_allclose(gx.numpy(), 2 * slope**2 * x.numpy() * g.numpy(), rtol=1e-14)
    for by, factor in ((x, g), (g, x)):
        second = grad(gx, by, np.ones(shape))
        np.testing.assert_allclose(second.numpy(), 2 * slope**2 * factor.numpy(), rtol=1e-14)


def test_probabilities_0_and_1_and_out_of_range():
    x = Tensor(np.array([1.0, np.nan, np.inf, -2.0, 3.0]), requires_grad=True)
    assert F.dropout(x, 0.0) is x
    assert F.dropout(x, 0.9, training=False) is x
    y = F.dropout(x, 1.0)
    y.sum().backward()
    assert y.numpy().tolist() == x.grad.numpy().tolist() == [0] * 5
    assert (np.asarray(nn.Dropout(1.0)(np.ones(3, np.float32))) == 0).all()
    for p in (-0.1, 1.1, np.nan):
        with pytest.raises(ValueError, match=r"in \[0, 1\]"):
            F.dropout(x, p)


# ---- the exponential -------------------------------------------------------------------------------------


@jit.njit()
def exp(x):
    return exponential.exp(x)


def test_the_exponential():
    rng = np.random.default_rng(0)
    halves = np.arange(-1074, 1023) * np.log(2) + np.log(2) / 2  # where the power of 2 changes
    x = np.concatenate([np.linspace(-745, 709, 30_001), rng.normal(size=3000), [0.0, -0.0, 1e-300], halves])
    x = np.concatenate([x, np.nextafter(x, -np.inf), np.nextafter(x, np.inf)])
    x = x[x <= 709]
    got, want = np.array([exp(v) for v in x]), np.exp(x)
    large = want > 1e-300
    assert np.max(np.abs(got[large] / want[large] - 1)) <= 4e-16
    assert ((got[~large] >= 0) & (got[~large] <= 1e-300 * (1 + 4e-16))).all()
    assert exp(0.0) == 1
    assert [exp(v) for v in (-np.inf, -1e308, -746.0, np.inf, 1e308)] == [0, 0, 0, np.inf, np.inf]
    assert np.isnan(exp(np.nan))


# ---- cross-entropy ---------------------------------------------------------------------------------------


def loss_and_gradient(x, target, g=None, **options):
    t = Tensor(x, requires_grad=True)
    with np.errstate(all="ignore"):
        loss = F.cross_entropy(t, target, **options)
        loss.backward(np.ones(loss.shape, loss.dtype) if g is None else g)
    assert (loss.dtype, t.grad.dtype) == (x.dtype, x.dtype)
    return loss.numpy(), t.grad.numpy()


def equal_composition(x, target, **options):
    """The kernel's loss and gradient equal those of the composition in float64."""
    got = loss_and_gradient(x, target, **options)
    with kernels_disabled():
        want = loss_and_gradient(x.astype(np.float64), target, **options)
    eps = np.finfo(x.dtype).eps

    for a, b in zip(got, want, strict=True):
        with np.errstate(over="ignore"):
            np.testing.assert_allclose(a, b.astype(x.dtype), rtol=40 * eps, atol=40 * eps)
    return got


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_equals_its_composition(reduction, smoothing, dtype, driver):
    rng = np.random.default_rng(0)
    for shape, weighted in itertools.product([(1, 1), (9, 2), (13, 10), (3, 1000), (4, 3, 5)], [False, True]):
        x, target = rng.normal(size=shape).astype(dtype), rng.integers(0, shape[1], (shape[0], *shape[2:]))
        options = {"label_smoothing": smoothing, "reduction": reduction}
        options |= {"weight": np.linspace(0.5, 1.5, shape[1]).astype(dtype)} if weighted else {}
        g = rng.normal(size=target.shape if reduction == "none" else ()).astype(dtype)
        equal_composition(x, target, g=g, **options)
        target.flat[1:4] = target.flat[-1:] = 0
        for ignored in (0, -100) if target[0].size > 1 or target.flat[0] else (-100,):
            equal_composition(x, np.where(target, target, ignored), g=g, ignore_index=ignored, **options)
        assert (loss_and_gradient(x.swapaxes(0, 1).copy().swapaxes(0, 1), target, **options)[1].shape) == shape


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_extreme_logits(reduction, dtype):
    x = np.array([[1e4, 0, -1e4], [0, -1e4, 1e4], [-1e4, -1e4, -1e4], [-np.inf, 2, 1], [3, -np.inf, -np.inf]], dtype)
    target = np.array([0, 1, 2, 1, 0])
    for smoothing in (0.0, 0.2):
        _, gradient = equal_composition(x, target, reduction=reduction, label_smoothing=smoothing)
        assert np.isfinite(gradient).all()
    loss, _ = equal_composition(x, np.array([0, 1, 2, 0, 2]), reduction="none")  # the target itself is masked
    assert np.isposinf(loss[3:]).all()


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_logits_that_are_not_finite_spoil_their_own_row_only(wrong):
    x = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    x[1, 2] = wrong
    loss, gradient = loss_and_gradient(x, np.array([0, 2, 2, 3]), reduction="none")
    assert np.isnan(loss).tolist() == [False, True, False, False]
    assert np.isfinite(gradient[[0, 2, 3]]).all()
    assert np.isnan(gradient[1]).any()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_all_rows_ignored(dtype):
    x, target = np.ones((3, 4), dtype), np.full(3, -100)
    for reduction in ("mean", "sum", "none"):
        loss, gradient = equal_composition(x, target, reduction=reduction)
        assert np.isnan(loss) if reduction == "mean" else (loss == 0).all()
        assert (gradient == 0).all()


@pytest.mark.parametrize("wrong", [-1, 4, -100, 10**12])
def test_a_wrong_target_is_an_error_that_names_it(wrong, driver):
    for place in (0, 37, 99):
        target = np.zeros(100, np.int64)
        target[place] = wrong
        for context in (kernels_disabled(), np.errstate()):
            with context, pytest.raises(ValueError, match=f"target {wrong} is not one of the 4 classes 0 to 3"):
                F.cross_entropy(np.ones((100, 4)), target, ignore_index=-7)


@pytest.mark.parametrize("size", [1e4, 1e8, 1e12, 1e16])
def test_equal_logits_of_any_size_share_the_probability(size):
    x = Tensor(np.full((2, 3), size), requires_grad=True)
    loss = F.cross_entropy(x, np.array([0, 2]))
    loss.backward()
    np.testing.assert_allclose(loss.item(), np.log(3), rtol=1e-15)
    np.testing.assert_allclose(x.grad.numpy() * 2, [[-2 / 3, 1 / 3, 1 / 3], [1 / 3, 1 / 3, -2 / 3]], rtol=1e-15)
