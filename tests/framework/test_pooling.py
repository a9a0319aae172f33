"""Average pooling against a plain reference, and windows that hold only padding."""

from itertools import product

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tinygrad_bn import Tensor, grad
from tinygrad_bn import functional as F


def leaf(x, dtype=None):
    return Tensor(np.array(x, dtype), requires_grad=True)


@pytest.mark.parametrize(("kernel", "stride"), [(4, 4), (2, 2), (7, 7), (3, 2), ((4, 8), None)])
@pytest.mark.parametrize("size", [(8, 8), (9, 17)])
def test_average_pooling_of_tiles_and_of_slices(kernel, stride, size):
    if max(np.atleast_1d(kernel)) > min(size):
        pytest.skip("the window does not fit")
    x = leaf(np.random.default_rng(0).normal(size=(2, 3, *size)))
    y = F.avg_pool2d(x, kernel, stride)
    kh, kw = np.broadcast_to(kernel, 2)
    sh, sw = (kh, kw) if stride is None else (stride, stride)
    views = np.lib.stride_tricks.sliding_window_view(x.numpy(), (kh, kw), axis=(2, 3))[:, :, ::sh, ::sw]
    np.testing.assert_allclose(y.numpy(), views.mean(axis=(4, 5)), rtol=1e-12)
    g = np.random.default_rng(1).normal(size=y.shape)
    assert (grad(y, x, Tensor(g)) * x).sum().item() == pytest.approx((y.numpy() * g).sum())  # y is linear in x


def plain_average(x, kernel, stride, padding, ceil_mode, count_include_pad):
    """Average pooling of x (N, C, H, W) in float64, window by window."""
    windows = []  # of each axis: the elements inside x, and the number of those that count
    for n, k, s, p in zip(x.shape[2:], kernel, stride, padding, strict=True):
        starts = range(-p, n + p, s)
        if ceil_mode:  # the last one may stick out, but starts inside
            starts = [a for a in starts if a == -p or (a - s + k < n + p and a < n)]
        else:
            starts = [a for a in starts if a + k <= n + p]
        inside = [[i for i in range(a, a + k) if 0 <= i < n] for a in starts]
        padded = [sum(-p <= i < n + p for i in range(a, a + k)) for a in starts]
        windows.append(list(zip(inside, padded if count_include_pad else map(len, inside), strict=True)))
    wide = x.astype(np.float64)
    means = [wide[:, :, i][..., j].sum(axis=(2, 3)) / (m * n) for (i, m), (j, n) in product(*windows)]
    return np.stack(means, axis=2).reshape(*x.shape[:2], *map(len, windows))


@st.composite
def poolings(draw):
    """The size of an image, and options of average pooling that fit it; often the windows lie side by side."""
    size = draw(st.tuples(st.integers(1, 11), st.integers(1, 11)))
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    size = tuple(max(n, k - 2 * p) for n, k, p in zip(size, kernel, padding, strict=True))
    stride = draw(st.one_of(st.just(kernel), st.tuples(st.integers(1, 5), st.integers(1, 5))))
    return size, (kernel, stride, padding, draw(st.booleans()), draw(st.booleans()))


@settings(max_examples=8 * settings.default.max_examples)  # there are many options, and each example is quick
@given(poolings(), st.sampled_from([np.float32, np.float64]), st.integers(0, 99))
@example(((8, 8), ((4, 4), (4, 4), (2, 2), False, True)), np.float64, 0)  # tiles, if it were not for the padding
@example(((8, 8), ((4, 4), (4, 4), (0, 0), False, True)), np.float64, 0)  # tiles
@example(((6, 6), ((4, 4), (3, 3), (1, 1), True, True)), np.float64, 0)  # the last windows stick out of the padding
def test_average_pooling_equals_the_means_of_its_windows(pooling, dtype, seed):
    size, options = pooling
    rng = np.random.default_rng(seed)
    x = leaf(rng.normal(size=(2, 1, *size)), dtype)
    y, want = F.avg_pool2d(x, *options), plain_average(x.numpy(), *options)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == np.float32 else {"rtol": 1e-12, "atol": 1e-13}
    np.testing.assert_allclose(y.numpy(), want, **tolerance)
    g, other = rng.normal(size=y.shape).astype(dtype), rng.normal(size=x.shape)
    gx = grad(y, x, Tensor(g)).numpy().astype(np.float64)
    np.testing.assert_allclose((gx * other).sum(), (plain_average(other, *options) * g).sum(), **tolerance)  # linear


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_a_window_that_holds_only_padding_is_refused(ceil_mode):
    """With a dilation of 4 the window at −1 holds the elements −1 and 3."""
    options = {"kernel_size": 2, "stride": 1, "padding": 1, "dilation": 4, "ceil_mode": ceil_mode}
    words = r"some windows of \(2,\), dilation \(4,\), hold nothing but padding of x \(1, 1, 3\)"
    with pytest.raises(ValueError, match=words):
        F.max_pool1d(np.ones((1, 1, 3)), **options)
    assert F.max_pool1d(np.arange(4.0).reshape(1, 1, 4), **options).tolist() == [[[3.0, 0.0]]]


@pytest.mark.parametrize(("size", "out"), [((8, 8), (4, 4)), ((9, 6), (3, 3)), ((5, 7), (4, 3)), ((4, 4), (1, 1))])
def test_adaptive_maxima_equal_those_of_their_windows(size, out):
    """Even windows, of which there are more than elements in one, and uneven ones."""
    x = np.random.default_rng(0).normal(size=(2, 3, *size))
    want = np.empty((2, 3, *out))
    for place in np.ndindex(*out):
        window = tuple(slice(i * n // m, -(-(i + 1) * n // m)) for i, n, m in zip(place, size, out, strict=True))
        want[(..., *place)] = x[(..., *window)].max(axis=(2, 3))
    np.testing.assert_array_equal(F.adaptive_max_pool(x, out), want)


@pytest.mark.parametrize("pool", [F.max_pool2d, F.avg_pool2d])
def test_padding_is_not_negative(pool):
    with pytest.raises(ValueError, match=r"padding has to be .*at least 0"):
        pool(np.ones((1, 1, 4, 4)), 2, padding=-1)
