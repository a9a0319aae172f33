"""Optimisers against their formulas, resuming, parameter groups, clipping and schedules."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tinygrad_bn import Tensor, nn, optim

START = (1.0, 2.0, -3.0)
G = np.array([0.5, -2.0, 0.125])
ALL = [
    (optim.SGD, {}),
    (optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (optim.SGD, {"momentum": 0.9, "dampening": 0.5}),
    (optim.Adam, {"weight_decay": 0.1}),
    (optim.AdamW, {}),
    (optim.RMSprop, {"momentum": 0.9, "centered": True}),
    (optim.Adagrad, {"lr_decay": 0.1, "weight_decay": 0.1}),
]


def parameter(value=START, dtype=np.float64) -> nn.Parameter:
    return nn.Parameter(np.array(value, dtype))


def step(optimizer: optim.Optimizer, p: Tensor, g: np.ndarray) -> np.ndarray:
    """Take one step with gradient g; the parameter's change."""
    before = np.array(p)
    p.grad = Tensor(g)
    optimizer.step()
    return np.array(p) - before


def test_sgd_momentum_by_hand():
    p, mu, lr = parameter(), 0.9, 0.1
    optimizer = optim.SGD([p], lr=lr, momentum=mu)
    moves = [step(optimizer, p, g * G) for g in (1, 2, 3)]
    velocities = [1, mu + 2, mu * (mu + 2) + 3]
    for move, v in zip(moves, velocities, strict=True):
        np.testing.assert_allclose(move, -lr * v * G, rtol=1e-12)


def test_sgd_nesterov_dampening_and_decay_by_hand():
    p = parameter()
    optimizer = optim.SGD([p], lr=0.1, momentum=0.5, nesterov=True)
    np.testing.assert_allclose(step(optimizer, p, G), -0.1 * 1.5 * G, rtol=1e-12)
    np.testing.assert_allclose(step(optimizer, p, G), -0.1 * (1 + 0.5 * 1.5) * G, rtol=1e-12)
    p = parameter()
    optimizer = optim.SGD([p], lr=0.1, momentum=0.5, dampening=0.2)
    np.testing.assert_allclose(step(optimizer, p, G), -0.1 * G, rtol=1e-12)  # the first gradient is not dampened
    np.testing.assert_allclose(step(optimizer, p, G), -0.1 * (0.5 + 0.8) * G, rtol=1e-12)
    np.testing.assert_allclose(
        step(optim.SGD([q := parameter()], lr=0.1, weight_decay=0.5), q, G), -0.1 * (G + 0.5 * np.array(START))
    )


@given(arrays(np.float64, 3, elements=st.floats(0.01, 1e6) | st.floats(-1e6, -0.01)), st.floats(1e-6, 1.0))
def test_first_step_of_adam_is_lr_in_the_direction_of_the_sign(g, lr):
    p = parameter((0.0, 0.0, 0.0))
    np.testing.assert_allclose(step(optim.Adam([p], lr=lr), p, g), -lr * np.sign(g), rtol=1e-5)


def test_adam_second_step_by_hand():
    p = parameter()
    optimizer = optim.Adam([p], lr=0.1, betas=(0.8, 0.9), eps=0.5)
    step(optimizer, p, G)
    m, v = (0.8 * 0.2 + 0.2 * 3) * G / (1 - 0.8**2), (0.9 * 0.1 + 0.1 * 9) * G**2 / (1 - 0.9**2)
    np.testing.assert_allclose(step(optimizer, p, 3 * G), -0.1 * m / (np.sqrt(v) + 0.5), rtol=1e-12)


def test_decay_of_adamw_is_decoupled_from_the_gradient_and_that_of_adam_is_not():
    for scale in (1.0, 1000.0):
        plain, decayed, coupled = parameter(), parameter(), parameter()
        step(optim.Adam([plain], lr=0.1), plain, scale * G)
        step(optim.AdamW([decayed], lr=0.1, weight_decay=0.5), decayed, scale * G)
        step(optim.Adam([coupled], lr=0.1, weight_decay=0.5), coupled, scale * G)
        np.testing.assert_allclose(np.array(decayed), np.array(plain) - 0.1 * 0.5 * np.array(START), rtol=1e-9)
        turned = np.sign(scale * G + 0.5 * np.array(START))  # for scale 1 the decay turns the last sign
        np.testing.assert_allclose(np.array(coupled), START - 0.1 * turned, rtol=1e-6)


