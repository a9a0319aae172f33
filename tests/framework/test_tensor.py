"""Tensor: construction, repr, NumPy on either side of operators, and rules for changing data."""

import copy
import itertools
import operator
import pickle

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_bn import Tensor, functional, nn, no_grad

REALS = st.floats(-8, 8, width=32)


@pytest.mark.parametrize(
    ("data", "dtype"),
    [
        (1.5, np.float32),
        ([1.0, 2.0], np.float32),
        ([[1, 2], [3, 4]], np.int64),
        (3, np.int64),
        (True, np.bool_),
        (np.float64(1.0), np.float64),
        (np.array([1.0]), np.float64),
        (np.array([1], np.uint8), np.uint8),
        (np.array(1.0, np.float16), np.float16),
    ],
)
def test_dtypes(data, dtype):
    t = Tensor(data)
    assert t.dtype == dtype
    assert t.shape == np.shape(data)
    assert Tensor(data, dtype=np.float64).dtype == np.float64


@pytest.mark.parametrize("data", [None, "a", [1j], object(), ["x"]])
def test_what_is_not_real_numbers_is_refused(data):
    with pytest.raises(TypeError, match="real numbers"):
        Tensor(data)


def test_ragged_lists_and_lists_of_tensors_are_refused():
    with pytest.raises(ValueError, match="equal lengths"):
        Tensor([[1.0], [1.0, 2.0]])
    with pytest.raises(TypeError, match=r"functional\.stack"):
        Tensor([Tensor(1.0), Tensor(2.0)])


def test_only_floats_require_gradients():
    for data in (1, [1, 2], True):
        with pytest.raises(TypeError, match="floating-point"):
            Tensor(data, requires_grad=True)
    t = Tensor([1, 2])
    with pytest.raises(TypeError, match="int64"):
        t.requires_grad = True


def test_repr_shows_shape_dtype_and_origin():
    x = Tensor([[1.0, 2.0]], requires_grad=True)
    assert repr(x) == "Tensor([[1., 2.]], shape=(1, 2), dtype=float32, leaf, requires_grad=True)"
    assert "from mul" in repr(x * 2)
    assert len(repr(Tensor(np.zeros((1000, 1000))))) < 500


ARITHMETIC = operator.add, operator.sub, operator.mul, operator.truediv, operator.pow
COMPARISONS = operator.gt, operator.ge, operator.lt, operator.le, operator.eq, operator.ne
SCALARS = [2, 2.5, True, np.float64(2.5), np.float32(2.5), np.int64(2)]


