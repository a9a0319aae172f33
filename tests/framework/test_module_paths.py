"""An error that leaves a network says in which module it was raised, in one note."""

import copy
import pickle

import numpy as np
import pytest

from tinygrad_bn import Tensor, capture, diagnose, nn
from tinygrad_bn.explain import explain

X = np.ones((2, 3), np.float32)


class Failing(nn.Module):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def forward(self, x: Tensor, *others: object) -> Tensor:
        raise self.error


class Encoder(nn.Module):
    """Calls modules in a list, and one that is deeper."""

    def __init__(self, deep: nn.Module) -> None:
        self.layers, self.block = [nn.ReLU(), nn.Linear(3, 3)], nn.Sequential(nn.ReLU(), deep)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.block[1](x)


def notes(model: nn.Module, *args: object) -> list[str]:
    with pytest.raises(Exception) as raised:  # noqa: PT011 - the notes are what is looked at
        model(*args)
    return getattr(raised.value, "__notes__", [])


@pytest.mark.parametrize(
    ("model", "note"),
    [
        (nn.Linear(4, 2), "in module Linear, called with float32 (2, 3)"),
        (nn.Sequential(nn.ReLU(), nn.Linear(4, 2)), "in module 1 (Linear), called with float32 (2, 3)"),
        (
            nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(5), nn.ReLU())),
            "in module 0.1 (BatchNorm1d), called with float32 (2, 4)",
        ),
        (Encoder(nn.Linear(7, 1)), "in module block.1 (Linear), called with float32 (2, 3)"),
        (
            nn.Sequential(Encoder(Encoder(nn.Linear(7, 1)))),
            "in module 0.block.1.block.1 (Linear), called with float32 (2, 3)",
        ),
    ],
)
def test_the_note_has_the_path_and_the_input(model, note):
    assert notes(model, X) == [note]
    assert notes(model, X) == [note]  # not added to what an earlier error left


def test_what_a_module_was_called_with():
    failing = Failing(ValueError("no"))
    assert notes(failing) == ["in module Failing, called with no input"]
    failing = Failing(ValueError("no"))
    assert notes(failing, Tensor([1]), "a", None) == ["in module Failing, called with int64 (1,), 'a', None"]


def test_every_error_but_an_interrupt_gets_one_note():
    for error in (KeyError("key"), StopIteration(), MemoryError()):
        assert notes(nn.Sequential(Failing(error)), X) == ["in module 0 (Failing), called with float32 (2, 3)"]
    for error in (KeyboardInterrupt(), SystemExit()):
        with pytest.raises(type(error)) as raised:
            nn.Sequential(Failing(error))(X)
        assert not hasattr(raised.value, "__notes__")


def test_networks_that_are_deeper_than_pythons_stack_and_state_that_is_not_found():
    model: nn.Module = Failing(ValueError("deep"))
    for _ in range(1000):
        model = nn.Sequential(model)
    with pytest.raises(RecursionError) as raised:
        model(X)
    assert len(raised.value.__notes__) == 1
    hidden = Failing(ValueError("hidden"))
    vars(hidden)["lost"] = {"a": nn.Linear(1, 1)}  # past the check of assignments
    assert notes(hidden, X) == ["in module Failing, called with float32 (2, 3)"]


def test_an_error_keeps_no_module():
    with pytest.raises(ValueError, match="last axis") as raised:
        nn.Sequential(nn.Linear(4, 2))(X)
    for error in (pickle.loads(pickle.dumps(raised.value)), copy.copy(raised.value)):
        assert (str(error), vars(error)) == (str(raised.value), vars(raised.value))
        assert list(vars(error)) == ["__notes__"]


def test_the_note_is_the_same_where_someone_looks_on():
    model, note = nn.Sequential(nn.Linear(4, 2)), ["in module 0 (Linear), called with float32 (2, 3)"]

    def explained(x):
        with explain():
            return model(x)

    def looked_for():
        with diagnose.detect_anomaly():
            return model(Tensor(X))

    for call in (lambda: explained(Tensor(X)), looked_for, lambda: capture(model)(Tensor(X))):
        with pytest.raises(ValueError, match="last axis") as raised:
            call()
        assert raised.value.__notes__ == note
