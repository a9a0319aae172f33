"""Ops, networks and training steps that tests run on cuda and on the CPU."""

import numpy as np

from tinygrad_bn import Tensor, functional, grad, nn, optim, tensor
from tinygrad_bn.tensor import OPS
from tinygrad_bn.testing import properties

BUILT_IN = [name for name, op in OPS.items() if op.forward.__module__.startswith("tinygrad_bn.")]


def network():
    """No biases before BatchNorm: their gradients are rounding errors, which Adam would amplify."""
    rng = np.random.default_rng(3)
    return nn.Sequential(
        nn.Linear(6, 20, bias=False, rng=rng), nn.BatchNorm1d(20), nn.ReLU(), nn.Dropout(0.2, rng=rng),
        nn.Linear(20, 9, bias=False, rng=rng), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, 3, rng=rng),
    )  # fmt: skip


def images_network():
    rng = np.random.default_rng(3)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1, bias=False, rng=rng), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(27, 3, rng=rng),
    )  # fmt: skip


OPTIMISERS = {
    "adam": lambda ps: optim.Adam(ps, lr=0.05),
    "sgd": lambda ps: optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "rmsprop": lambda ps: optim.RMSprop(ps, momentum=0.5),
}


def three_steps(make, optimiser, x, y, where):
    """Losses of three training steps, and the states of model and optimiser."""
    model = make().to(where)
    optimizer = OPTIMISERS[optimiser](model.parameters())
    x, y, losses = Tensor(x).to(where), Tensor(y).to(where), []
    for _ in range(3):
        loss = functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optim.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, model.state_dict(), optimizer.state_dict()


def cuda_matches_cpu(op, xs, params, seed, dtype):
    """On cuda: the CPU's values and dtype; and gradients, by the plain and the differentiable route."""
    tolerance = 2e-5 if dtype == np.float32 else 1e-11
    cast = properties.cast_real(xs, dtype)
    _, real = properties.split_differentiable(op, cast, params)
    results = []
    for where in ("cpu", "cuda"):
        ts = [x if x is None else Tensor(x).to(where).detach() for x in cast]
        sources = [t for t, x in zip(ts, cast, strict=True) if op.differentiable and any(x is r for r in real)]
        for t in sources:
            t.requires_grad = True
        given = [t if t is None else t._data for t in ts] if op.updates else ts
        y = tensor.apply(op, given, {**params, "device": where} if "device" in params else params)[0]
        y = y if isinstance(y, Tensor) else Tensor._of(y)
        assert y.device == where, f"operands on {where} gave a result on {y.device}"
        results.append([y])
        if y.requires_grad:
            v = Tensor(np.random.default_rng(seed).normal(size=y.shape), dtype=y.dtype).to(where)
            results[-1] += grad(y, sources, v) + grad(y, sources, v, create_graph=True)
    for want, got in zip(*results, strict=True):
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        scale = 1 + np.abs(want.numpy()).max(initial=0)
        np.testing.assert_allclose(got.numpy(), want.numpy(), rtol=tolerance, atol=tolerance * scale)