@pytest.mark.parametrize("scalar", SCALARS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_number_takes_the_dtype_of_the_tensor(scalar, dtype):
    t = Tensor(np.ones(3, dtype), requires_grad=True)
    for operation, operands in itertools.product(ARITHMETIC, ((t, scalar), (scalar, t))):
        y = operation(*operands)
        assert isinstance(y, Tensor)
        assert y.dtype == dtype
        y.backward(np.ones(3))
        assert t.grad.dtype == dtype


@given(hnp.arrays(np.float32, (3,), elements=st.floats(1, 8, width=32)))
def test_numpy_on_either_side_of_an_operator(a):
    t = Tensor([1.0, 2.0, 3.0], requires_grad=True)
    b = t.numpy()
    for operation in (*ARITHMETIC, *COMPARISONS, operator.matmul):
        for operands, arrays in (((a, t), (a, b)), ((t, a), (b, a))):
            y = operation(*operands)
            assert isinstance(y, Tensor)
            assert y.requires_grad == (operation not in COMPARISONS)
            np.testing.assert_array_equal(y.numpy(), operation(*arrays), strict=True)


def test_to_numpy_and_python():
    t = Tensor([[1.0, 2.0], [3.0, 4.0]])
    assert np.asarray(t).tolist() == [[1, 2], [3, 4]]
    assert np.array(t, dtype=np.float64).dtype == np.float64
    assert len(t) == 2
    assert [row.numpy().tolist() for row in t] == [[1, 2], [3, 4]]
    assert float(Tensor(2.0)) == 2.0
    assert int(Tensor(2)) == 2
    assert bool(Tensor([0.0])) is False
    assert Tensor(2.5).item() == 2.5
    for convert in (bool, float, Tensor.item):
        with pytest.raises(ValueError, match="shape"):
            convert(t)
    with pytest.raises(TypeError, match="0-d"):
        len(Tensor(1.0))
    with pytest.raises(TypeError):
        np.exp(t)  # NumPy's ufuncs would lose the graph


# ---- nothing changes under a graph -----------------------------------------------------------------------


def test_data_are_copied_in_and_given_out_read_only():
    a = np.ones(3)
    x = Tensor(a, requires_grad=True)
    y = x * a
    a[:] = 5
    y.backward(np.ones(3))
    assert x.grad.numpy().tolist() == [1, 1, 1]
    for view in (x.data, x.numpy(), np.asarray(x), y.detach().numpy(), x.grad.numpy()):
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 2


def test_item_assignment_is_refused_with_the_rewrite():
    with pytest.raises(TypeError, match=r"functional\.where"):
        Tensor([1.0, 2.0])[0] = 3.0


def test_augmented_assignment():
    x = Tensor([1.0, 2.0], requires_grad=True)
    y = alias = x * 2
    y += x  # while recording: a new tensor, and the old one as it was
    assert alias.numpy().tolist() == [2, 4]
    y.backward(np.ones(2))
    assert x.grad.numpy().tolist() == [3, 3]
    with pytest.raises(RuntimeError, match=r"use x \+ y; update x under no_grad"):
        x += 1
    with no_grad():
        same = x
        x -= 0.5 * x.grad
        x *= 2
        x /= 4
        x += 1
    assert same is x
    assert x.numpy().tolist() == [0.75, 1.25]


def test_assigning_data_keeps_the_dtype_and_checks_the_shape():
    x = Tensor([1.0, 2.0])
    x.data = [3, 4]
    assert x.dtype == np.float32
    assert x.numpy().tolist() == [3, 4]
    with pytest.raises(ValueError, match=r"\(3,\).*\(2,\)"):
        x.data = [1, 2, 3]


def update_data(x):
    x.data = x.numpy() * 2


def update_in_place(x):
    with no_grad():
        x += 1


@pytest.mark.parametrize("update", [update_data, update_in_place])
@pytest.mark.parametrize(("function", "op"), [(lambda x: x * x, "mul"), (lambda x: (x * 2).exp(), "mul")])
def test_a_change_that_a_pending_backward_would_need_is_an_error_naming_the_op(update, function, op):
    x = Tensor([1.0, 2.0], requires_grad=True)
    y = function(x).sum()
    update(x)
    with pytest.raises(RuntimeError, match=f"'{op}' needs a tensor .* changed"):
        y.backward()
    assert x.grad is None


def test_a_changed_result_is_noticed_too():
    x = Tensor([1.0, 2.0], requires_grad=True)
    y = x.exp()
    update_in_place(y)
    with pytest.raises(RuntimeError, match="'exp'"):
        y.backward(np.ones(2))


# ---- methods ---------------------------------------------------------------------------------------------

METHODS = [
    lambda t: t.sum(), lambda t: t.sum(0), lambda t: t.sum((0, 1), keepdims=True), lambda t: t.mean(1),
    lambda t: t.var(0, correction=1), lambda t: t.std(), lambda t: t.max(1), lambda t: t.min(),
    lambda t: t.argmax(1), lambda t: t.reshape(6), lambda t: t.reshape(3, -1), lambda t: t.reshape((3, 2)),
    lambda t: t.transpose(), lambda t: t.transpose(1, 0), lambda t: t.T, lambda t: abs(t), lambda t: -t,
    lambda t: t[0], lambda t: t[:, 1:], lambda t: t[..., None], lambda t: t[[0, 1, 1]], lambda t: t.astype(np.float32),
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@given(hnp.arrays(np.float64, (2, 3), elements=st.floats(-8, 8)))
def test_methods_equal_numpys(method, a):
    def numpys(x):
        return method(_WithCorrection(x) if isinstance(x, np.ndarray) else x)

    np.testing.assert_allclose(method(Tensor(a)).numpy(), np.asarray(numpys(a)), rtol=1e-7, atol=1e-9)


class _WithCorrection(np.ndarray):
    """An ndarray whose var and std know `correction` under any NumPy 2."""

    def __new__(cls, x):
        return x.view(cls)

    def var(self, axis=None, keepdims=False, correction=0):
        return np.asarray(self).var(axis=axis, keepdims=keepdims, ddof=correction)


def test_method_names_for_functions():
    x = Tensor([0.5, 2.0])
    for name in ("exp", "log", "sqrt", "tanh"):
        np.testing.assert_array_equal(getattr(x, name)().numpy(), getattr(np, name)(x.numpy()))
    assert x.relu().numpy().tolist() == [0.5, 2.0]
    assert x.clip(max=1.0).numpy().tolist() == [0.5, 1.0]
    assert np.allclose(x.sigmoid().numpy(), 1 / (1 + np.exp(-x.numpy())))


def test_indexing_with_tensors_and_with_arrays_that_change_later():
    x = Tensor([1.0, 2.0, 3.0], requires_grad=True)
    index = np.array([0, 2, 0])
    y = x[index]
    index[:] = 1
    y.backward(np.ones(3))
    assert x.grad.numpy().tolist() == [2, 0, 1]
    assert x[Tensor([2, 1])].numpy().tolist() == [3, 2]
    assert x[x > 1.5].numpy().tolist() == [2, 3]
    with pytest.raises(IndexError, match=r"getitem\(float32 \(3,\), index=3\)"):
        x[3]


@pytest.mark.parametrize("index", [None, (None,), (None, 1), (0, None)])
def test_none_in_an_index_is_a_new_axis(index):
    x = Tensor([1.0, 2.0, 3.0], requires_grad=True)
    y = x[index]
    np.testing.assert_array_equal(y.numpy(), x.numpy()[index])
    y.backward(np.ones(y.shape))
    assert x.grad.shape == (3,)
    assert x.grad.numpy().sum() == y.size


COPIES = [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))]


