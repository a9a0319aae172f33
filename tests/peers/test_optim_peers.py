"""Optimisers, schedules and gradient clipping against PyTorch's, over 50 steps on the same random gradients."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.peers.compare import close, torch
from tinygrad_bn import Tensor, optim

TOLERANCE = {"float64": 1e-10, "float32": 1e-6}
STEPS = 50
SHAPES = [(3, 4), (5,), ()]
SCHEDULES = torch.optim.lr_scheduler
DECAYS = {"weight_decay": st.sampled_from([0.0, 0.1])}
LRS = {"lr": st.sampled_from([1e-3, 1e-2])}
BETAS = {"betas": st.sampled_from([(0.9, 0.999), (0.5, 0.9), (0.0, 0.99)]), "eps": st.sampled_from([1e-8, 1e-2])}
OPTIMIZERS = {
    "SGD": LRS | DECAYS,
    "SGD, momentum": LRS
    | DECAYS
    | {"momentum": st.sampled_from([0.5, 0.9]), "dampening": st.sampled_from([0.0, 0.3, 1.0])},
    "SGD, Nesterov": LRS | DECAYS | {"momentum": st.sampled_from([0.5, 0.9]), "nesterov": st.just(True)},
    "Adam": LRS | DECAYS | BETAS,
    "AdamW": LRS | DECAYS | BETAS,
    "RMSprop": LRS
    | DECAYS
    | {
        "alpha": st.sampled_from([0.9, 0.99]),
        "momentum": st.sampled_from([0.0, 0.8]),
        "centered": st.booleans(),
        "eps": st.sampled_from([1e-8, 1e-2]),
    },
    "Adagrad": LRS
    | DECAYS
    | {"lr_decay": st.sampled_from([0.0, 0.1]), "initial_accumulator_value": st.sampled_from([0.0, 0.5])},
}


def parameters(dtype, rng):
    """The same parameters, ours and PyTorch's."""
    values = [np.asarray(rng.normal(size=shape), dtype) for shape in SHAPES]
    return [Tensor(a, requires_grad=True) for a in values], [torch.tensor(a, requires_grad=True) for a in values]


def give_gradients(ours, theirs, rng, without=()):
    """Each pair of parameters the same new random gradient, but for those whose places are in `without`."""
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        g = np.asarray(rng.normal(size=p.shape), p.dtype)
        p.grad, q.grad = (None, None) if i in without else (Tensor(g), torch.tensor(g))


def same_parameters(ours, theirs, what):
    for p, q in zip(ours, theirs, strict=True):
        assert p.dtype == q.detach().numpy().dtype
        close(p, q, TOLERANCE[str(p.dtype)], what)


