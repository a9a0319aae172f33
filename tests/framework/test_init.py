"""Initialisers: deviations, orthogonal matrices, and what they refuse."""

import inspect
import math

import numpy as np
import pytest

from tinygrad_bn import Tensor
from tinygrad_bn.nn import init

WEIGHT = (300, 200)
DEVIATIONS = {
    "kaiming_normal_": (np.sqrt(2 / 200), {}),
    "kaiming_uniform_": (np.sqrt(1 / 300), {"mode": "fan_out", "nonlinearity": "linear"}),
    "xavier_normal_": (np.sqrt(2 / 500), {}),
    "xavier_uniform_": (2 * np.sqrt(2 / 500), {"gain": 2.0}),
    "normal_": (0.5, {"std": 0.5}),
    "uniform_": (1 / np.sqrt(12), {}),
    "orthogonal_": (np.sqrt(1 / 300), {}),
}


@pytest.mark.parametrize("name", DEVIATIONS)
def test_the_deviation_of_an_initialiser(name):
    deviation, options = DEVIATIONS[name]
    t = Tensor(np.zeros(WEIGHT, np.float32))
    assert getattr(init, name)(t, **options, rng=np.random.default_rng(0)) is t
    assert abs(t.numpy().std() / deviation - 1) < 0.02
    if "uniform" in name:
        centre = 0.5 if name == "uniform_" else 0
        assert np.abs(t.numpy() - centre).max() <= deviation * np.sqrt(3) * (1 + 1e-6)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 2, 3, 1)])
def test_orthogonal(shape):
    m = init.orthogonal_(Tensor(np.zeros(shape)), rng=np.random.default_rng(0)).numpy().reshape(shape[0], -1)
    gram = m @ m.T if m.shape[0] <= m.shape[1] else m.T @ m
    np.testing.assert_allclose(gram, np.eye(len(gram)), atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 2), (5, 3), (3, 5)])
def test_all_orthogonal_matrices_are_equally_likely(shape):
    """The elements have the mean 0 then; a QR decomposition alone makes the signs on its diagonal."""
    drawn = [init.orthogonal_(Tensor(np.zeros(shape)), rng=np.random.default_rng(seed)).numpy() for seed in range(500)]
    assert np.abs(np.mean(drawn, axis=0)).max() < 0.15  # five standard errors or more
    assert np.abs(drawn).mean(axis=0).min() > 0.2


def test_constants_fans_and_errors():
    t = Tensor(np.zeros((2, 3, 5)))
    assert init.constant_(t, 4.0).numpy().min() == 4
    assert init.ones_(t).numpy().max() == 1
    assert init.zeros_(t).numpy().max() == 0
    assert init.fans(t) == (15, 10)
    with pytest.raises(ValueError, match="two axes"):
        init.kaiming_normal_(Tensor([1.0]))
    with pytest.raises(ValueError, match="no gain is known for 'swish'"):
        init.gain("swish")
    with pytest.raises(ValueError, match="fan_in"):
        init.kaiming_normal_(t, mode="fan")


@pytest.mark.parametrize("name", [*DEVIATIONS, "constant_", "zeros_", "ones_"])
def test_arguments_of_an_initialiser_are_checked(name):
    fill, t = getattr(init, name), Tensor(np.full((2, 3), 7.0))
    value = [1.0] if name == "constant_" else []
    for wrong in (t.numpy(), [[1.0]], None, Tensor(np.ones((2, 3), np.int64))):
        with pytest.raises(TypeError, match="fills a"):
            fill(wrong, *value)
    options = [o for o in inspect.signature(fill).parameters if o != "t"]
    for option in options:
        wrong_values = [math.nan, "x", None, [1.0], t, True, *([math.inf, -math.inf] if option != "value" else [])]
        if option == "rng":
            wrong_values = [0, 42, "x", np.random.RandomState(0)]
        elif option in ("mode", "nonlinearity"):
            wrong_values = ["swish", 3, None, ["relu"]]
        elif option in ("std", "gain") and name != "orthogonal_":
            wrong_values.append(-1.0)
        for wrong_value in wrong_values:
            with pytest.raises((TypeError, ValueError), match=r"has to be|'fan_in'|no gain"):
                fill(t, **({"value": 1.0} if value else {}) | {option: wrong_value})
    assert (t.numpy() == 7).all()
    assert not value or fill(t, -math.inf).numpy().max() == -math.inf
    empty = Tensor(np.zeros((0, 0)))
    assert fill(empty, *value) is empty
