"""Average pooling against a plain reference, and windows that hold only padding."""

import numpy as np
import pytest

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
