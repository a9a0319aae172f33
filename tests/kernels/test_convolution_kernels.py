"""The kernels of convolution and pooling against their references, on shapes that reach all of their loops."""

import math
import sys

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tinygrad_bn_kernels.cpu import conv, pool

from tests.tools.processes import output, python
from tests.tools.reference import reference
from tinygrad_bn import Tensor, functional, grad
from tinygrad_bn.backend import kernels_disabled

DTYPES = st.sampled_from([np.float32, np.float64])


@st.composite
def convolutions(draw):
    """x (N, C, *size), weight, bias, the output's gradient; and the options."""
    axes, groups = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    one = st.integers(1, 3)
    kernel, stride, dilation = (tuple(draw(one) for _ in range(axes)) for _ in range(3))
    padding = tuple((draw(st.integers(0, 3)), draw(st.integers(0, 3))) for _ in range(axes))
    size = tuple(draw(st.integers(d * (k - 1) + 1, 40)) for k, d in zip(kernel, dilation, strict=True))
    batch, channels, maps = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 6))
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    shapes = (batch, groups * channels, *size), (groups * maps, channels, *kernel), (groups * maps,)
    return shapes, options, draw(DTYPES), draw(st.integers(0, 99))


def operands(shapes, dtype, seed):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(dtype) for shape in shapes]


def plain(stride=1):
    return {"stride": (stride,) * 2, "padding": ((0, 0),) * 2, "dilation": (1, 1), "groups": 1}


@pytest.mark.compiled
@given(convolutions())
@example((((40, 2, 6, 6), (5, 2, 3, 3), (5,)), plain(), np.float32, 0))  # several images in a run
@example((((2, 1, 40, 40), (4, 1, 3, 3), (4,)), plain(), np.float32, 0))  # an image longer than a run
@example((((2, 3, 40, 41), (5, 3, 2, 3), (5,)), plain(2), np.float64, 0))
def test_convolution_and_its_gradients_equal_the_reference(case):
    shapes, options, dtype, seed = case
    x, weight, bias = operands(shapes, dtype, seed)
    y = reference("conv_with_bias", x, weight, bias, **options)
    g = np.random.default_rng(seed + 1).normal(size=y.shape).astype(dtype)
    wants = (
        y,
        reference("conv_input", g, weight, size=x.shape[2:], **options),
        reference("conv_weight", x, g, kernel=weight.shape[2:], **options),
    )
    gots = (
        conv.conv_with_bias(x, weight, bias, **options),
        conv.conv_input(g, weight, size=x.shape[2:], **options),
        conv.conv_weight(x, g, kernel=weight.shape[2:], **options),
    )
    terms = math.prod(weight.shape[1:]), math.prod(weight.shape[2:]) * len(weight), len(x) * math.prod(y.shape[2:])
    for got, want, count in zip(gots, wants, terms, strict=True):
        assert got.dtype == dtype
        np.testing.assert_allclose(got, want, rtol=0, atol=16 * np.finfo(dtype).eps * (count + 4))


BEFORE_A_WALL = """
import ctypes
import mmap
import numpy as np
from tinygrad_bn_kernels.cpu import conv

def before_a_wall(x):
    "A copy of x right before a page of memory that nobody may read."
    size = -(-x.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = np.frombuffer(mmap.mmap(-1, size + mmap.PAGESIZE), np.uint8)
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(memory.ctypes.data + size), mmap.PAGESIZE, 0) == 0
    copy = memory[size - x.nbytes : size].view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy

for shapes, options, dtype in CASES:
    x, weight, bias = operands = [np.random.default_rng(0).normal(size=shape).astype(dtype) for shape in shapes]
    g = np.ones_like(conv.conv_with_bias(*operands, **options))
    def results(x, weight, bias, g):
        yield conv.conv_with_bias(x, weight, bias, **options)
        yield conv.conv_input(g, weight, size=x.shape[2:], **options)
        yield conv.conv_weight(x, g, kernel=weight.shape[2:], **options)
    for got, want in zip(results(*map(before_a_wall, (*operands, g))), results(*operands, g), strict=True):
        np.testing.assert_array_equal(got, want)
print("read nothing else")
"""
ALL_IN_PLACE = [  # images that need no buffer
    (((40, 2, 6, 6), (5, 2, 3, 3), (5,)), plain(), "f4"),
    (((40, 2, 6, 6), (5, 2, 3, 3), (5,)), plain(), "f8"),
    (((3, 1, 40, 41), (4, 1, 2, 3), (4,)), plain(), "f4"),
    (((2, 3, 1, 5), (1, 3, 1, 2), (1,)), plain(), "f8"),
]


@pytest.mark.compiled
@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
def test_nothing_past_the_end_of_an_operand_is_read():
    assert output(python(BEFORE_A_WALL.replace("CASES", repr(ALL_IN_PLACE)))) == "read nothing else"


@st.composite
def poolings(draw):
    """x with ties, NaN and −∞, and options: half of them the plain 2 × 2."""
    axes, simple = draw(st.integers(1, 2)), draw(st.booleans())
    kernel = stride = (2,) * axes
    padding, dilation = (0,) * axes, (1,) * axes
    if not simple:
        kernel, stride, dilation = (tuple(draw(st.integers(1, 3)) for _ in range(axes)) for _ in range(3))
        padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    size = tuple(draw(st.integers(d * (k - 1) + 1, 40)) for k, d in zip(kernel, dilation, strict=True))
    return size, (kernel, stride, padding, dilation), draw(st.booleans()), draw(DTYPES), draw(st.integers(0, 99))