def test_rmsprop_and_adagrad_by_hand():
    p = parameter()
    optimizer = optim.RMSprop([p], lr=0.1, alpha=0.75, eps=0.5)
    np.testing.assert_allclose(step(optimizer, p, G), -0.1 * G / (np.sqrt(0.25 * G**2) + 0.5))
    optimizer = optim.RMSprop([p], lr=0.1, alpha=0.75, eps=0.5, centered=True)
    np.testing.assert_allclose(step(optimizer, p, G), -0.1 * G / (np.sqrt((0.25 - 0.25**2) * G**2) + 0.5))
    optimizer = optim.Adagrad([p], lr=0.1, lr_decay=0.5, initial_accumulator_value=1.0)
    step(optimizer, p, G)
    np.testing.assert_allclose(step(optimizer, p, G), -0.1 / 1.5 * G / np.sqrt(1 + 2 * G**2))


@pytest.mark.parametrize(("kind", "options"), ALL)
def test_dtype_is_kept_and_groups_have_their_own_options(kind, options):
    p, q = parameter(dtype=np.float32), parameter(dtype=np.float32)
    optimizer = kind([{"params": [p], "lr": 0.0}, {"params": [q]}], lr=0.5, **options)
    p.grad = q.grad = Tensor(G.astype(np.float32))
    optimizer.step()
    assert p.dtype == q.dtype == np.float32
    assert np.all(q.numpy() != START)
    assert p.numpy().tolist() == list(START), "its learning rate is 0"


def test_parameters_without_gradient_or_frozen_stay_as_they_are():
    frozen, ungraded, trained = parameter(), parameter(), parameter()
    optimizer = optim.AdamW([frozen, ungraded, trained], lr=0.1)
    frozen.requires_grad = False
    frozen.grad = trained.grad = Tensor(G)
    optimizer.step()
    assert frozen.numpy().tolist() == ungraded.numpy().tolist() == [1, 2, -3]
    assert trained.numpy().tolist() != [1, 2, -3]
    assert list(optimizer.state) == [trained]
    optimizer.zero_grad()
    assert frozen.grad is ungraded.grad is trained.grad is None


def test_a_state_with_other_parameter_groups_does_not_fit():
    two = optim.SGD([{"params": [parameter()]}, {"params": [parameter()]}])
    with pytest.raises(ValueError, match="1 parameter groups for 2"):
        two.load_state_dict(optim.SGD([parameter()]).state_dict())


def test_options_of_a_group_are_checked():
    p = parameter()
    with pytest.raises(ValueError, match="Adam has no option momentum; it has lr, betas"):
        optim.Adam([{"params": [p], "momentum": 0.9}])
    for option in ("lr", "weight_decay", "eps"):
        with pytest.raises(ValueError, match=rf"{option} has to be 0 or more; got -1\.0"):
            optim.RMSprop([{"params": [p], option: -1.0}])
    for betas in (None, ("a", "b")):
        with pytest.raises(ValueError, match="betas have to be two numbers"):
            optim.AdamW([p], betas=betas)
    for lr in (Tensor(0.1), np.array([0.1])):
        with pytest.raises(TypeError, match="lr has to be a number; got"):
            optim.Adam([p], lr=lr)


@pytest.mark.parametrize(
    ("wrong", "error"), [(np.ones(1), TypeError), (Tensor([1.0, 2.0]), ValueError), (Tensor([1.0]), ValueError)]
)
def test_a_gradient_of_another_shape_is_an_error_and_changes_nothing(wrong, error):
    params = parameter(), parameter()
    optimizer = optim.Adam([{"params": p} for p in params])
    params[0].grad = Tensor(G)
    with pytest.raises(error, match="the grad of a tensor"):
        params[1].grad = wrong
    assert params[1].grad is None
    params[1].grad, optimizer.param_groups[1]["lr"] = Tensor(G), -1.0
    with pytest.raises(ValueError, match="lr has to be 0 or more"):
        optimizer.step()
    assert not optimizer.state


