"""Optimisers against their formulas, resuming, parameter groups, clipping and schedules."""

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


def test_errors():
    p = parameter()
    with pytest.raises(ValueError, match="no parameters"):
        optim.SGD([])
    for twice in ([p, p], [{"params": [p]}, {"params": [p]}]):
        with pytest.raises(ValueError, match="more than once"):
            optim.SGD(twice)
    with pytest.raises(ValueError, match="Adam has no option 'momentum'; it has lr, betas"):
        optim.Adam([{"params": [p], "momentum": 0.9}])
    for option in ("lr", "weight_decay", "eps"):
        with pytest.raises(ValueError, match=rf"{option} has to be 0 or more; got -1\.0"):
            optim.RMSprop([{"params": [p], option: -1.0}])
    with pytest.raises(ValueError, match=r"betas have to be two numbers in \[0, 1\)"):
        optim.AdamW([p], betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="betas have to be two numbers"):
        optim.AdamW([p], betas=(0.9,))
    for betas in (0.9, None, ("a", "b")):
        with pytest.raises(ValueError, match="betas have to be two numbers"):
            optim.AdamW([p], betas=betas)
    for lr in ("1", Tensor(0.1), np.array([0.1])):
        with pytest.raises(TypeError, match="lr has to be a number; got"):
            optim.Adam([p], lr=lr)
    with pytest.raises(ValueError, match="Nesterov"):
        optim.SGD([p], nesterov=True)


@pytest.mark.parametrize(
    ("wrong", "error"), [(np.ones(1), TypeError), (Tensor([1.0, 2.0]), ValueError), (Tensor([1.0]), ValueError)]
)
def test_a_gradient_of_another_shape_is_an_error_and_changes_nothing(wrong, error):
    params = parameter(), parameter()
    optimizer = optim.Adam([{"params": p} for p in params])
    params[0].grad, params[1].grad = Tensor(G), wrong
    for refuse in (optimizer.step, lambda: optim.clip_grad_norm_(params, 0.1)):
        with pytest.raises(error, match=r"a parameter of shape \(3,\) has a gradient of"):
            refuse()
    with pytest.raises(error, match="has a"):
        optim.clip_grad_value_(params, 0.1)
    assert params[0].grad.numpy().tolist() == G.tolist()
    assert not optimizer.state
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


def test_options_that_would_train_nothing_or_wrongly_are_refused():
    p = Tensor([1.0, 2.0], requires_grad=True)
    with pytest.raises(TypeError, match=r"model\.parameters\(\)"):
        optim.SGD(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="result of an op"):
        optim.SGD([p * 2])
    for group in ({"betas": (2.0, 0.9)}, {"nesterov": True}):
        with pytest.raises(ValueError, match=r"betas|Nesterov"):
            (optim.Adam if "betas" in group else optim.SGD)([{"params": p, **group}])
    for wrong in ({"lr": float("nan")}, {"momentum": -1.0}):
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
