"""The reduction kernels against NumPy in float64: every shape, layout, axis and path through the loops.

Small arrays do not reach the loops, so most tests lower the thresholds until they do.
"""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tinygrad_bn_kernels.cpu import reduce, reduce_loops, threads

from tests.tools.thresholds import thresholds
from tests.tools.work import PLACES, REDUCTIONS
from tinygrad_bn import Tensor, backend, functional, more_ops, ops
from tinygrad_bn.backend import find_kernel, kernels_disabled


def may_decline(name, x, terms):
    """Whether a kernel may leave x to NumPy: there is nothing to add up, or x is small."""
    return terms == 1 or (name in PLACES and x.size <= reduce.SMALL)


def compare(name, x, axis, keepdims=False):
    """The kernel's result equals that of NumPy in float64; False if the kernel declines, and may."""
    with np.errstate(all="ignore"):
        got = find_kernel(name, "cpu")(x, axis=axis, keepdims=keepdims)
        want = REDUCTIONS[name](x.astype(np.float64), axis=axis, keepdims=keepdims)
    terms = x.size * (2 if name == "mean_and_var" else 1) // want.size
    if got is NotImplemented:
        assert may_decline(name, x, terms), f"{name} declines {x.shape} over {axis}"
        return False
    assert got.shape == want.shape
    assert got.dtype == (np.intp if name in PLACES else x.dtype)
    if name in (*PLACES, "max", "min"):
        np.testing.assert_array_equal(got, want)
        return True
    largest = np.abs(x, where=np.isfinite(x), out=np.zeros(x.shape)).max(initial=1)
    tolerance = 1e-13 if x.dtype == np.float64 else 1e-6
    scale = largest * (terms if "sum" in name else 1)
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * scale)
    return True


@st.composite
def strided(draw):
    """An array of any memory layout, with ties, and perhaps with NaN and Inf."""
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 4, 7, 17, 41]), max_size=4))
    while math.prod(shape) > 9000:
        shape.pop()
    order = draw(st.permutations(range(len(shape))))  # in which the axes lie in memory
    steps = draw(st.lists(st.sampled_from([1, 1, 1, 2, -1, -3]), min_size=len(shape), max_size=len(shape)))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    base = np.asarray(rng.normal(size=[shape[i] * abs(steps[i]) for i in order]).round(1), dtype)
    x = base[(*(slice(None, None, steps[i]) for i in order), ...)].transpose(np.argsort(order))
    for value in draw(st.lists(st.sampled_from([np.nan, np.inf, -np.inf]), max_size=3)):
        x[np.unravel_index(rng.integers(x.size), x.shape)] = value
    return x


def axes(draw, ndim, tuples=True):
    if not ndim or draw(st.integers(0, 4)) == 0:
        return None
    chosen = draw(st.lists(st.integers(0, ndim - 1), min_size=1, max_size=ndim if tuples else 1, unique=True))
    signed = tuple(a - ndim if draw(st.booleans()) else a for a in chosen)
    return signed if tuples and draw(st.booleans()) else signed[0]


@pytest.mark.parametrize("name", REDUCTIONS)
@settings(max_examples=6 * settings.default.max_examples)  # there are many paths, and each example is quick
@given(st.data(), strided(), st.booleans(), st.sampled_from([8, 40]), st.sampled_from([1, 1 << 60]))
def test_equals_numpy(name, data, x, keepdims, piece, parallel_from):
    axis = axes(data.draw, x.ndim, tuples=name not in PLACES)
    before = x.copy()
    with thresholds(piece, parallel_from):
        compare(name, x, axis, keepdims)
    compare(name, x, axis, keepdims)
    np.testing.assert_array_equal(x, before)