def test_normalisations_and_biases_do_not_decay():
    norms = (
        nn.BatchNorm1d(6),
        nn.LayerNorm((2, 3)),
        nn.RMSNorm((2, 3)),
        nn.GroupNorm(2, 4),
        nn.InstanceNorm2d(4, affine=True),
    )
    model = nn.Sequential(nn.Linear(3, 6), *norms, nn.Linear(6, 2, bias=False))
    decayed, others = optim.param_groups(model, 0.5)
    names = {p: name for name, p in model.named_parameters()}
    assert [names[p] for p in decayed["params"]] == ["0.weight", "6.weight"]
    assert len(others["params"]) == len(names) - 2
    before = model.state_dict()
    for p in model.parameters():
        p.grad = Tensor(np.zeros(p.shape, np.float32))
    optim.AdamW([decayed, others], lr=0.1).step()
    for name, p in model.named_parameters():
        factor = 0.95 if name in ("0.weight", "6.weight") else 1
        np.testing.assert_allclose(p.numpy(), before[name] * factor, rtol=1e-6)


@given(arrays(np.float64, 3, elements=st.floats(-1e3, 1e3)), arrays(np.float64, 3, elements=st.floats(-1e3, 1e3)))
def test_clip_grad_norm(g, h):
    p, q, ungraded = parameter(), parameter(), parameter()
    p.grad, q.grad = Tensor(g), Tensor(h)
    norm = optim.clip_grad_norm_((t for t in (p, ungraded, q)), 5.0)
    assert norm == pytest.approx(math.sqrt((g**2).sum() + (h**2).sum()))
    scale = min(1.0, 5.0 / norm) if norm else 1.0
    np.testing.assert_allclose(p.grad.numpy(), g * scale, rtol=1e-6)
    np.testing.assert_allclose(q.grad.numpy(), h * scale, rtol=1e-6)
    assert ungraded.grad is None


def test_clipping_keeps_the_dtype():
    q = parameter()
    q.grad = Tensor(G.astype(np.float32))
    optim.clip_grad_value_([q, parameter()], 0.25)
    assert q.grad.numpy().tolist() == [0.25, -0.25, 0.125]
    assert optim.clip_grad_norm_([q], 0.1) == 0.375
    assert q.grad.dtype == np.float32


def test_schedules():
    def rates(schedule, steps: int = 7, **options) -> list[float]:
        optimizer = optim.SGD([{"params": [parameter()], "lr": 8.0}, {"params": [parameter()]}], lr=0.8)
        s, seen = schedule(optimizer, **options), []
        for _ in range(steps):
            seen.append(optimizer.param_groups[0]["lr"])
            assert options.get("eta_min") or optimizer.param_groups[1]["lr"] == pytest.approx(seen[-1] / 10)
            s.step()
        return seen

    def warm_cosine(optimizer: optim.Optimizer) -> optim.Schedule:
        return optim.WarmupLR(optimizer, 3, after=optim.CosineAnnealingLR(optimizer, 2))

    assert rates(optim.StepLR, step_size=2, gamma=0.5) == [8, 8, 4, 4, 2, 2, 1]
    cosine = [1 + 7 * (1 + math.cos(math.pi * t / 4)) / 2 for t in range(5)]
    assert rates(optim.CosineAnnealingLR, 5, T_max=4, eta_min=1.0) == pytest.approx(cosine)
    assert rates(optim.WarmupLR, warmup_steps=3) == [2, 4, 6, 8, 8, 8, 8]
    assert rates(warm_cosine, 6) == pytest.approx([2, 4, 6, 8, 4, 0])


def test_momentum_that_is_turned_on_later_begins_like_the_first_step():
    p, late = parameter(), parameter()
    optimizer = optim.SGD([p, late], lr=1.0, dampening=0.5)
    for momentum, without in ((0.0, late), (0.0, late), (0.9, late), (0.9, None)):
        optimizer.param_groups[0]["momentum"] = momentum
        p.grad = late.grad = Tensor(np.ones(3))
        if without is not None:
            without.grad = None
        optimizer.step()
    np.testing.assert_allclose(p.numpy(), np.array(START) - 4.4, rtol=1e-12)
    np.testing.assert_allclose(late.numpy(), np.array(START) - 1, rtol=1e-12)


