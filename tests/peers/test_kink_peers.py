"""Exactly where a function has no derivative, the one that we choose is the one that PyTorch chooses."""

import numpy as np
import pytest

from tests.peers.compare import TOLERANCE, check, torch
from tinygrad_bn import functional as F

P = torch.nn.functional

ZERO = [-1.0, -0.0, 0.0, 1.0]
TIED = [[1.0, 3.0, 3.0, 3.0], [2.0, 2.0, 2.0, 2.0], [3.0, 1.0, 1.0, 2.0]]
CONSTANT = [[2.0, 2.0, 2.0], [1.0, 2.0, 4.0], [0.0, 0.0, 0.0]]
KINKS = {
    "relu": (F.relu, torch.relu, [ZERO]),
    "abs": (F.abs, torch.abs, [ZERO]),
    "sign": (F.sign, torch.sign, [ZERO]),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.25), lambda x: P.leaky_relu(x, 0.25), [ZERO]),
    "elu": (lambda x: F.elu(x, 0.25), lambda x: P.elu(x, 0.25), [ZERO]),
    "clip": (lambda x: F.clip(x, min=-1.0, max=0.5), lambda x: torch.clip(x, -1.0, 0.5), [[-1.5, -1.0, 0.0, 0.5, 1.0]]),
    "clip below": (lambda x: F.clip(x, min=0.0), lambda x: torch.clip(x, min=0.0), [ZERO]),
    "clip above": (lambda x: F.clip(x, max=0.0), lambda x: torch.clip(x, max=0.0), [ZERO]),
    "maximum": (F.maximum, torch.maximum, [ZERO, [-1.0, 0.0, 0.0, 2.0]]),
    "minimum": (F.minimum, torch.minimum, [ZERO, [-1.0, 0.0, 0.0, 2.0]]),
    "maximum, broadcast": (F.maximum, torch.maximum, [TIED, [3.0, 2.0, 3.0, 1.0]]),
    "max": (lambda x: F.max(x, axis=1), lambda x: torch.amax(x, 1), [TIED]),
    "min": (lambda x: F.min(x, axis=1), lambda x: torch.amin(x, 1), [TIED]),
    "max of all": (F.max, torch.amax, [TIED]),
    "min of all": (F.min, torch.amin, [TIED]),
    "pow of 0": (F.pow, torch.pow, [[0.0] * 5, [0.0, 1.0, 2.0, 3.0, 0.5]]),
    "pow of 0, exponent 0": (lambda x: F.pow(x, 0), lambda x: torch.pow(x, 0), [ZERO]),
    "pow of 0, exponent 1": (lambda x: F.pow(x, 1), lambda x: torch.pow(x, 1), [ZERO]),
    "pow of 0, exponent 2": (lambda x: F.pow(x, 2), lambda x: torch.pow(x, 2), [ZERO]),
    "sqrt": (F.sqrt, torch.sqrt, [[0.0, 1.0]]),
    "huber": (
        lambda x, t: F.huber_loss(x, t, 0.5, "none"),
        lambda x, t: P.huber_loss(x, t, "none", 0.5),
        [[-1.0, -0.5, 0.0, 0.5, 1.0], [0.0] * 5],
    ),
    "l1": (lambda x, t: F.l1_loss(x, t, "none"), lambda x, t: P.l1_loss(x, t, reduction="none"), [ZERO, [0.0] * 4]),
    "std": (lambda x: F.std(x, axis=1, correction=1), lambda x: torch.std(x, dim=1, correction=1), [CONSTANT]),
    "std, biased": (lambda x: F.std(x, axis=1), lambda x: torch.std(x, dim=1, correction=0), [CONSTANT]),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", KINKS)
def test_gradients_at_kinks(name, dtype):
    ours, theirs, operands = KINKS[name]
    with np.errstate(divide="ignore"):  # the roots have an infinite slope at 0, here and there
        check(ours, theirs, [np.array(x, dtype) for x in operands], TOLERANCE[dtype])
