"""Products of large matrices, against NumPy in float64 and for any number of threads."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tinygrad_bn_kernels.cpu import linear, products

from tests.tools.work import MATRICES, matrices
from tinygrad_bn import Tensor, functional


def bound(a, b):
    """A bound of each element's rounding error: 8 ε (Σ |a| |b| + 1)."""
    return 8 * np.finfo(a.dtype).eps * (np.abs(a) @ np.abs(b) + 1)


@given(
    seed=st.integers(0, 99),
    size=st.tuples(*[st.integers(1, 140)] * 3),
    dtype=st.sampled_from([np.float32, np.float64]),
    layouts=st.tuples(*[st.integers(0, 2)] * 2),
)
def test_every_shape_and_layout(seed, size, dtype, layouts):
    a, b, bias = matrices(seed, *size, dtype, layouts)
    got = products.product(a, b, bias)
    assert got.dtype == dtype
    wide = a.astype(np.float64) @ b.astype(np.float64) + bias
    assert (np.abs(got - wide) <= bound(a.astype(np.float64), b.astype(np.float64)).astype(dtype) + bound(a, b)).all()


@pytest.mark.parametrize("k", [products.TERMS - 1, products.TERMS, 2 * products.TERMS + 1])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_more_terms_than_are_added_at_a_time(k, dtype):
    a, b, bias = matrices(1, 37, k, 61, dtype)
    assert (np.abs(products.product(a, b, bias) - (a.astype(float) @ b.astype(float) + bias)) <= bound(a, b)).all()


def test_nan_and_infinity_stay_where_they_belong():
    a, b, bias = matrices(2, 50, 40, 60, np.float32)
    a[3, 5], a[7, 2], b[9, 11] = np.nan, np.inf, np.nan
    got = products.product(a, b, bias)
    with np.errstate(invalid="ignore"):  # some builds of OpenBLAS warn
        want = np.matmul(a, b)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    np.testing.assert_array_equal(np.isinf(got), np.isinf(want))


def guarded(shape, dtype, order="C"):
    """An array with 32 NaN before and after it, and the whole memory."""
    memory = np.full(np.prod(shape) + 64, np.nan, dtype)
    return memory[32:-32].reshape(shape, order=order), memory


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("orders", ["CC", "CF", "FC", "FF"])
def test_tiles_that_are_not_whole_stay_within_the_matrices(monkeypatch, dtype, orders):
    """A write beyond the result would replace its NaN borders; a read beyond the operands would give NaN."""
    for size in itertools.product((4, 5, 7, 8), (1, 4, 8, 9, 19), (1, 4, 11, 12, 13, 24, 25, 47)):
        a, b, bias = matrices(5, *size, dtype)
        (left, _), (right, _) = (guarded(x.shape, dtype, order) for x, order in zip((a, b), orders, strict=True))
        left[...], right[...] = a, b
        out, memory = guarded((len(a), b.shape[1]), dtype)
        monkeypatch.setattr(products, "empty", lambda *_, out=out: out)
        got = products.product(left, right, bias)
        assert (np.abs(got - (a.astype(float) @ b.astype(float) + bias)) <= bound(a, b)).all()
        assert np.isnan(memory[:32]).all()
        assert np.isnan(memory[-32:]).all()


@pytest.mark.compiled
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", MATRICES)
def test_layouts_do_not_change_a_bit(dtype, size):
    results = set()
    for layouts in itertools.product(range(3), range(3)):
        a, b, bias = matrices(3, *size, dtype, layouts)
        got = products.product(a, b, bias)
        results.add(got.tobytes())
        assert (np.abs(got - (a.astype(float) @ b.astype(float) + bias)) <= bound(a, b)).all()
    assert len(results) == 1


@pytest.mark.parametrize("rows", [1, 3, 150])
@pytest.mark.parametrize("kinds", ["fff", "ddd", "eee", "fdf", "dff", "efd", "ffd"])
def test_layers_and_their_gradients_use_the_products(monkeypatch, rows, kinds):
    """BLAS, which takes small, thin and mixed-precision products, agrees with the kernel up to rounding."""
    rng = np.random.default_rng(4)
    shapes = (2, rows, 70), (90, 70), (90,)
    arrays = [rng.normal(size=shape).astype(kind) for kind, shape in zip(kinds, shapes, strict=True)]
    dtype, results = np.result_type(*arrays), []
    g = rng.normal(size=(2, rows, 90)).astype(dtype)
    product, calls = products.product, []
    monkeypatch.setattr(products, "product", lambda *operands: calls.append(small) or product(*operands))
    for small in (0, 1 << 40):
        monkeypatch.setattr(linear, "SMALL", small)
        monkeypatch.setattr(linear, "THIN", 0 if kinds == "ddd" else linear.THIN)
        leaves = [Tensor(x, requires_grad=True) for x in arrays]
        y = functional.linear(*leaves)
        y.backward(Tensor(g))
        results.append([y.numpy(), *(leaf.grad.numpy() for leaf in leaves), (leaves[0][0] @ leaves[1].T).numpy()])
    assert set(calls) <= {0}
    assert calls or kinds not in ("fff", "ddd")
    for large, by_blas in zip(*results, strict=True):
        assert large.dtype == by_blas.dtype
        np.testing.assert_allclose(large, by_blas, rtol=1e-11 if kinds == "ddd" else 1e-3, atol=1e-3)


def test_the_kernel_refuses_matrices_that_do_not_fit():
    g, x, weight = np.ones((3000, 50), "f4"), np.ones((3000, 64), "f4"), np.ones((40, 64), "f4")
    with pytest.raises(ValueError, match=r"\(3000, 50\) and \(40, 64\) cannot be multiplied"):
        linear.linear_vjp(g, g, x, weight, weight[:, 0], needs=[True, True, True])


def test_a_layer_without_outputs_or_samples():
    for rows, out in ((5, 0), (0, 3)):
        x = Tensor(np.ones((rows, 4), np.float32), requires_grad=True)
        functional.linear(x, np.ones((out, 4), np.float32), np.ones(out, np.float32)).sum().backward()
        np.testing.assert_array_equal(x.grad, np.zeros((rows, 4)))