@pytest.mark.parametrize("options", [{"momentum": 0.5}, {"centered": True}, {"momentum": 0.5, "centered": True}])
def test_rmsprop_takes_options_that_are_turned_on_later(options):
    p = parameter()
    optimizer = optim.RMSprop([p], lr=0.1, alpha=0.5, eps=0.0)
    v, average, velocity = np.zeros(3), np.zeros(3), np.zeros(3)
    for t, g in enumerate((G, 2 * G, -G, 3 * G)):
        v = 0.5 * v + 0.5 * g**2
        if t == 2:
            optimizer.param_groups[0].update(options)
        if t >= 2 and "centered" in options:
            average = 0.5 * average + 0.5 * g
        update = g / np.sqrt(v - average**2)
        if t >= 2 and "momentum" in options:
            velocity = update = 0.5 * velocity + update
        np.testing.assert_allclose(step(optimizer, p, g), -0.1 * update, rtol=1e-9)


def test_a_step_that_fails_does_not_count_as_the_first():
    p, q = parameter(), parameter()
    optimizer = optim.SGD([{"params": p}, {"params": q}], lr=1.0, momentum=0.5, dampening=0.5)
    p.grad = q.grad = Tensor(np.ones(3))
    optimizer.state[q] = {"step": 1, "momentum_buffer": np.ones(2)}
    with pytest.raises(ValueError, match="momentum_buffer"):
        optimizer.step()
    assert p not in optimizer.state
    del optimizer.state[q]
    optimizer.step()
    np.testing.assert_array_equal(p.numpy(), np.array(START) - 1)


def stepped(optimizer: optim.Optimizer, *schedules: optim.Schedule, times: int = 1) -> float:
    for _ in range(times):
        for schedule in schedules:
            schedule.step()
    return optimizer.param_groups[0]["lr"]


def test_a_schedule_goes_on_from_the_rate_that_is_set():
    optimizer = optim.SGD([parameter()], lr=1.0)
    schedule = optim.StepLR(optimizer, 10)
    optimizer.param_groups[0]["lr"] = 0.5
    assert stepped(optimizer, schedule) == 0.5
    assert stepped(optimizer, schedule, times=9) == 0.05


def test_schedules_of_one_optimizer_multiply():
    optimizer = optim.SGD([parameter()], lr=1.0)
    assert stepped(optimizer, *(optim.StepLR(optimizer, 1, gamma=0.5) for _ in range(2)), times=2) == 0.0625


SCHEDULES = [
    lambda o: optim.StepLR(o, 2),
    lambda o: optim.CosineAnnealingLR(o, 3, eta_min=0.1),
    lambda o: optim.WarmupLR(o, 2),
    lambda o: optim.WarmupLR(o, 2, after=optim.CosineAnnealingLR(o, 2)),
]


@pytest.mark.parametrize("make", SCHEDULES)
@pytest.mark.parametrize("order", ["optimizer first", "schedule first", "schedule made last", "schedule alone"])
@given(done=st.integers(0, 7))
def test_a_resumed_schedule_goes_on(make, order, done):
    def build() -> tuple[optim.Optimizer, optim.Schedule]:
        optimizer = optim.SGD([{"params": [parameter()], "lr": 2.0}, {"params": [parameter()]}], lr=1.0)
        return optimizer, make(optimizer)

    optimizer, schedule = build()
    stepped(optimizer, schedule, times=done)
    saved, saved_optimizer = (json.loads(json.dumps(part.state_dict())) for part in (schedule, optimizer))
    resumed, other = build()
    if order == "schedule made last":
        resumed = optim.SGD([{"params": [parameter()]}, {"params": [parameter()]}])
        resumed.load_state_dict(saved_optimizer)
        other = make(resumed)
    other.load_state_dict(saved)
    if order == "schedule first":
        resumed.load_state_dict(saved_optimizer)
    elif order == "optimizer first":
        resumed.load_state_dict(saved_optimizer)
        other.load_state_dict(saved)
    for _ in range(8):
        assert [g["lr"] for g in resumed.param_groups] == [g["lr"] for g in optimizer.param_groups]
        schedule.step()
        other.step()


def test_a_state_of_another_schedule_is_an_error_and_changes_nothing():
    optimizer = optim.SGD([parameter()], lr=1.0)
    schedule = optim.WarmupLR(optimizer, 2, after=optim.StepLR(optimizer, 2))
    good = schedule.state_dict()
    wrong = [
        None, {}, optim.StepLR(optimizer, 2).state_dict(), {**good, "lr": [1.0, 2.0]}, {**good, "lr": 1.0},
        {**good, "t": 1.5}, {**good, "t": -1}, {**good, "lr": ["1"]}, {**good, "initial_lr": [math.nan]},
        {**good, "warmup_steps": 0}, {**good, "after": None}, {**good, "after": {**good["after"], "gamma": math.inf}},
        {**good, "t": 9, "after": {**good["after"], "step_size": 2.5}},
    ]  # fmt: skip
    for state in wrong:
        with pytest.raises((ValueError, TypeError), match=r"state of a|has to be"):
            schedule.load_state_dict(state)
        assert schedule.state_dict() == good


