"""What is saved is read back the same, bit for bit: values of Python, arrays and models."""

import math
import struct

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from tinygrad_bn import nn
from tinygrad_bn.checkpoint import read, save, save_model
from tinygrad_bn.nn import Buffer, Parameter

DTYPES = "?bhilqBHILQefd"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("values") / "a.safetensors"


@st.composite
def arrays(draw, dtypes=DTYPES):
    """Also big-endian ones, those without axes or elements, and views with any strides."""
    dtype = np.dtype(draw(st.sampled_from(dtypes))).newbyteorder(draw(st.sampled_from("<>")))
    a = draw(arrays_of.arrays(dtype, arrays_of.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)))
    view = draw(st.sampled_from(("whole", "turned", "backward", "every other", "read-only")))
    if view == "turned":
        return a.T
    if view == "backward" and a.ndim:
        return a[::-1]
    if view == "every other" and a.ndim:
        return a[..., ::2]
    a.flags.writeable = view != "read-only"
    return a


NUMBERS = st.none() | st.booleans() | st.integers() | st.floats() | st.integers(5000, 40000).map(lambda n: -(7**n))
KEYS = st.text(max_size=3) | st.integers(-2, 2) | st.sampled_from(("$array", "$int", "$tuple", "$dict", "1", "a/b"))
VALUES = st.recursive(
    NUMBERS | st.text(max_size=5) | arrays(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(KEYS, inner, max_size=3)
    ),
    max_leaves=8,
)


def described(value):
    """Type and bits of a value, and all inside it."""
    if isinstance(value, np.ndarray):
        native = value.astype(value.dtype.newbyteorder("="), order="C")
        return "array", native.dtype.name, value.shape, native.tobytes()
    if isinstance(value, float):
        return "float", "nan" if math.isnan(value) else struct.pack("d", value)
    if isinstance(value, list | tuple):
        return type(value).__name__, [described(v) for v in value]
    if isinstance(value, dict):
        return "dict", [(type(k), k, described(v)) for k, v in value.items()]
    return type(value).__name__, value


A = np.arange(2)


@given(value=VALUES, named=st.dictionaries(st.text(max_size=3), arrays(), max_size=2))
@example(value={1: A, "1": A + 1, "a": {"b": A + 2}, "a/b": A + 3}, named={"a": A + 4, "a/b": A + 5})  # names alike
@example(value=[-0.0, math.nan, math.inf, -math.inf, 5e-324, "\ud800", "\0", 10**4300, -(1 << 10_000)], named={})
@example(value=[{"$int": "0x1"}, {"$tuple": [1]}, {"a": 1, "$dict": 2}, {2: 3, "2": (4,)}, (), {}, []], named={})
def test_values_come_back_the_same(value, named, path):
    save(path, nn.ReLU(), extra=value, arrays=named)
    got = read(path)
    assert described(got.extra) == described(value)
    assert described(got.arrays) == described(named)
    str(got)


@pytest.mark.parametrize(
    "value",
    [
        object(), {1, 2}, b"bytes", 1j, np.array([1j]), np.array(["a"]), np.array([None]),
        np.array([1.0], np.longdouble), np.array(["2020-01-01"], "M8[D]"), np.array([(1, 2)], "i4,i4"),
        {1.5: 2}, {True: 1}, {(1,): 2}, [[{"a": print}]],
    ],
)  # fmt: skip
def test_what_cannot_be_saved_is_named_and_nothing_is_written(value, tmp_path):
    with pytest.raises(TypeError, match=r"extra/inner"):
        save(tmp_path / "a.safetensors", nn.ReLU(), extra={"inner": value})
    assert not list(tmp_path.iterdir())


class Holder(nn.Module):
    """Tensors of any kind, some under two keys."""

    def __init__(self, tensors):
        self.inner = nn.Identity()
        for place, name, tensor in tensors:
            setattr(self.inner if place else self, name, tensor)


@st.composite
def holders(draw):
    """A model, and one of the same form with other values."""
    own, others = [], []
    for i in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from((Parameter, Buffer)))
        values = draw(arrays("efd" if kind is Parameter else DTYPES))
        values = values.astype(values.dtype.newbyteorder("="))
        tensors = kind(values), kind(np.zeros_like(values))
        for place, name in draw(st.sampled_from((((0, f"t{i}"),), ((1, f"t{i}"),), ((0, f"t{i}"), (1, f"s{i}"))))):
            own.append((place, name, tensors[0]))
            others.append((place, name, tensors[1]))
    return Holder(own), Holder(others)


@given(models=holders(), whole=st.booleans())
def test_models_come_back_the_same(models, whole, path):
    own, other = models
    save(path, own) if whole else save_model(path, own)
    before = [id(t) for _, t in other.named_tensors()]
    other.load(path)
    assert described(other.state_dict()) == described(own.state_dict())
    assert [id(t) for _, t in other.named_tensors()] == before, "shared tensors stay shared"
    assert described(read(path).model) == described(own.state_dict())


def test_names_that_a_file_cannot_hold(tmp_path):
    model = nn.ReLU()
    setattr(model, "a/b", Parameter([1.0]))
    with pytest.raises(ValueError, match="'a/b' cannot be the name"):
        model.save(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_long_list_of_numbers_is_an_array_in_the_file(tmp_path):
    """100 MB of JSON are the limit of the library."""
    values = [0.1 * i for i in range(1000)] + [float("nan"), -0.0]
    path = save(tmp_path / "a.safetensors", nn.Linear(1, 1), extra={"losses": values})
    assert path.stat().st_size < 8 * len(values) + 4000
    got = read(path).extra["losses"]
    assert repr(got) == repr(values)
    assert {type(v) for v in got} == {float}
    with pytest.raises(ValueError, match="keep numbers in arrays"):
        save(path, nn.Linear(1, 1), extra="x" * 100_000_000)
    assert read(path).extra["losses"][1] == 0.1
