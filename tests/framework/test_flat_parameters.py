"""Optimisers update small parameters together, in one array: with the same results as one by one."""

import copy
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_bn import Tensor, nn, optim
from tinygrad_bn import functional as F
from tinygrad_bn.optim import flat

SHAPES = [(), (3,), (2, 5), (0,), (1,), (4, 0, 2), (7, 3, 2), (1030,), (2, 2)]
ALL = [
    (optim.SGD, {}),
    (optim.SGD, {"weight_decay": 0.1}),
    (optim.SGD, {"momentum": 0.9}),
    (optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (optim.SGD, {"momentum": 0.9, "dampening": 0.5}),
    (optim.Adam, {}),
    (optim.Adam, {"betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.1}),
    (optim.AdamW, {"weight_decay": 0.3}),
    (optim.RMSprop, {}),
    (optim.RMSprop, {"momentum": 0.9, "centered": True, "weight_decay": 0.1}),
    (optim.Adagrad, {"lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.5}),
]
every_optimizer = pytest.mark.parametrize(("kind", "options"), ALL)


def parameters(seed=0, shapes=SHAPES, dtypes=(np.float32,)):
    rng = np.random.default_rng(seed)
    return [nn.Parameter(np.asarray(rng.normal(size=s), dtypes[i % len(dtypes)])) for i, s in enumerate(shapes)]


def give_gradients(params, seed, missing=()):
    rng = np.random.default_rng(seed)
    for i, p in enumerate(params):
        g = rng.uniform(0.5, 2, p.shape) * rng.choice([-1, 1], p.shape)  # float16 cannot hold squares of small ones
        p.grad = None if i in missing else Tensor(np.asarray(g, p.dtype))


def assert_same(params, others):
    """To the bit, or the last one: the compiler may round differently at the end of an array."""
    for p, q in zip(params, others, strict=True):
        assert (p.shape, p.dtype) == (q.shape, q.dtype)
        np.testing.assert_array_max_ulp(p.numpy(), q.numpy(), maxulp=1)


class Separate:
    """One optimiser for each parameter, with the interface of one for all."""

    def __init__(self, kind, params, **options):
        self.each = [kind([p], **options) for p in params]

    def step(self):
        for optimizer in self.each:
            optimizer.step()


@every_optimizer
@given(st.data())
def test_one_optimizer_for_all_equals_one_for_each(kind, options, data):
    """With missing gradients, frozen parameters, assignments and mixed dtypes, in any order."""
    dtypes = data.draw(st.sampled_from([[np.float32], [np.float64], [np.float32, np.float64, np.float16]]))
    ours, theirs = parameters(dtypes=dtypes), parameters(dtypes=dtypes)
    together, separate = kind(ours, lr=0.05, **options), Separate(kind, theirs, lr=0.05, **options)
    for step in range(data.draw(st.integers(2, 6))):
        missing = data.draw(st.sets(st.integers(0, len(ours) - 1)) | st.just(set()))
        frozen = data.draw(st.sets(st.integers(0, len(ours) - 1), max_size=2) | st.just(set()))
        assigned = data.draw(st.none() | st.integers(0, len(ours) - 1))
        for params, optimizer in ((ours, together), (theirs, separate)):
            give_gradients(params, step, missing)
            for i, p in enumerate(params):
                p.requires_grad = i not in frozen
            if assigned is not None:
                params[assigned].data = params[assigned].numpy() * 0.5 + 1
            optimizer.step()
        assert_same(ours, theirs)


@every_optimizer
def test_parameters_without_gradient_or_frozen_keep_the_same_array(kind, options):
    params = parameters()
    optimizer = kind(params, lr=0.1, **options)
    for step in range(4):
        give_gradients(params, step, missing={1} if step % 2 else ())
        params[2].requires_grad = step < 2
        before = [(p._data, p.numpy().copy()) for p in params]
        optimizer.step()
        for i, (p, (array, values)) in enumerate(zip(params, before, strict=True)):
            stays = (i == 1 and step % 2) or (i == 2 and step >= 2)
            assert p._data is array if stays else p.size == 0 or (p.numpy() != values).any()
            np.testing.assert_array_equal(array, values, err_msg="an array was written into")


@every_optimizer
def test_a_parameter_assigned_to_between_steps_is_used(kind, options):
    ours, theirs = parameters(), parameters()
    together, separate = kind(ours, lr=0.1, **options), Separate(kind, theirs, lr=0.1, **options)
    for step in range(4):
        for params, optimizer in ((ours, together), (theirs, separate)):
            give_gradients(params, step)
            optimizer.step()
            params[1].data = np.full(params[1].shape, 5.0 + step)
            params[0].data = 7.0
    assert ours[1].numpy().tolist() == [8, 8, 8]
    assert_same(ours, theirs)


@every_optimizer
def test_a_graph_from_before_a_step_keeps_its_values_and_does_not_go_backward(kind, options):
    p, q, still = nn.Parameter(np.ones(3)), nn.Parameter(np.full(4, 2.0)), nn.Parameter(np.ones(2))
    optimizer = kind([p, q, still], lr=0.5, **options)
    for _ in range(3):
        losses = [(t * t).sum() for t in (p, q)]
        values, held = [p.numpy(), q.numpy(), *(loss.numpy() for loss in losses)], (still * still).sum()
        copies = [v.copy() for v in values]
        p.grad, q.grad, still.grad = Tensor(np.ones(3)), Tensor(np.ones(4)), None
        optimizer.step()
        for value, saved in zip(values, copies, strict=True):
            np.testing.assert_array_equal(value, saved)
        for loss in losses:
            with pytest.raises(RuntimeError, match="was changed"):
                loss.backward()
        held.backward()  # a parameter that was not updated has its graph
        np.testing.assert_array_equal(still.grad.numpy(), 2 * still.numpy())


@every_optimizer
def test_going_on_from_a_state_dict_is_exact(kind, options):
    ours, theirs = parameters(dtypes=[np.float32, np.float64]), parameters(dtypes=[np.float32, np.float64])
    first, optimizer = kind(ours, lr=0.1, **options), kind(theirs, lr=0.1, **options)
    saved = frozen = {"state": {}}
    for step in range(6):
        for params in (ours, theirs):
            give_gradients(params, step, missing={step})
        first.step()
        optimizer.step()
        for i, state in saved["state"].items():
            for name, value in state.items():
                np.testing.assert_array_equal(value, frozen["state"][i][name], err_msg="a step changed what was saved")
                assert np.shape(value) in ((), theirs[i].shape)
                assert not isinstance(value, np.ndarray) or value.base is None, "it holds one parameter's state only"
        saved = optimizer.state_dict()
        frozen = copy.deepcopy(saved)
        if step == 2:
            optimizer.load_state_dict(saved)  # its own
        elif step == 4:
            optimizer = kind(theirs, lr=9.0)
            optimizer.load_state_dict(saved)
    for p, q in zip(ours, theirs, strict=True):
        assert p.numpy().tobytes() == q.numpy().tobytes()


def test_loading_restores_the_saved_state_after_further_steps():
    params = parameters()
    optimizer = optim.Adam(params, lr=0.1)
    give_gradients(params, 0)
    optimizer.step()
    saved, values = optimizer.state_dict(), [p.numpy().copy() for p in params]
    results = []
    for _ in range(2):
        for p, value in zip(params, values, strict=True):
            p.data = value
        optimizer.load_state_dict(saved)
        for step in (1, 2):
            give_gradients(params, step)
            optimizer.step()
        results.append([p.numpy().tobytes() for p in params])
    assert results[0] == results[1]


def test_copies_of_a_model_after_steps_are_independent():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    optimizer = optim.Adam(model.parameters(), lr=0.1)
    x = Tensor(np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32))

    def step(model, optimizer):
        optimizer.zero_grad()
        (model(x) ** 2).sum().backward()
        optimizer.step()

    step(model, optimizer)
    twin = copy.deepcopy(model)
    both, their_optimizer = copy.deepcopy((model, optimizer))
    before = [p.numpy().copy() for p in model.parameters()]
    step(twin, optim.SGD(twin.parameters(), lr=0.1))
    step(both, their_optimizer)
    for p, q, value in zip(model.parameters(), twin.parameters(), before, strict=True):
        np.testing.assert_array_equal(p.numpy(), value)
        assert not np.array_equal(q.numpy(), value)
        assert not np.shares_memory(p.numpy(), q.numpy())
    step(model, optimizer)
    for p, q in zip(model.parameters(), both.parameters(), strict=True):
        np.testing.assert_array_equal(p.numpy(), q.numpy())


@every_optimizer
def test_large_parameters_keep_arrays_of_their_own(kind, options, monkeypatch):
    monkeypatch.setattr(flat, "LARGE", 1000)
    joined, join = [], flat.joined
    monkeypatch.setattr(flat, "joined", lambda arrays: joined.append([a.size for a in arrays]) or join(arrays))
    params = parameters(shapes=[(1000,), (20, 60), (4,), (999,), (2, 3)])
    optimizer = kind(params, lr=0.1, **options)
    for step in range(3):
        give_gradients(params, step)
        optimizer.step()
        kept = [[p._data, *(v for v in optimizer.state[p].values() if isinstance(v, np.ndarray))] for p in params]
        for arrays in zip(*kept, strict=True):
            wholes = [a if a.base is None else a.base for a in arrays]
            assert [w.size for w in wholes] == [1000, 1200, 1009, 1009, 1009]
            assert wholes[2] is wholes[3] is wholes[4]
    assert {tuple(sizes) for sizes in joined} == {(1000,), (1200,), (4, 999, 6)}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [3, 5000])
@pytest.mark.parametrize("value", [1e-25, 1.0, 1e25, np.nan, np.inf])
def test_clipping_tiny_huge_and_wrong_gradients(value, size, dtype):
    p, q = nn.Parameter(np.zeros(size, dtype)), nn.Parameter(np.zeros((), dtype))
    p.grad, q.grad = Tensor(np.full(size, value, dtype)), Tensor(np.asarray(2.0, dtype))
    norm = optim.clip_grad_norm_([p, q, nn.Parameter(np.zeros(2))], 0.5)
    if math.isfinite(value):
        assert norm == pytest.approx(math.hypot(math.sqrt(size) * value, 2), rel=1e-6)
        np.testing.assert_allclose(p.grad.numpy(), value * (0.5 / norm), rtol=1e-5)
        assert q.grad.item() == pytest.approx(2 * 0.5 / norm, rel=1e-5)
    else:
        np.testing.assert_equal(norm, value)
        np.testing.assert_array_equal(p.grad.numpy(), np.full(size, value))
        assert q.grad.item() == 2
    assert p.grad.dtype == q.grad.dtype == dtype
    q.grad = None
    p.grad = Tensor(np.full(size, 1e-25, dtype))
    assert optim.clip_grad_norm_([p, q], 0.5) == pytest.approx(1e-25 * math.sqrt(size))
    np.testing.assert_array_equal(p.grad.numpy(), np.full(size, 1e-25, dtype))


@pytest.mark.parametrize("value", [5e-324, 1e-300, 1e-170, 1e-161, 1e-101, 1e-90, 1e160, 1e300])
def test_the_norm_of_gradients_whose_squares_vanish_or_overflow(value):
    params = [nn.Parameter(np.zeros(1)) for _ in range(3)]
    for p in params:
        p.grad = Tensor(np.array([value]))
    with np.errstate(over="ignore"):
        norm = optim.clip_grad_norm_(params, math.inf)
    assert norm == pytest.approx(math.sqrt(3) * value, rel=1e-13, abs=0)
    assert [p.grad.item() for p in params] == [value] * 3


@pytest.mark.parametrize("limit", [0.0, 1e-9, 1e-6, 3e-6])
def test_the_factor_of_clipping_is_pytorchs_where_norms_are_small(limit):
    p = nn.Parameter(np.zeros(2))
    p.grad = Tensor(np.array([3e-6, -4e-6]))
    assert optim.clip_grad_norm_(p, limit) == pytest.approx(5e-6, rel=1e-13, abs=0)
    np.testing.assert_allclose(p.grad.numpy(), np.array([3e-6, -4e-6]) * (limit / (5e-6 + 1e-6)), rtol=1e-12)


def test_broadcast_gradients_and_parameters_in_fortran_order():
    for kind, options in ALL:
        ours, theirs = parameters(shapes=[(3, 4), (5,)]), parameters(shapes=[(3, 4), (5,)])
        for params, order in ((ours, "F"), (theirs, "C")):
            params[0]._data = np.array(params[0]._data, order=order)
            optimizer = kind(params, lr=0.1, **options)
            for _ in range(3):
                optimizer.zero_grad()
                (F.mean(params[0] * 3) + params[1].sum()).backward()
                optimizer.step()
        assert_same(ours, theirs)


@pytest.mark.parametrize("make", [optim.Adam, optim.AdamW, optim.RMSprop, optim.Adagrad])
def test_half_precision_is_updated_in_single(make):
    p = Tensor(np.ones(2), requires_grad=True, dtype=np.float16)
    optimizer = make([p], lr=0.1)
    for gradient in (0.0, 1e-4):
        p.grad = Tensor(np.full(2, gradient), dtype=np.float16)
        optimizer.step()
    assert p.dtype == np.float16
    assert np.isfinite(p.numpy()).all()
    assert (p.numpy() < 1).all()


@pytest.mark.parametrize("size", [3, flat.LARGE])
def test_state_that_is_assigned_is_checked_and_copied(size):
    def step(first, second):
        p, q = (Tensor(np.ones(n), requires_grad=True, dtype=np.float32) for n in (size, 2))
        optimizer = optim.SGD([p, q], lr=1.0, momentum=0.5)
        for _ in range(2):
            p.grad, q.grad = Tensor(np.zeros(size, np.float32)), Tensor(np.zeros(2, np.float32))
            optimizer.step()
            optimizer.state[p]["momentum_buffer"], optimizer.state[q]["momentum_buffer"] = first, second
        optimizer.step()
        return p.numpy(), q.numpy()

    given = np.full(size, 4)
    given.flags.writeable = False
    p, q = step(given, [2, 2])
    np.testing.assert_array_equal(p, -3)  # 1 − 4 · 0.5 in the last two steps
    np.testing.assert_array_equal(q, -1)
    assert (given == 4).all()
    for wrong in (np.ones(size - 1), np.ones((size, 1)), 1.0):
        with pytest.raises(ValueError, match=rf"momentum_buffer of a parameter of shape \({size},\) has the shape"):
            step(wrong, np.ones(3))


def test_momentum_that_is_turned_on_later_starts_at_0():
    p = Tensor([1.0], requires_grad=True)
    optimizer = optim.SGD([p], lr=1.0)
    for momentum in (0.0, 0.5, 0.5):
        optimizer.param_groups[0]["momentum"] = momentum
        p.grad = Tensor([1.0])
        optimizer.step()
    assert p.item() == 1 - 1 - 1 - 1.5


@every_optimizer
def test_a_state_dict_survives_json(kind, options):
    ours, theirs = (parameters(shapes=[(), (3,), (2, 5), (4, 1, 2)]) for _ in range(2))
    first, second = kind(ours, lr=0.1, **options), kind(theirs, lr=0.1, **options)
    for params, optimizer in ((ours, first), (theirs, second)):
        give_gradients(params, 0)
        optimizer.step()
    saved = json.loads(json.dumps(first.state_dict(), default=np.ndarray.tolist))
    second = kind(theirs, lr=9.0, **options)
    second.load_state_dict(saved)
    for params, optimizer in ((ours, first), (theirs, second)):
        give_gradients(params, 1)
        optimizer.step()
    assert_same(ours, theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state[0].pop("exp_avg"), "state of parameter 0 has no exp_avg"),
        (lambda state: state[0].pop("step"), "state of parameter 0 has no step"),
        (lambda state: state.__setitem__(7, state[0]), "state of parameter 7, for 1"),
        (lambda state: state[0].__setitem__("exp_avg", [1.0]), r"exp_avg of a parameter of shape \(3,\) has the shape"),
    ],
)
def test_a_state_that_does_not_fit_is_an_error_and_changes_nothing(change, message):
    p = Tensor(np.ones(3), requires_grad=True)
    optimizer = optim.Adam([p], lr=0.1)
    p.grad = Tensor(np.ones(3))
    optimizer.step()
    wrong = {**optimizer.state_dict(), "param_groups": [{**optimizer.state_dict()["param_groups"][0], "lr": 5.0}]}
    before = copy.deepcopy(optimizer.state[p])
    change(wrong["state"])
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(wrong)
    assert optimizer.param_groups[0]["lr"] == 0.1
    for name, value in before.items():
        np.testing.assert_array_equal(optimizer.state[p][name], value)


@pytest.mark.parametrize("clip", [optim.clip_grad_norm_, optim.clip_grad_value_])
def test_gradients_in_foreign_byte_order_are_clipped(clip):
    for size in (2, 5000):
        p = Tensor(np.zeros(size), requires_grad=True)
        p.grad = Tensor._of(np.full(size, 3.0, ">f8"))
        clip([p], 1.0)
        want = 1 / math.sqrt(size) if clip is optim.clip_grad_norm_ else 1
        np.testing.assert_allclose(p.grad.numpy(), want, rtol=1e-6)


def test_parameters_stay_where_they_are_from_step_to_step(monkeypatch):
    params = parameters()
    optimizer = optim.Adam(params)
    give_gradients(params, 0)
    optimizer.step()
    laid, new_runs = [], flat.new_runs
    monkeypatch.setattr(flat, "new_runs", lambda *args: laid.append(args) or new_runs(*args))
    optimizer.step()
    assert not laid
    params[0].grad = None  # now others are updated together
    optimizer.step()
    assert laid


@every_optimizer
@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_parameters_converted_between_steps_keep_their_dtype(kind, options, dtype):
    """The steps after that are those of an optimiser that began with the converted parameters."""
    model, twin = (nn.Linear(3, 2, rng=np.random.default_rng(0)) for _ in range(2))
    first, second = kind(model.parameters(), lr=0.1, **options), kind(twin.astype(dtype).parameters(), **options)
    give_gradients(list(model.parameters()), 0)
    first.step()
    twin.load_state_dict(model.astype(dtype).state_dict())
    second.load_state_dict(first.state_dict())
    for step in range(1, 3):
        for params, optimizer in ((model.parameters(), first), (twin.parameters(), second)):
            give_gradients(list(params), step)
            optimizer.step()
    assert {p.dtype for p in model.parameters()} == {np.dtype(dtype)}
    assert_same(model.parameters(), twin.parameters())


@pytest.mark.parametrize("change", ["one starts anew", "one is forgotten", "one is empty"])
def test_a_state_that_was_changed_is_used(change):
    params = parameters(shapes=[(3,), (2, 2)])
    optimizer, alone = optim.Adam(params, lr=0.1), optim.Adam([params[1]], lr=0.1)
    for step in range(3):
        give_gradients(params, step)
        optimizer.step()
    if change == "one starts anew":
        optimizer.state[params[1]] = {k: 0 if k == "step" else 0 * v for k, v in optimizer.state[params[1]].items()}
    elif change == "one is empty":
        optimizer.state[params[1]] = {}
    else:
        del optimizer.state[params[1]]
    kept = params[1].numpy().copy()
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 4
    assert optimizer.state[params[1]]["step"] == 1
    got, params[1].data = params[1].numpy().copy(), kept
    alone.step()
    np.testing.assert_allclose(got, params[1].numpy(), rtol=1e-6)


def test_a_state_that_was_emptied_in_place_starts_anew():
    params = parameters(shapes=[(3,), (2, 2)])
    optimizer = optim.SGD(params, lr=0.1)
    for _ in range(2):
        give_gradients(params, 0)
        optimizer.step()
        assert [optimizer.state[p]["step"] for p in params] == [1, 1]
        for p in params:
            optimizer.state[p].clear()