def test_options_of_schedules_are_checked():
    optimizer, other = optim.SGD([parameter()]), optim.SGD([parameter()])
    before = dict(optimizer.param_groups[0])
    wrong = [
        (lambda: optim.StepLR(optimizer, 2.5), "step_size has to be an integer; got 2.5"),
        (lambda: optim.StepLR(optimizer, True), "step_size has to be an integer"),
        (lambda: optim.StepLR(optimizer, "2"), "step_size has to be an integer"),
        (lambda: optim.StepLR(optimizer, 2, gamma=math.nan), "gamma has to be 0 or more; got nan"),
        (lambda: optim.StepLR(optimizer, 2, gamma="0.1"), "gamma has to be a number"),
        (lambda: optim.CosineAnnealingLR(optimizer, 2.0), "T_max has to be an integer"),
        (lambda: optim.CosineAnnealingLR(optimizer, 2, eta_min=math.inf), "eta_min has to be finite"),
        (lambda: optim.CosineAnnealingLR(optimizer, 2, eta_min=-1.0), "eta_min has to be 0 or more"),
        (lambda: optim.WarmupLR(optimizer, math.nan), "warmup_steps has to be an integer"),
        (lambda: optim.WarmupLR(optimizer, 2, after=optimizer), "after has to be a Schedule"),
        (lambda: optim.WarmupLR(optimizer, 2, after=optim.StepLR(other, 1)), "another optimizer"),
        (lambda: optim.StepLR([parameter()], 2), "takes an Optimizer; got a list"),
        (lambda: optim.Schedule(optimizer).step(), "defines no next_lr"),
    ]
    for call, message in wrong:
        with pytest.raises((TypeError, ValueError), match=message):
            call()
    assert {**optimizer.param_groups[0], "initial_lr": 0} == {**before, "initial_lr": 0}


@pytest.mark.parametrize("kind", [optim.SGD, optim.Adam, optim.AdamW, optim.RMSprop, optim.Adagrad])
def test_every_option_of_an_optimizer_is_checked(kind):
    p = parameter()
    options = {k: v for k, v in kind([p]).param_groups[0].items() if k != "params"}
    for option, default in options.items():
        wrong = ["x", None, [1.0, 2.0, 3.0], Tensor(0.5)]
        wrong += [0, 1.0] if isinstance(default, bool) else [True, math.nan, math.inf, 1j]
        for value in wrong:
            for make in (lambda o: kind([p], **o), lambda o: kind([{"params": [p], **o}])):
                with pytest.raises((TypeError, ValueError), match=option):
                    make({option: value})
            optimizer = kind([p])
            optimizer.param_groups[0][option] = value
            p.grad = Tensor(G)
            with pytest.raises((TypeError, ValueError), match=option):
                optimizer.step()
    assert p.numpy().tolist() == list(START)
    with pytest.raises(ValueError, match=r"alpha has to be in \[0, 1\]"):
        optim.RMSprop([p], alpha=1.5)


def test_what_holds_no_parameters_is_refused():
    p = parameter()
    for groups in ([{"lr": 0.1}], [{"params": p}, {}], [{"params": p}, parameter()]):
        with pytest.raises(ValueError, match='each group is a dictionary with "params"'):
            optim.SGD(groups)
    for wrong in ("weights", 3, None, [p, 1.0], [("weight", p)], [np.ones(3)], [{"params": [{"params": p}]}]):
        with pytest.raises(TypeError, match=r"params are tensors, as model\.parameters\(\) gives them"):
            optim.SGD(wrong)
    assert optim.SGD({"params": p}).param_groups[0]["params"] == [p]
    for clip in (optim.clip_grad_norm_, optim.clip_grad_value_):
        with pytest.raises(TypeError, match="params are tensors"):
            clip(nn.Linear(2, 2), 1.0)
        for limit in ("1", None, Tensor(1.0), math.nan):
            with pytest.raises((TypeError, ValueError), match=r"(max_norm|clip_value) has to be"):
                clip([p], limit)
    with pytest.raises(TypeError, match="decay has to be a number"):
        optim.param_groups(nn.Linear(2, 2), "0.1")
    with pytest.raises(TypeError, match="model has to be a module; got a list"):
        optim.param_groups([p], 0.1)


