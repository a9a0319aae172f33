"""Networks that tests explain, and the law of their paths."""

import numpy as np

from tinygrad_bn import Tensor, functional, nn
from tinygrad_bn.explain import explain


def network(dtype=np.float64):
    rng = np.random.default_rng(0)
    layers = nn.Linear(3, 4, rng=rng), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3, rng=rng)
    x = Tensor(rng.normal(2, 1.5, (8, 3)).astype(dtype), requires_grad=True)
    return nn.Sequential(*layers).astype(dtype), x, rng.integers(0, 3, 8)


def images():
    rng = np.random.default_rng(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, rng=rng), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2, rng=rng),
        nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 5, rng=rng),
    ).astype(np.float64)  # fmt: skip
    return model, Tensor(rng.normal(size=(6, 1, 12, 12)), requires_grad=True), rng.integers(0, 5, 6)


def explained(make=network, dtype=None):
    model, x, target = make() if dtype is None else make(dtype)
    with explain() as e:
        loss = functional.cross_entropy(model(x), target)
        loss.backward()
    return e, model, x, loss


def expect_shares_that_sum(view, via=None):
    """The shares sum to the gradient, to 1e-12 of the largest gradient of the pass: shares may cancel to 0."""
    shares = list((view.paths if via is None else view.paths(via)).values())
    size = max(np.abs(np.asarray(g)).max(initial=0) for g in view._explanation.passes[-1].grads.values())
    assert np.abs(sum(shares) - view.grad).max(initial=0) <= 1e-12 * size, view