@given(st.data(), strided())
def test_sum_to_and_the_sum_of_all_squares_equal_numpy(data, x):
    lead = data.draw(st.integers(0, x.ndim))
    shape = tuple(data.draw(st.sampled_from([1, n])) for n in x.shape[lead:])
    repeated = tuple(i for i, n in enumerate(shape, start=lead) if n == 1)
    wide = x.astype(np.float64)
    with np.errstate(all="ignore"), thresholds():
        got, norm = find_kernel("sum_to", "cpu")(x, shape=shape), find_kernel("squared_norm", "cpu")(x)
        want, squares = wide.sum(axis=(*range(lead), *repeated)).reshape(shape), (wide * wide).sum()
    assert (got is NotImplemented) == (want.size == x.size)
    if got is not NotImplemented:
        assert (got.shape, got.dtype) == (shape, x.dtype)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * x.size if x.dtype == np.float32 else 1e-10)
    assert (norm is NotImplemented) == (x.size == 1)
    if norm is not NotImplemented:
        np.testing.assert_allclose(norm, squares, rtol=1e-12)


# Beyond the real thresholds: rows long enough for four streams and for several pieces, columns that are narrow, wide,
# in several pieces, and images whose channels are kept.
LARGE = [
    ((40_003,), None),
    ((3, 5003), -1),
    ((9, 5003), 0),
    (((1 << 20) | 1, 1), 0),
    ((90_001, 3), 0),
    ((301, 2500), 0),
    ((7, 6, 20, 20), (0, 2, 3)),
    ((7, 6, 20, 20), (1, 3)),
    ((5, 40, 3, 30), (3, 0)),
    ((70, 30, 5), (0, 2)),
    ((2000, 2, 10), 1),
    ((3, 20_000), 0),
    ((20_000, 3), 1),
    ((700, 9), 1),
]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("shape", "axis"), LARGE)
def test_large_common_cases_equal_numpy_and_are_not_declined(shape, axis, dtype):
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape).astype(dtype)
    for name in REDUCTIONS:
        if name not in PLACES:
            assert compare(name, x, axis), name
        elif not isinstance(axis, tuple):
            assert compare(name, x, axis), name
            with thresholds(piece=1 << 14):
                assert compare(name, x, axis), name


@pytest.mark.parametrize("shape", [(60, 2), (2, 60), (13, 9)])
@pytest.mark.parametrize("name", [*PLACES, "max", "min"])
def test_nan_wins_anywhere_and_the_first_index_of_a_tie(name, shape):
    with thresholds():
        for axis in (None, 0, 1):
            assert compare(name, np.zeros(shape), axis)
            for place in np.ndindex(shape):
                x = np.zeros(shape)
                x[place] = x[1, 1] = np.nan
                assert compare(name, x, axis)


@pytest.mark.parametrize("value", [2.0, np.nan])
@pytest.mark.parametrize("name", [*PLACES, "max", "min"])
def test_an_extreme_after_the_last_whole_piece_of_a_flat_array(name, value):
    with thresholds(piece=8):
        for size in range(41, 48):
            for place in range(40, size):
                x = np.random.default_rng(size).uniform(-1, 1, size)
                x[place] = value if "max" in name else -value
                assert compare(name, x, None)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", [*PLACES, "max", "min"])
def test_rows_longer_than_a_block(monkeypatch, name, dtype):
    """NaN and ties within a block, in different blocks, and after the last whole vector."""
    monkeypatch.setattr(threads, "PARALLEL_FROM", 0)
    block = reduce_loops.BLOCK
    length, i, j = 2 * block + 3, block + block // 4, 2 * block - 9
    places = [(), (0,), (i,), (i, j), (j, j + 1), (length - 1,), (block - 1, block), (1, length - 1)]
    noise = np.random.default_rng(0).uniform(-1, 1, (2 * len(places), length)).astype(dtype)
    for row, where in enumerate(places):
        noise[2 * row, list(where)] = np.nan
        noise[2 * row + 1, list(where)] = 2 if "max" in name else -2
    assert compare(name, noise, 1)


@pytest.mark.parametrize("shape", [(8192,), (8192, 1), (64, 128), (1, 8192, 3)])
def test_small_terms_survive_large_ones_that_cancel(shape):
    x = np.repeat(np.array([1e8, 1, -1e8, 1], np.float32), 2048)
    x = np.broadcast_to(x[:, None], (8192, 3)).reshape(shape) if shape[-1] == 3 else x.reshape(shape)
    axis = None if shape[-1] != 3 else 1
    for layout in (x, np.asfortranarray(x)):
        assert np.all(find_kernel("sum", "cpu")(layout, axis=axis) == 4096)
        assert np.all(find_kernel("mean", "cpu")(layout, axis=axis) == 0.5)
        assert np.all(find_kernel("mean_and_var", "cpu")(layout, axis=axis)[0] == 0.5)