@pytest.mark.parametrize(("kind", "options"), ALL)
def test_a_wrong_state_is_an_error_and_changes_nothing(kind, options):
    p, q = parameter(), parameter((1.0, 2.0))
    optimizer = kind([{"params": [p]}, {"params": [q]}], lr=0.1, **options)
    p.grad, q.grad = Tensor(G), Tensor(G[:2])
    optimizer.step()
    good = optimizer.state_dict()
    first, second = good["param_groups"]
    wrong = [
        None, {}, [], {"state": good["state"]}, {**good, "state": []}, {**good, "param_groups": [first]},
        {**good, "param_groups": [first, 3]}, {**good, "param_groups": [first, {**second, "lr": -1.0}]},
        {**good, "param_groups": [first, {k: v for k, v in second.items() if k != "lr"}]},
        {**good, "param_groups": [first, {**second, "wrong": 1}]},
        {**good, "param_groups": [{**first, "params": [0, 1]}, {**second, "params": []}]},
        {**good, "state": {"x": good["state"][0]}},
        {**good, "state": {-1: good["state"][0]}}, {**good, "state": {0: 1}}, {**good, "state": {0: {}}},
        {**good, "state": {**good["state"], 1: {**good["state"][1], "step": 1.5}}},
        {**good, "state": {**good["state"], 1: {**good["state"][1], "step": -1}}},
        {**good, "state": {**good["state"], 1: {**good["state"][1], "old": np.ones(3)}}},
    ]  # fmt: skip
    if len(good["state"][0]) > 1:  # plain SGD keeps nothing that has a shape
        wrong.append({**good, "state": {0: good["state"][1]}})
    for state in wrong:
        with pytest.raises((ValueError, TypeError), match=r"stat|group|option|lr has|step"):
            optimizer.load_state_dict(state)
        assert repr(optimizer.state_dict()) == repr(good)


def test_options_that_would_train_nothing_or_wrongly_are_refused():
    p = Tensor([1.0, 2.0], requires_grad=True)
    with pytest.raises(TypeError, match=r"model\.parameters\(\)"):
        optim.SGD(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="result of an op"):
        optim.SGD([p * 2])
    for group in ({"betas": (2.0, 0.9)}, {"nesterov": True}):
        with pytest.raises(ValueError, match=r"betas|Nesterov"):
            (optim.Adam if "betas" in group else optim.SGD)([{"params": p, **group}])
    for wrong in ({"lr": float("nan")}, {"weight_decay": -1.0}):
        with pytest.raises(ValueError, match="0 or more"):
            optim.SGD([p], **wrong)
    with pytest.raises(ValueError, match="not those of Adam"):
        optim.Adam([p]).load_state_dict(optim.SGD([p]).state_dict())
    for schedule in (optim.StepLR, optim.CosineAnnealingLR):
        with pytest.raises(ValueError, match="at least 1"):
            schedule(optim.SGD([p]), 0)


def test_one_tensor_counts_as_a_list_of_one():
    p = Tensor([3.0, 4.0], requires_grad=True)
    for optimizer in (optim.SGD(p, lr=0.5), optim.SGD([{"params": p}], lr=0.5)):
        p.grad = Tensor([1.0, 1.0])
        before = p.numpy()
        optimizer.step()
        np.testing.assert_array_equal(p.numpy(), before - 0.5)
    p.grad = Tensor([3.0, 4.0])
    assert optim.clip_grad_norm_(p, 1.0) == 5.0
    np.testing.assert_allclose(p.grad.numpy(), [0.6, 0.8], rtol=1e-6)


@pytest.mark.parametrize("clip", [optim.clip_grad_norm_, optim.clip_grad_value_])
def test_a_negative_limit_is_an_error(clip):
    p = Tensor([1.0], requires_grad=True)
    p.grad = Tensor([1.0])
    with pytest.raises(ValueError, match="0 or more; got -1"):
        clip([p], -1.0)
    assert p.grad.item() == 1
