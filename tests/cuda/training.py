"""Networks and training steps that tests run on cuda and on the CPU."""

import numpy as np

from tinygrad_bn import Tensor, functional, nn, optim
from tinygrad_bn.tensor import OPS

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