@pytest.mark.compiled
@given(poolings())
@example(((35, 35), ((2, 2), (2, 2), (0, 0), (1, 1)), False, np.float32, 0))
@example(((16, 9), ((2, 2), (2, 2), (0, 0), (1, 1)), False, np.float64, 1))
def test_max_pooling_and_its_gradient_equal_the_reference(case):
    size, (kernel, stride, padding, dilation), ceil_mode, dtype, seed = case
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 4, (2, 2, *size)).astype(dtype)
    x[rng.random(x.shape) < 0.1] = rng.choice([np.nan, -np.inf])
    t = Tensor(x, requires_grad=True, dtype=np.float64)
    with kernels_disabled():
        try:
            want = getattr(functional, f"max_pool{len(size)}d")(t, kernel, stride, padding, dilation, ceil_mode)
        except ValueError as error:
            assume("nothing but padding" not in str(error))
            raise
        g = rng.normal(size=want.shape).astype(dtype)
        want.backward(g)
    options = {"kernel": kernel, "out": want.shape[2:], "stride": stride, "padding": padding, "dilation": dilation}
    y = pool.max_pool(x, **options)
    np.testing.assert_array_equal(y, want)
    (gx,) = pool.max_pool_vjp(g, y, x, needs=[True], **options)
    np.testing.assert_allclose(gx, t.grad, rtol=0, atol=16 * np.finfo(dtype).eps * 9)


@settings(max_examples=10)
@given(st.sampled_from(["x", "weight"]), st.sampled_from([np.inf, np.nan]), st.integers(0, 99))
def test_nan_and_inf_spread_only_through_the_windows_that_hold_them(where, value, seed):
    rng = np.random.default_rng(seed)
    data = {"x": rng.normal(size=(2, 2, 5, 5)), "weight": rng.normal(size=(3, 2, 3, 3))}
    data[where].flat[rng.integers(data[where].size)] = value
    x, weight = (Tensor(a, requires_grad=True) for a in data.values())

    def gradients():
        with np.errstate(invalid="ignore"):
            return [g.numpy() for g in grad(functional.conv2d(x, weight).sum(), [x, weight])]

    with kernels_disabled():
        wants = gradients()
    for got, want in zip(gradients(), wants, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("function", [
    lambda x: functional.conv2d(x, np.ones((3, 2, 2, 2), np.float32), np.ones(3, np.float32)),
    lambda x: functional.conv_transpose2d(x, np.ones((2, 3, 2, 2), np.float32)),
    lambda x: functional.max_pool2d(x, 2), lambda x: functional.avg_pool2d(x, 2),
    lambda x: functional.adaptive_avg_pool(x, 2), lambda x: functional.adaptive_max_pool(x, 2),
])  # fmt: skip
def test_an_empty_batch_gives_an_empty_batch(function):
    x = Tensor(np.ones((0, 2, 4, 4), np.float32), requires_grad=True)
    y = function(x)
    assert y.shape[0] == 0
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_averages_of_half_precision_are_summed_in_single():
    for value, side in ((1.0, 64), (6e4, 8)):
        x = Tensor(np.full((1, 1, side, side), value, np.float16))
        for y in (functional.avg_pool2d(x, side), functional.adaptive_avg_pool(x, 1)):
            assert y.dtype == np.float16
            assert y.numpy().item() == np.float16(value)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_adaptive_averages_of_other_windows_stay_finite(value):
    x = np.ones((1, 1, 5, 4), np.float32)
    x[0, 0, 0, 0] = value
    y = functional.adaptive_avg_pool(Tensor(x), 2).numpy()
    assert np.isfinite(y).ravel().tolist() == [False, True, True, True]


def test_numpy_integers_as_options_and_empty_sizes():
    two = np.int64(2)
    y = functional.conv2d(np.ones((1, 1, 6, 6)), np.ones((1, 1, 2, 2)), stride=two, padding=two, dilation=two)
    assert y.shape == (1, 1, 4, 4)
    assert functional.max_pool2d(np.ones((1, 1, 4, 4)), two).shape == (1, 1, 2, 2)
    with pytest.raises(ValueError, match="no elements to pool"):
        functional.max_pool2d(np.ones((1, 1, 0, 4)), 2, padding=1)
    with pytest.raises(ValueError, match="groups has to be"):
        functional.conv_transpose2d(np.ones((1, 2, 4, 4)), np.ones((2, 1, 2, 2)), groups=0)


@pytest.mark.compiled
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(("size", "kernel", "stride", "padding", "dilation"), [
    ((7, 9), (3, 2), (2, 1), (1, 1), (1, 2)), ((8, 8), (2, 2), (2, 2), (0, 0), (1, 1)), ((9,), (3,), (2,), (1,), (2,)),
])  # fmt: skip
def test_the_places_of_maxima_equal_the_reference(size, kernel, stride, padding, dilation, dtype):
    """With ties, NaN, and windows that reach into the padding."""
    x = np.random.default_rng(0).integers(-2, 3, (3, 2, *size)).astype(dtype)
    x[x == 2] = np.nan
    out = functional.pooling.pooled_size(size, kernel, stride, padding, dilation, ceil_mode=False)
    options = {"kernel": kernel, "out": out, "stride": stride, "padding": padding, "dilation": dilation}
    places = pool.max_pool_places(x, **options)
    with kernels_disabled():
        np.testing.assert_array_equal(places, functional.pooling.max_pool_places(x, **options))
    assert places.dtype == np.int64