@pytest.mark.parametrize("kind", [Tensor, nn.Parameter, nn.Buffer])
@pytest.mark.parametrize("copied", COPIES)
def test_copies_and_pickles(copied, kind):
    x = kind([1.0, 2.0])
    x.requires_grad = True
    (x * x).sum().backward()
    twin = copied(x)
    assert type(twin) is kind
    assert twin.requires_grad
    assert twin.is_leaf
    assert twin.numpy().tolist() == [1, 2]
    assert twin.grad.numpy().tolist() == [2, 4]
    update_in_place(twin)
    assert x.numpy().tolist() == [1, 2]


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("length", [1, 100, 100_000])
def test_a_result_with_a_graph_is_not_copied(copied, length):
    x = y = Tensor([1.0], requires_grad=True)
    for _ in range(length):
        y = y + 1
    with pytest.raises(RuntimeError, match=r"only leaf tensors .* result of 'add' has a graph .* detach\(\)"):
        copied(y)
    assert copied(y.detach()).item() == length + 1
    assert copied([x, y.data])[0] is not None
    y.backward()
    assert x.grad.item() == 1


ERRORS = [
    (lambda: Tensor([1.0, 2.0]) + Tensor([1.0, 2.0, 3.0]), ValueError, r"add\(float32 \(2,\), float32 \(3,\)\)"),
    (
        lambda: Tensor(np.ones((2, 3))) @ Tensor(np.ones((2, 3))),
        ValueError,
        r"matmul\(float64 \(2, 3\), float64 \(2, 3\)\)",
    ),
    (lambda: Tensor([1.0]).sum(axis=1), IndexError, r"sum\(float32 \(1,\), axis=1"),
    (lambda: Tensor([1.0]).reshape(3), ValueError, r"reshape\(float32 \(1,\), shape=3\)"),
    (lambda: Tensor([1.0]) + "a", TypeError, "real numbers"),
    (lambda: Tensor([1.0]) + None, TypeError, r"add\(float32 \(1,\), None\): an operand is None"),
]


@pytest.mark.parametrize(("wrong", "kind", "message"), ERRORS)
def test_errors_name_the_op_shapes_and_dtypes(wrong, kind, message):
    with pytest.raises(kind, match=message):
        wrong()