@pytest.mark.parametrize("shape", [(4, 2000), (8000,), (200, 40)])
def test_float32_does_not_overflow_where_float64_does_not(shape):
    x = np.full(shape, 3e38, np.float32)
    x[::2] *= -1
    if x.ndim == 1:
        x = x.reshape(4, -1).T.ravel()  # neighbours of one sign
    for axis in (None, 0):
        for name in ("sum", "mean"):
            got = find_kernel(name, "cpu")(x, axis=axis)
            np.testing.assert_array_equal(got, np.zeros(got.shape))
    assert find_kernel("squared_norm", "cpu")(x) == pytest.approx(9e76 * x.size, rel=1e-6)


@given(strided(), st.sampled_from([0.1, -3.3, 1e-30, 3e38, 1e6]), st.data())
def test_equal_numbers_have_exactly_that_mean_and_the_variance_0(x, value, data):
    x = np.full_like(x, value, np.float32)
    axis = axes(data.draw, x.ndim)
    assume(x.size > np.max(x, axis=axis).size)  # or there is nothing to reduce, which the kernels decline
    with thresholds():
        for name, want in (("mean", [value]), ("var", [0]), ("mean_and_var", [value, 0])):
            got = find_kernel(name, "cpu")(x, axis=axis)
            for part, number in zip(got if len(want) == 2 else [got], want, strict=True):
                assert np.all(part == np.float32(number))


@pytest.mark.parametrize("axis", [None, 0, 1, (0, 2)])
@pytest.mark.parametrize("first", [1e6, -1e7])
@pytest.mark.parametrize("shape", [(10, 20, 10), (50, 60, 20), (300, 9, 3)])
def test_variance_is_right_at_an_offset(shape, first, axis):
    x = np.random.default_rng(0).normal(size=shape) + 1e6
    x[0, 0, 0] = first
    for name, number in (("var", ...), ("mean_and_var", 1)):
        for exact, rtol in ((x.astype(np.float32), 1e-6), (x - 1e6, 1e-13)):
            got, want = find_kernel(name, "cpu")(exact, axis=axis)[number], np.var(exact, axis=axis, dtype=np.float64)
            np.testing.assert_allclose(got, want, rtol=rtol)


# ---- what the kernels decline, through the public functions ------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 4), (70, 80)])
@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.bool_, np.float16])
def test_other_dtypes_give_the_results_of_numpy(dtype, shape):
    x = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    for axis in (None, 0, (1, 0)):
        for f, reference in (
            (ops.sum, np.sum),
            (more_ops.max, np.max),
            (functional.mean, np.mean),
            (functional.var, np.var),
        ):
            got, want = np.asarray(f(Tensor(x), axis=axis)), reference(x.astype(np.float64), axis=axis)
            np.testing.assert_allclose(got, want, rtol=2e-3 if dtype == np.float16 else 1e-6)
    np.testing.assert_array_equal(np.asarray(more_ops.argmax(Tensor(x), axis=1)), np.argmax(x, axis=1))


@pytest.mark.parametrize("shape", [(3, 4), (70, 80)])
@pytest.mark.parametrize("axis", [2, -3, (0, 2), (1, 1), (0, -2)])
def test_a_wrong_axis_is_an_error_that_names_the_op(axis, shape):
    for f in (ops.sum, more_ops.max, more_ops.argmax, functional.mean, functional.var, functional.sum_of_squares):
        with pytest.raises((IndexError, ValueError, TypeError), match=rf"{f.__name__}.*axis|{f.__name__}.*tuple"):
            f(Tensor(np.ones(shape)), axis=axis)


@pytest.mark.parametrize("shape", [(3, 4), (70, 80)])
@pytest.mark.parametrize("axis", [True, (0, True), 1.0, "0", [0, 1], np.array([0, 1])])
def test_an_axis_of_a_wrong_type_is_an_error_at_any_size(axis, shape):
    for f in (ops.sum, more_ops.argmax, functional.mean, functional.var):
        with pytest.raises(TypeError, match="axis is an integer, a tuple of integers, or None"):
            f(Tensor(np.ones(shape)), axis=axis)


