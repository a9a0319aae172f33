"""Convolution and pooling, forwards and backwards, against PyTorch."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.peers.compare import check, torch
from tinygrad_bn import functional as F
from tinygrad_bn import nn

P = torch.nn.functional


def operand(data, shape):
    return np.random.default_rng(data.draw(st.integers(0, 99))).normal(size=shape)


@given(st.data(), st.integers(1, 3), st.sampled_from([1, 2]), st.booleans())
def test_convolution(data, ndim, groups, with_bias):
    kernel, stride, dilation = (tuple(data.draw(st.integers(1, 3)) for _ in range(ndim)) for _ in range(3))
    padding = tuple(data.draw(st.integers(0, 2)) for _ in range(ndim))
    size = tuple(data.draw(st.integers(3, 6)) for _ in range(ndim))
    assume(all(n + 2 * p > d * (k - 1) for n, p, d, k in zip(size, padding, dilation, kernel, strict=True)))
    c, o = groups * data.draw(st.integers(1, 2)), groups * data.draw(st.integers(1, 2))
    x, weight = operand(data, (2, c, *size)), operand(data, (o, c // groups, *kernel))
    bias = operand(data, (o,)) if with_bias else None
    ours, theirs = getattr(F, f"conv{ndim}d"), getattr(P, f"conv{ndim}d")
    options = stride, padding, dilation, groups
    check(lambda x, w, b: ours(x, w, b, *options), lambda x, w, b: theirs(x, w, b, *options), (x, weight, bias), 1e-9)


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # with even kernels PyTorch copies the input
@given(st.data(), st.integers(1, 4), st.integers(1, 3))
def test_same_padding(data, kernel, dilation):
    x, weight = operand(data, (2, 1, 7, 8)), operand(data, (2, 1, kernel, 3))
    options = {"padding": "same", "dilation": dilation}
    check(lambda x, w: F.conv2d(x, w, **options), lambda x, w: P.conv2d(x, w, **options), (x, weight), 1e-9)


@given(st.data(), st.sampled_from([1, 2]))
def test_transposed_convolution(data, groups):
    kernel, stride, dilation = (tuple(data.draw(st.integers(1, 3)) for _ in range(2)) for _ in range(3))
    padding = tuple(data.draw(st.integers(0, 1)) for _ in range(2))
    extra = tuple(data.draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    size = tuple(data.draw(st.integers(2, 4)) for _ in range(2))
    lengths = zip(size, stride, padding, dilation, kernel, extra, strict=True)
    assume(all((n - 1) * s - 2 * p + d * (k - 1) + e + 1 > 0 for n, s, p, d, k, e in lengths))
    x, weight = operand(data, (2, groups * 2, *size)), operand(data, (groups * 2, 3, *kernel))
    options = stride, padding, extra, groups, dilation
    check(
        lambda x, w, b: F.conv_transpose2d(x, w, b, *options),
        lambda x, w, b: P.conv_transpose2d(x, w, b, *options),
        (x, weight, operand(data, (groups * 3,))),
        1e-9,
    )


@given(st.data(), st.integers(1, 3), st.booleans())
def test_pooling(data, ndim, ceil_mode):
    kernel, stride = (tuple(data.draw(st.integers(1, 3)) for _ in range(ndim)) for _ in range(2))
    padding = tuple(data.draw(st.integers(0, k // 2)) for k in kernel)
    x = operand(data, (2, 3, *(data.draw(st.integers(3, 6)) for _ in range(ndim))))
    options = kernel, stride, padding
    ours, theirs = getattr(F, f"max_pool{ndim}d"), getattr(P, f"max_pool{ndim}d")
    check(lambda x: ours(x, *options, 1, ceil_mode), lambda x: theirs(x, *options, 1, ceil_mode), (x,), 1e-9)
    counted = data.draw(st.booleans())
    ours, theirs = getattr(F, f"avg_pool{ndim}d"), getattr(P, f"avg_pool{ndim}d")
    check(
        lambda x: ours(x, *options, ceil_mode, counted), lambda x: theirs(x, *options, ceil_mode, counted), (x,), 1e-9
    )


@given(st.data(), st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_adaptive_pooling(data, out):
    x, out = operand(data, (2, 3, *(6, 7, 5)[: len(out)])), tuple(out)
    theirs = {kind: getattr(P, f"adaptive_{kind}_pool{len(out)}d") for kind in ("avg", "max")}
    check(lambda x: F.adaptive_avg_pool(x, out), lambda x: theirs["avg"](x, out), (x,), 1e-9)
    check(lambda x: F.adaptive_max_pool(x, out), lambda x: theirs["max"](x, out), (x,), 1e-9)


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("MaxPool", {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 1, "ceil_mode": True}),
        ("AvgPool", {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True, "count_include_pad": False}),
        ("AdaptiveAvgPool", {"output_size": 3}),
        ("AdaptiveMaxPool", {"output_size": 2}),
    ],
)
def test_layers_of_every_rank(name, options, ndim):
    ours, theirs = (getattr(library, f"{name}{ndim}d")(**options) for library in (nn, torch.nn))
    check(ours, theirs, (np.random.default_rng(ndim).normal(size=(2, 3, *(6, 7, 5)[:ndim])),), 1e-9)
    with pytest.raises(ValueError, match=f"{ndim + 2} axes"):
        ours(np.zeros((2, 3, *(4,) * (ndim % 3 + 1)), np.float32))


@pytest.mark.parametrize("name", ["Conv1d", "Conv2d", "Conv3d", "ConvTranspose2d"])
def test_layers_have_the_state_and_the_initial_range_of_pytorchs(name):
    ours, theirs = getattr(nn, name)(4, 60, 3, groups=2), getattr(torch.nn, name)(4, 60, 3, groups=2)
    want = theirs.state_dict()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: tuple(v.shape) for k, v in want.items()}
    for key, value in want.items():
        assert np.abs(ours.state_dict()[key]).max() == pytest.approx(value.abs().max().item(), rel=0.1)
    ours.load_state_dict({k: v.numpy() for k, v in want.items()})
    ndim = 2 if "2d" in name else int(name[4])
    x = np.random.default_rng(0).normal(size=(2, 4, *[6] * ndim)).astype(np.float32)
    np.testing.assert_allclose(ours(x).numpy(), theirs(torch.tensor(x)).detach().numpy(), rtol=1e-4, atol=1e-5)
