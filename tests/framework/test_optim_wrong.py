"""Optimisers and schedules refuse what does not fit, and then nothing has changed."""

import math
import warnings
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest

from tinygrad_bn import Tensor, optim
from tinygrad_bn.backend import kernels_disabled

WRONG_STATE = {
    "NaN": np.full(2, np.nan), "infinite": np.full(2, np.inf), "infinite in float32": np.full(2, 1e300),
    "complex": np.ones(2, complex), "objects": np.ones(2, object), "text": "ab", "None": None, "ragged": [[1, 2], [3]],
    "shape": np.ones(3), "number": 3.0,
}  # fmt: skip
WRONG_GROUP = {"params": [None, 3, [1], ["a"], "a", [0, 1]], "lr": [math.nan, -1, "a", None], "betas": [None, (1, 2)]}


def after_a_step(make: Any = optim.Adam) -> tuple[Tensor, optim.Optimizer]:
    p = Tensor([1.0, 2.0], requires_grad=True)
    optimizer = make([p])
    p.grad = Tensor([0.5, -1.0])
    optimizer.step()
    return p, optimizer


def refuses(optimizer: Any, state: Any, match: str = "") -> None:
    before = repr(optimizer.state_dict())
    with pytest.raises((ValueError, TypeError), match=match):
        optimizer.load_state_dict(state)
    assert repr(optimizer.state_dict()) == before


@pytest.mark.parametrize("wrong", WRONG_STATE)
@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_saved_state_that_does_not_fit_changes_nothing(name, wrong):
    if name == "exp_avg_sq" and wrong.startswith("infinite"):
        pytest.skip("squares may overflow in a step")
    _, optimizer = after_a_step()
    state = optimizer.state_dict()
    state["state"][0][name] = WRONG_STATE[wrong]
    refuses(optimizer, state, rf"^the (saved )?state {name} of a parameter of shape \(2,\)")


@pytest.mark.parametrize(
    ("make", "name"),
    [(optim.Adam, "exp_avg_sq"), (optim.RMSprop, "square_avg"), (optim.Adagrad, "sum")],
)
def test_saved_squares_are_not_negative(make, name):
    _, optimizer = after_a_step(make)
    state = optimizer.state_dict()
    state["state"][0][name] = np.array([1.0, -1e-30])
    refuses(optimizer, state, "not negative")


def test_saved_groups_that_do_not_fit_change_nothing():
    _, optimizer = after_a_step()
    for option, values in WRONG_GROUP.items():
        for value in values:
            state = optimizer.state_dict()
            state["param_groups"][0][option] = value
            refuses(optimizer, state, option)
    state = optimizer.state_dict()
    state["state"]["0"] = state["state"][0]
    refuses(optimizer, state, "two saved states")


def test_only_floating_point_tensors_are_trained():
    for p in (Tensor([1, 2]), Tensor([True])):
        with pytest.raises(TypeError, match=r"parameters are floating-point tensors; got one of shape"):
            optim.SGD([p])


def test_what_is_set_by_hand_is_checked():
    for change, error in {
        lambda o: o.param_groups[0].pop("lr"): "has no lr",
        lambda o: o.param_groups[0].update(params=None): "list of tensors",
        lambda o: o.param_groups[0].update(params=[3]): "list of tensors",
        lambda o: setattr(o, "param_groups", [{}]): "list of tensors",
        lambda o: setattr(o, "param_groups", None): "list of tensors",
        lambda o: o.state[o.param_groups[0]["params"][0]].update(exp_avg=np.ones(2, complex)): "dtype complex128",
    }.items():
        p, optimizer = after_a_step()
        before = p.numpy()
        change(optimizer)
        with pytest.raises((TypeError, ValueError), match=error):
            optimizer.step()
        np.testing.assert_array_equal(p.numpy(), before)
    _, optimizer = after_a_step()
    with pytest.raises(AttributeError, match=r"for group in optimizer\.param_groups: group\['lr'\] = nan"):
        optimizer.lr = math.nan


@pytest.mark.parametrize(
    ("name", "value"),
    [("gamma", math.nan), ("gamma", "a"), ("step_size", 0), ("step_size", 2.5), ("t", -1), ("t", "a")],
)
def test_options_of_a_schedule_set_by_hand_are_checked(name, value):
    _, optimizer = after_a_step()
    schedule = optim.StepLR(optimizer, 1)
    setattr(schedule, name, value)
    with pytest.raises((ValueError, TypeError), match=name):
        schedule.step()
    assert (optimizer.param_groups[0]["lr"], schedule.t) == (1e-3, value if name == "t" else 0)


def test_a_schedule_that_fails_changes_no_group():
    class Odd(optim.Schedule):
        def next_lr(self, lr: float, initial: float) -> float:
            return lr / 2 if lr > 0.5 else math.nan

    a, b = (Tensor([1.0], requires_grad=True) for _ in range(2))
    optimizer = optim.SGD([{"params": [a], "lr": 1.0}, {"params": [b], "lr": 0.1}])
    schedule = Odd(optimizer)
    with pytest.raises(ValueError, match="lr has to be 0 or more; got nan"):
        schedule.step()
    assert ([g["lr"] for g in optimizer.param_groups], schedule.t) == ([1.0, 0.1], 0)


@pytest.mark.parametrize("make", [optim.Adam, lambda p: optim.SGD(p, momentum=0.9), optim.Adagrad])
def test_steps_are_undone(make):
    p, optimizer = after_a_step(make)
    before = repr((p, optimizer.state_dict()))
    undo = optimizer._undoing()
    for _ in range(3):
        optimizer.step()
    after = repr((p, optimizer.state_dict()))
    undo()
    assert repr((p, optimizer.state_dict())) == before
    for _ in range(3):
        optimizer.step()
    assert repr((p, optimizer.state_dict())) == after


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("make", [optim.SGD, optim.Adam, optim.AdamW, optim.RMSprop, optim.Adagrad])
@pytest.mark.parametrize("kernels", [True, False])
def test_a_rate_beyond_the_dtype_gives_infinity_without_a_warning(make, dtype, kernels):
    p = Tensor([1.0, 2.0], requires_grad=True, dtype=dtype)
    for options in ({"lr": 1e300}, *([{"lr": 1e300, "momentum": 0.9}] if make in (optim.SGD, optim.RMSprop) else [])):
        p.data = [1.0, 2.0]
        p.grad = Tensor([0.5, -1.0], dtype=dtype)
        with warnings.catch_warnings(), nullcontext() if kernels else kernels_disabled():
            warnings.simplefilter("error")
            make([p], **options).step()
        assert not np.isfinite(p.numpy()).any()