def test_repeated_indices_in_tuples_accumulate_and_an_empty_list_is_empty():
    x = Tensor(np.zeros((2, 2)), requires_grad=True)
    x[(0, 0, 0), (1, 1, 1)].sum().backward()
    assert x.grad.numpy().tolist() == [[0, 3], [0, 0]]
    assert x[[]].shape == (0, 2)
    assert x[(0, 0, 1),].shape == (3, 2)


def test_every_reduction_takes_axis_and_keepdims_by_position():
    x = Tensor([[1.0, 2.0]])
    for name in ("sum", "mean", "var", "max", "min", "argmax", "argmin", "sum_of_squares", "logsumexp"):
        reduce = getattr(functional, name)
        np.testing.assert_array_equal(reduce(x, 1, True), reduce(x, axis=1, keepdims=True), strict=True)


def test_operands_may_come_by_name_and_options_by_position_but_none_twice():
    x = Tensor([1.0, 2.0], requires_grad=True)
    assert functional.relu(x=x).numpy().tolist() == functional.relu(x).numpy().tolist()
    assert functional.where(x > 1, b=x, a=-x).numpy().tolist() == [1, -2]
    for call in (
        lambda: functional.relu(x, x=x),
        lambda: functional.where(x > 1, a=x),
        lambda: functional.relu(x, 0),
        lambda: functional.sum(x, 0, axis=0),
        lambda: functional.sum(x, 0, True, 1),
    ):
        with pytest.raises(TypeError, match=r"given twice|missing|too many operands|unknown"):
            call()
    with pytest.raises(TypeError, match="unknown: dim"):
        functional.sum(x, dim=0)


def test_in_place_operators_do_not_lose_a_tensor_or_its_fractions():
    for kind in (nn.Parameter, nn.Buffer):
        t = same = kind([2.0])
        with pytest.raises(RuntimeError, match="while recording"):
            t += 1
        with no_grad():
            t **= 2
        assert t is same
        assert t.item() == 4
    total = Tensor(0.0)
    total += Tensor([1.0, 2.0], requires_grad=True).sum()  # a plain constant may grow into a graph
    assert total.requires_grad
    count = Tensor([1, 2])
    with no_grad(), pytest.raises(TypeError, match="float32 data do not fit a tensor of dtype int64"):
        count += 0.7


def test_astype_converts_and_its_gradient_comes_back_in_the_operands_dtype():
    x = Tensor([1.5], requires_grad=True)
    for dtype in (np.float16, np.float64):
        y = x.astype(dtype)
        assert y.dtype == dtype
        y.backward()
        assert x.grad.dtype == np.float32
    assert not x.astype(np.int64).requires_grad


@pytest.mark.parametrize("made", [np.asarray, Tensor, np.ndarray.tolist])
def test_data_that_would_overflow_are_refused(made):
    for dtype, value in ((np.float32, -1e300), (np.float16, 1e5), (np.float16, 70000)):
        t = Tensor([1.0, 2.0], dtype=dtype)
        with pytest.raises(ValueError, match=rf"the data .*\(2,\)\): a number overflows in {np.dtype(dtype).name}"):
            t.data = made(np.array([1, value]))
        assert t.numpy().tolist() == [1, 2]
    t.data = made(np.array([np.inf, np.nan]))
    assert not np.isfinite(t.numpy()).any()
    t.data = made(np.array([65504, 65505]))  # rounded, not infinite
    assert t.numpy().tolist() == [65504, 65504]
    counts = Tensor([1, 2], dtype=np.int8)
    with pytest.raises(OverflowError, match=r"the data \(int64 \(2,\)\): int8 cannot hold a number"):
        counts.data = made(np.array([1, 300]))
    counts.data = made(np.array([1, -128]))
    assert counts.numpy().tolist() == [1, -128]


def test_an_update_that_would_overflow_is_refused():
    t = Tensor([1.0, 2.0])
    with no_grad(), pytest.raises(ValueError, match="a number overflows in float32"):
        t += np.array([1.0, 1e300])
    assert t.numpy().tolist() == [1, 2]