def same_steps(ours, theirs, mine, their, rng, after=()):
    for step in range(STEPS):
        # a parameter that now and then has no gradient counts its own steps
        give_gradients(ours, theirs, rng, without=[1] if step % 3 == 0 else [])
        mine.step()
        their.step()
        same_parameters(ours, theirs, f"after step {step}")
        for schedule in after:
            schedule.step()
        for a, b in zip(mine.param_groups, their.param_groups, strict=True):
            assert a["lr"] == pytest.approx(b["lr"], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
@given(data=st.data(), dtype=st.sampled_from(list(TOLERANCE)), seed=st.integers(0, 2**32))
def test_optimizers(name, data, dtype, seed):
    options = data.draw(st.fixed_dictionaries(OPTIMIZERS[name]))
    rng = np.random.default_rng(seed)
    ours, theirs = parameters(dtype, rng)
    kind = name.split(",")[0]
    same_steps(ours, theirs, getattr(optim, kind)(ours, **options), getattr(torch.optim, kind)(theirs, **options), rng)


@pytest.mark.parametrize("kind", sorted({name.split(",")[0] for name in OPTIMIZERS}))
def test_default_options(kind):
    rng = np.random.default_rng(0)
    ours, theirs = parameters("float64", rng)
    same_steps(ours, theirs, getattr(optim, kind)(ours), getattr(torch.optim, kind)(theirs), rng)


GROUPS = {
    "SGD": [{"lr": 0.1}, {"momentum": 0.9, "weight_decay": 0.0}, {}],
    "Adam": [{"lr": 0.1}, {"betas": (0.5, 0.9)}, {"weight_decay": 0.0}],
    "AdamW": [{"lr": 0.1, "weight_decay": 0.5}, {"eps": 1e-2}, {"weight_decay": 0.0}],
    "RMSprop": [{"lr": 0.1}, {"centered": True, "alpha": 0.5}, {"momentum": 0.5}],
    "Adagrad": [{"lr": 0.1}, {"lr_decay": 0.2}, {"weight_decay": 0.0}],
}
FOLLOWED_BY = {
    "no schedule": None,
    "StepLR": ("StepLR", {"step_size": 7, "gamma": 0.5}),
    "CosineAnnealingLR": ("CosineAnnealingLR", {"T_max": 30, "eta_min": 1e-3}),  # and up again, after 30 steps
    "CosineAnnealingLR to 0": ("CosineAnnealingLR", {"T_max": STEPS}),
}


@pytest.mark.parametrize("schedule", FOLLOWED_BY)
@pytest.mark.parametrize("kind", GROUPS)
def test_parameter_groups_and_schedules(kind, schedule):
    rng = np.random.default_rng(1)
    ours, theirs = parameters("float64", rng)
    mine, their = (
        getattr(module, kind)(
            [{"params": [p], **group} for p, group in zip(params, GROUPS[kind], strict=True)], lr=0.02, weight_decay=0.1
        )
        for module, params in ((optim, ours), (torch.optim, theirs))
    )
    after = []
    if FOLLOWED_BY[schedule]:
        name, options = FOLLOWED_BY[schedule]
        after = [getattr(optim, name)(mine, **options), getattr(SCHEDULES, name)(their, **options)]
    same_steps(ours, theirs, mine, their, rng, after)


STEPPED = {
    "StepLR": (lambda o, g: g.StepLR(o, 3, gamma=0.5)),
    "CosineAnnealingLR": (lambda o, g: g.CosineAnnealingLR(o, 4, eta_min=0.01)),
    "CosineAnnealingLR of one step": (lambda o, g: g.CosineAnnealingLR(o, 1)),
}


@given(
    st.lists(st.sampled_from(list(STEPPED)), min_size=1, max_size=3),
    st.lists(st.none() | st.floats(0.02, 1.0), min_size=1, max_size=14),
    st.integers(0, 14),
)
def test_several_schedules_with_rates_set_by_hand_and_resumed(names, by_hand, resumed):
    """A rate by hand (or None) before each step of all schedules; at step `resumed` ours go on from their states."""
    ours, theirs = parameters("float64", np.random.default_rng(0))
    groups = [{"lr": 0.8}, {"lr": 0.1}, {}]

    def build(module, schedules, params):
        optimizer = module.SGD([{"params": [p], **g} for p, g in zip(params, groups, strict=True)], lr=0.3)
        return optimizer, [STEPPED[name](optimizer, schedules) for name in names]

    mine, our_schedules = build(optim, optim, ours)
    their, their_schedules = build(torch.optim, SCHEDULES, theirs)
    their.step()  # PyTorch warns of schedules that are stepped before it
    for i, rate in enumerate(by_hand):
        if i == resumed:
            states = [part.state_dict() for part in (mine, *our_schedules)]
            mine, our_schedules = build(optim, optim, ours)
            for part, state in zip((mine, *our_schedules), states, strict=True):
                part.load_state_dict(state)
        if rate is not None:
            mine.param_groups[i % 3]["lr"] = their.param_groups[i % 3]["lr"] = rate
        for schedule in (*our_schedules, *their_schedules):
            schedule.step()
        for a, b in zip(mine.param_groups, their.param_groups, strict=True):
            assert a["lr"] == pytest.approx(b["lr"], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("after", [None, "StepLR", "CosineAnnealingLR"])
def test_warmup_is_a_linear_schedule_followed_by_another(after):
    ours, theirs = parameters("float64", np.random.default_rng(0))
    mine, their = optim.SGD(ours, lr=0.8), torch.optim.SGD(theirs, lr=0.8)
    warm = optim.WarmupLR(mine, 4, after=after and STEPPED[after](mine, optim))
    linear = SCHEDULES.LinearLR(their, start_factor=1 / 5, total_iters=4)
    then = STEPPED[after](their, SCHEDULES) if after else SCHEDULES.ConstantLR(their, 1.0)
    both = SCHEDULES.SequentialLR(their, [linear, then], [4])
    their.step()
    for _ in range(15):
        assert mine.param_groups[0]["lr"] == pytest.approx(their.param_groups[0]["lr"], rel=1e-9, abs=1e-12)
        warm.step()
        both.step()


CHANGES = {
    "SGD": {
        "momentum": [0.0, 0.9], "dampening": [0.0, 0.5], "weight_decay": [0.0, 0.1], "lr": [0.0, 0.1]
    },
    "Adam": {"betas": [(0.9, 0.99), (0.5, 0.9)], "eps": [1e-8, 0.1], "weight_decay": [0.0, 0.1], "lr": [0.0, 0.1]},
    "AdamW": {"betas": [(0.9, 0.99), (0.0, 0.9)], "weight_decay": [0.0, 0.1], "lr": [0.0, 0.1]},
    "RMSprop": {"alpha": [0.0, 0.5, 0.99], "eps": [1e-8, 0.1], "weight_decay": [0.0, 0.1], "lr": [0.0, 0.1]},
    "Adagrad": {"lr_decay": [0.0, 0.5], "eps": [1e-8, 0.1], "weight_decay": [0.0, 0.1], "lr": [0.0, 0.1]},
}  # fmt: skip


@pytest.mark.parametrize("kind", CHANGES)
@given(data=st.data())
def test_options_changed_between_steps(kind, data):
    rng = np.random.default_rng(0)
    ours, theirs = parameters("float64", rng)
    mine, their = getattr(optim, kind)(ours, lr=0.1), getattr(torch.optim, kind)(theirs, lr=0.1)
    for step in range(6):
        options = data.draw(st.fixed_dictionaries({k: st.sampled_from(v) for k, v in CHANGES[kind].items()}))
        without = data.draw(st.sets(st.integers(0, len(ours) - 1), max_size=2))
        mine.param_groups[0].update(options)
        their.param_groups[0].update(options)
        give_gradients(ours, theirs, rng, without)
        mine.step()
        their.step()
        same_parameters(ours, theirs, f"after step {step}")


@pytest.mark.parametrize("name", ["clip_grad_norm_", "clip_grad_value_"])
@given(
    seed=st.integers(0, 2**32), dtype=st.sampled_from(list(TOLERANCE)), limit=st.sampled_from([1e-3, 0.5, 3.0, 100.0])
)
def test_clipping(name, seed, dtype, limit):
    rng = np.random.default_rng(seed)
    ours, theirs = parameters(dtype, rng)
    if name == "clip_grad_value_":  # the 0-d parameter is the subject of the next test
        ours, theirs = ours[:2], theirs[:2]
    give_gradients(ours, theirs, rng, without=[1])
    mine, their = getattr(optim, name)(ours, limit), getattr(torch.nn.utils, name)(theirs, limit)
    assert mine is their is None or mine == pytest.approx(their.item(), rel=TOLERANCE[dtype])
    for p, q in zip(ours, theirs, strict=True):
        if q.grad is None:
            assert p.grad is None
        else:
            assert p.grad.dtype == p.dtype
            close(p.grad, q.grad, TOLERANCE[dtype], name)


def test_clipping_the_value_of_a_0d_gradient():
    ours, theirs = Tensor(1.0, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    give_gradients([ours], [theirs], np.random.default_rng(0))
    optim.clip_grad_value_([ours], 1e-3)
    torch.nn.utils.clip_grad_value_([theirs], 1e-3)
    close(ours.grad, theirs.grad, TOLERANCE["float32"])
