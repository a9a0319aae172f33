"""Attributes of modules: state that would not be found is refused, and so are options that do not fit."""

import types
from collections import UserDict, UserList
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tinygrad_bn import Tensor, nn, optim


class Holder(nn.Module):
    def __init__(self, value: Any) -> None:
        self.layer = nn.Linear(2, 2)
        self.value = value


@dataclass
class Block:
    layer: Any
    size: int = 2


def layer() -> nn.Module:
    return nn.Linear(2, 2)


OBJECTS = {
    "namespace": lambda: types.SimpleNamespace(a=layer()),
    "dataclass": lambda: Block(layer()),
    "object of a list": lambda: Block([layer(), layer()]),
    "object of a dictionary": lambda: Block({"a": [nn.Parameter([1.0])]}),
    "object of a parameter": lambda: Block(nn.Parameter([1.0])),
    "object of a tensor": lambda: Block(Tensor([1.0], requires_grad=True)),
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_an_object_that_holds_state_is_refused(kind: str) -> None:
    with pytest.raises(
        TypeError, match=r"^Holder\.value\.(a|layer) would not be found, since value is a .*not a module"
    ):
        Holder(OBJECTS[kind]())


@pytest.mark.parametrize("make", [UserList, lambda layers: UserDict(enumerate(layers))])
def test_collections_of_other_types_are_refused(make: Any) -> None:
    with pytest.raises(TypeError, match=r"Holder\.value is a (UserList|dictionary); use attributes, or a list of mod"):
        Holder(make([layer()]))
    assert list(Holder(make([1, "text", b"bytes"])).children())


def test_an_object_may_keep_what_the_module_has_itself() -> None:
    holder = Holder(Block(None))
    for value in (Block(holder.layer), Block(holder), Block([holder.layer.weight]), Block(3), "text", range(3), b"b"):
        holder.value = value
    optimizer = optim.Adam(holder.parameters())
    holder.layer.weight.grad = Tensor(np.ones((2, 2), np.float32))
    optimizer.step()
    holder.value = optimizer
    for value in (nn.Linear, np.random.default_rng(0), types, layer, lambda: layer(), optimizer.step):
        holder.value = value
    assert [name for name, _ in holder.named_parameters()] == ["layer.weight", "layer.bias"]


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.RMSNorm(4)])
def test_eps_is_checked_when_it_is_set(norm: Any) -> None:
    before = repr(norm)
    for wrong in ("a", -1.0, np.nan, True, *([] if isinstance(norm, nn.RMSNorm) else [None])):
        with pytest.raises((TypeError, ValueError), match="eps has to be"):
            norm.eps = wrong
    with pytest.raises(TypeError, match="training has to be True or False"):
        norm.training = 1
    assert repr(norm) == before
    norm.eps = np.float64(0.5)
    assert "eps=0.5" in repr(norm)
    with pytest.raises(TypeError, match="elementwise_affine has to be True or False"):
        nn.RMSNorm(4, elementwise_affine=1)  # type: ignore[arg-type]
    assert type(norm.eps) is float


def test_layers_of_sequential() -> None:
    for wrong in ([layer()], (layer(),), (layer() for _ in "ab")):
        with pytest.raises(TypeError, match=r"module 0 is a \w+, not a module; unpack it with \*"):
            nn.Sequential(wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"module 1 is an int, not a module$"):
        nn.Sequential(layer(), 3)  # type: ignore[arg-type]
    model = nn.Sequential(layer(), nn.ReLU())
    for index in ("a", 1.0, None, True):
        with pytest.raises(TypeError, match="the index of a module has to be an integer; got"):
            model[index]  # type: ignore[call-overload]
    assert model[np.int64(-1)] is model[1]  # type: ignore[call-overload]


def test_the_shape_of_a_summary() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 2))
    for wrong, error in ((3, TypeError), (None, TypeError), ("3", TypeError), ((2.5,), TypeError), ((-1,), ValueError)):
        words = (
            "each number of input_shape" if isinstance(wrong, tuple) else r"shape of one sample, such as \(3,\); got"
        )
        with pytest.raises(error, match=words):
            model.summary(wrong)
