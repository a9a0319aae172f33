"""The trainings of lesson 5: each is one network and one seed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from demos import init_scale, iris_mlp, loss_landscape, titanic_mlp
from tinygrad_bn import Tensor, datasets, manual_seed, nn, optim, train
from tinygrad_bn import functional as F
from tinygrad_bn.tensor import Array

ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "ReLU": nn.ReLU}


def flow(
    data: datasets.Dataset, activation: str, gain: float, depth: int, batch_norm: bool, seed: int
) -> tuple[Array, list[float]]:
    """Outputs of the last layer of an untrained network, and the norm of the gradient of each layer's outputs, for 200
    samples."""
    manual_seed(seed)
    h, hidden = Tensor(data.x[:200].reshape(200, -1)), []
    for fan_in, fan_out in pairwise((h.shape[1], *[100] * depth)):
        linear = nn.Linear(fan_in, fan_out, bias=False)
        nn.init.normal_(linear.weight, std=gain / fan_in**0.5)
        h = linear(h)
        h = ACTIVATIONS[activation]()(nn.BatchNorm1d(fan_out)(h) if batch_norm else h)
        h.retain_grad()
        hidden.append(h)
    F.cross_entropy(nn.Linear(100, 10)(h), data.y[:200]).backward()
    return h.numpy().ravel(), [float(np.linalg.norm(np.asarray(each.grad))) for each in hidden]


def placed(data: datasets.Dataset, held_out: datasets.Dataset, before: bool, seed: int) -> float:
    """Accuracy of 784-100-100-100-10 after three epochs, with BatchNorm before or after each ReLU."""
    manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise((784, 100, 100, 100)):
        pair = (nn.BatchNorm1d(fan_out), nn.ReLU())
        layers += [nn.Linear(fan_in, fan_out), *(pair if before else pair[::-1])]
    model = nn.Sequential(*layers, nn.Linear(100, 10))
    descent = optim.SGD(model.parameters(), lr=0.1)
    train.fit(model, data, optimizer=descent, epochs=3, batch_size=50, seed=seed, progress=False)
    train.recalibrate(model, data)
    return train.evaluate(model, held_out).accuracy


def race(data: datasets.Dataset, panel: int, rate: float, seed: int) -> list[list[float]]:
    """Accuracy in eight epochs without and with BatchNorm, for one of sixteen scales of the initial weights."""
    curves = []
    for batch_norm in (False, True):
        model = init_scale.build(batch_norm, float(init_scale.SCALES[panel]), seed)
        descent = optim.SGD(model.parameters(), lr=rate)
        with np.errstate(all="ignore"):
            history = train.fit(
                model, data, optimizer=descent, epochs=8, batch_size=100, seed=seed, progress=False, nonfinite="ignore"
            )
        curves.append(history["accuracy"])
    return curves


def noisy(data: datasets.Dataset, model: str, seed: int) -> float:
    """The training loss after five epochs of a model of `loss_landscape`, whose noise is new at every step."""
    net = loss_landscape.build(model, seed)
    descent, losses = optim.SGD(net.parameters(), lr=0.2), []
    for _ in range(5):
        for x, y in datasets.Batches(data.x, data.y, 100, seed=seed):
            for layer in net:
                if isinstance(layer, loss_landscape.Noise):
                    layer.draw()
            descent.zero_grad()
            loss = F.cross_entropy(net(Tensor(x)), y)
            loss.backward()
            descent.step()
            losses.append(loss.item())
    return float(np.mean(losses[-10:]))


def iris(seed: int) -> list[float]:
    """Test accuracy on Iris without and with BatchNorm, after 15 epochs of Adam."""
    return small(
        "iris", lambda bn: iris_mlp.build(bn, 4, 3), lambda m: optim.Adam(m.parameters(), lr=1e-3), 15, 32, seed
    )


def titanic(seed: int) -> list[float]:
    """Test accuracy on Titanic without and with BatchNorm, after 20 epochs of gradient descent."""
    sgd = optim.SGD
    return small(
        "titanic", lambda bn: titanic_mlp.build(bn, seed), lambda m: sgd(m.parameters(), lr=0.01), 20, 128, seed
    )


def small(
    data: str, build: Callable[[bool], nn.Module], optimizer: Callable[[nn.Module], optim.Optimizer], epochs: int,
    batch_size: int, seed: int,
) -> list[float]:  # fmt: skip
    """Test accuracy without and with BatchNorm on a small data set, split anew for each seed."""
    known = datasets.load(data).complete()
    training, test = known.split(len(known) // 5, seed=seed)
    accuracies = []
    for batch_norm in (False, True):
        manual_seed(seed)
        model = build(batch_norm)
        descent = optimizer(model)
        train.fit(model, training, optimizer=descent, epochs=epochs, batch_size=batch_size, seed=seed, progress=False)
        train.recalibrate(model, training)
        accuracies.append(train.evaluate(model, test).accuracy)
    return accuracies
