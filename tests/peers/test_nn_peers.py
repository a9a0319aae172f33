"""Layers and networks against PyTorch's: the same state dict gives the same function, gradients and training."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.peers.compare import TOLERANCE, close, peer, torch
from tinygrad_bn import Tensor, nn, optim
from tinygrad_bn import functional as F

T = torch.nn
TRAINED = 1e-7  # float64, after 20 steps: Adam scales up the rounding error of a gradient that should be 0
LAYERS = {  # a layer of `nn` or `torch.nn`, and the shape of its input
    "Linear": (lambda m: m.Linear(4, 3), (5, 4)),
    "Linear, more axes": (lambda m: m.Linear(4, 3), (2, 5, 4)),
    "Linear, no bias": (lambda m: m.Linear(4, 3, bias=False), (5, 4)),
    "LayerNorm": (lambda m: m.LayerNorm(4), (5, 4)),
    "LayerNorm, axes": (lambda m: m.LayerNorm((3, 4), eps=0.1), (5, 3, 4)),
    "LayerNorm, plain": (lambda m: m.LayerNorm(4, elementwise_affine=False), (5, 4)),
    "GroupNorm": (lambda m: m.GroupNorm(2, 4), (3, 4, 3, 2)),
    "GroupNorm, no space": (lambda m: m.GroupNorm(1, 6, eps=0.1), (3, 6)),
    "GroupNorm, plain": (lambda m: m.GroupNorm(2, 4, affine=False), (3, 4, 5)),
    "InstanceNorm1d": (lambda m: m.InstanceNorm1d(4), (3, 4, 5)),
    "InstanceNorm1d, affine": (lambda m: m.InstanceNorm1d(4, affine=True), (3, 4, 5)),
    "InstanceNorm2d": (lambda m: m.InstanceNorm2d(4, eps=0.1, affine=True), (3, 4, 3, 2)),
    # PyTorch's default eps is that of the dtype
    "RMSNorm": (lambda m: m.RMSNorm(4, eps=1e-5), (5, 4)),
    "RMSNorm, axes": (lambda m: m.RMSNorm((3, 4), eps=0.1), (5, 3, 4)),
    "RMSNorm, plain": (lambda m: m.RMSNorm(4, eps=1e-5, elementwise_affine=False), (5, 4)),
    "activations": (
        lambda m: m.Sequential(m.ELU(), m.GELU(), m.LeakyReLU(), m.SiLU(), m.Softplus(), m.Tanh(), m.Sigmoid()),
        (5, 4),
    ),
    "ReLU, Flatten, Softmax": (lambda m: m.Sequential(m.ReLU(), m.Flatten(), m.Softmax(-1)), (5, 2, 3)),
    "nested": (
        lambda m: m.Sequential(m.Linear(4, 6), m.Sequential(m.BatchNorm1d(6), m.ELU(0.5)), m.Linear(6, 2)),
        (5, 4),
    ),
}


def load(ours, theirs, rng):
    """Random values for all of PyTorch's parameters, and its state dict into ours."""
    for p in theirs.parameters():
        p.data = torch.tensor(rng.normal(0.5, 1, tuple(p.shape)), dtype=p.dtype)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())


def same_gradients(ours, theirs, tolerance):
    for (key, p), (name, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert key == name
        close(p.grad, q.grad, tolerance, f"gradient of {key}")


@pytest.mark.parametrize("name", LAYERS)
@given(seed=st.integers(0, 2**32), dtype=st.sampled_from(list(TOLERANCE)))
def test_layers(name, seed, dtype):
    layer, shape = LAYERS[name]
    ours, theirs, rng = layer(nn), layer(T), np.random.default_rng(seed)
    load(ours, theirs, rng)  # both in float32, so that the numbers are the same in float64
    ours.astype(dtype)
    theirs.double()
    for training in (True, False):
        ours.train(training).zero_grad()
        theirs.train(training).zero_grad()
        a = rng.normal(size=shape).astype(dtype)
        x, t = Tensor(a, requires_grad=True), peer(a).requires_grad_()
        y, z = ours(x), theirs(t)
        close(y, z, TOLERANCE[dtype], "output")
        g = rng.normal(size=y.shape).astype(dtype)
        y.backward(g)
        z.backward(peer(g))
        close(x.grad, t.grad, TOLERANCE[dtype], "gradient of x")
        same_gradients(ours, theirs, TOLERANCE[dtype])


def networks():
    def network(m):
        hidden = [(m.Linear(n, o), m.BatchNorm1d(o), m.ReLU()) for n, o in ((5, 16), (16, 12))]
        return m.Sequential(*itertools.chain(*hidden), m.Linear(12, 3))

    return network(nn).astype("float64"), network(T).double()


def test_a_network_learns_the_same():
    rng = np.random.default_rng(3)
    torch.manual_seed(3)
    ours, theirs = networks()
    ours.load_state_dict(theirs.state_dict())
    mine, their = optim.Adam(ours.parameters(), lr=0.03), torch.optim.Adam(theirs.parameters(), lr=0.03)
    losses = []
    for _ in range(20):
        x, target = rng.normal(size=(16, 5)), rng.integers(0, 3, 16)
        x[:, 0] += 2 * target  # something to learn
        mine.zero_grad()
        their.zero_grad()
        loss, peers_loss = F.cross_entropy(ours(x), target), T.functional.cross_entropy(theirs(peer(x)), peer(target))
        close(loss, peers_loss, TRAINED, "loss")
        loss.backward()
        peers_loss.backward()
        mine.step()
        their.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    ours.eval()
    theirs.eval()
    x = rng.normal(size=(16, 5))
    close(ours(x), theirs(peer(x)), TRAINED, "evaluation")


def test_state_dicts_of_a_network_go_both_ways():
    rng = np.random.default_rng(5)
    ours, theirs = networks()
    ours(rng.normal(size=(8, 5)))  # so that the running statistics are no longer those of a new network
    theirs.load_state_dict({key: torch.tensor(value) for key, value in ours.state_dict().items()})
    again, _ = networks()
    again.load_state_dict(theirs.state_dict())
    for (key, a), (name, b) in zip(ours.state_dict().items(), again.state_dict().items(), strict=True):
        assert key == name
        np.testing.assert_array_equal(a, b)
    x = rng.normal(size=(6, 5))
    ours.eval()
    theirs.eval()
    close(ours(x), theirs(peer(x)), TOLERANCE["float64"])