def test_numpys_integers_are_axes_to_kernels_too(monkeypatch):
    seen = []

    def kernel(*arrays, axis=None, **options):
        seen.append(axis)
        return NotImplemented

    monkeypatch.setattr(backend, "find_kernel", lambda name, device: kernel)
    functional.var(np.ones((3, 4)), np.int64(1))
    functional.max(np.ones((3, 4)), axis=(np.int8(1), 0))
    assert (repr(seen[0]), repr(seen[-1])) == ("1", "(1, 0)")


@pytest.mark.parametrize("dtype", [np.float32, ">f4", np.float64])
def test_variance_is_exact_at_an_offset_without_kernels_too(dtype):
    x = (1e6 + np.random.default_rng(0).normal(size=(5000, 8))).astype(dtype)
    want = x.astype(np.float64).var(axis=0)
    with kernels_disabled():
        np.testing.assert_allclose(functional.var(x, 0), want, rtol=3e-7)
        np.testing.assert_allclose(functional.std(x, np.int64(0)), np.sqrt(want), rtol=3e-7)


def test_empty_arrays_give_the_results_of_numpy():
    x = Tensor(np.zeros((0, 3)))
    for f in (ops.sum, functional.sum_of_squares):
        assert f(x, axis=0).numpy().tolist() == [0, 0, 0]
    for f in (ops.sum, more_ops.max, more_ops.argmax, functional.mean, functional.var, functional.logsumexp):
        assert f(x, axis=1).shape == (0,)
    with np.errstate(invalid="ignore"):
        assert np.isnan([functional.mean(x).item(), functional.var(x).item()]).all()
    for f in (more_ops.max, more_ops.min, more_ops.argmax):
        with pytest.raises(ValueError, match=r"empty|zero-size"):
            f(x, axis=0)


@pytest.mark.parametrize("shape", [(2000, 3), (30, 100), (5, 40, 4, 30), (2, 300_000)])
def test_an_infinite_element_changes_no_other_result(shape):
    """Shifts come from first elements: one is infinite, another so far off that its results are computed again."""
    for dtype in (np.float32, np.float64):
        x = np.random.default_rng(0).normal(size=shape).astype(dtype)
        x[0, 0], x[1, 1:] = np.inf, x[1, 1:] + 1000
        x[:, -1] += 1000
        x[0, -1] = 0
        for axis in (0, 1, None, tuple(range(x.ndim))[2:] or None, (0, *range(2, x.ndim))):
            for layout in (x, np.asfortranarray(x)):
                assert all(compare(name, layout, axis) for name in ("sum", "max", "var", "mean_and_var"))


@pytest.mark.parametrize("columns", [1, 3, 7, 60])
@pytest.mark.parametrize("extreme", [5.0, np.nan])
def test_the_last_rows_of_narrow_columns_count(columns, extreme):
    """A loop takes several rows at once, and the remainder apart."""
    for rows in range(20_000, 20_000 + 64 // columns + 1):
        x = np.zeros((rows, columns), np.float32)
        x[-1] = extreme
        assert compare("max", x, 0)
        assert compare("min", -x, 0)


def test_a_sum_of_many_keeps_the_digits_of_float64():
    x = np.full(10**6, 0.1)
    assert abs(find_kernel("sum", "cpu")(x, axis=None) - 1e5) < 1e-8
    assert abs(find_kernel("sum", "cpu")(x.reshape(-1, 4), axis=0) - 25e3).max() < 1e-8


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_variance_of_fewer_elements_than_its_correction_is_infinite(dtype):
    for constant, want in ((False, np.inf), (True, np.nan)):
        x = Tensor(np.array([1, 1 if constant else 2], dtype))
        assert np.isnan(want) == np.isnan(functional.var(x, correction=3).item())
        with kernels_disabled(), np.errstate(all="ignore"):
            np.testing.assert_equal(functional.var(x, correction=3).item(), want)
