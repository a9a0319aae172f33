"""The rows of the speed table by PyTorch, eager or compiled: see `ours`."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tests.benchmarks import networks
from tests.benchmarks.networks import normal
from tinygrad_bn import datasets

Work = Callable[[], object]
nn, cross_entropy = torch.nn, torch.nn.functional.cross_entropy
COMPILED = False  # set in the process of the contender "compiled"

torch.set_num_threads(2)


def _compiled(function: Any) -> Any:
    if COMPILED:
        torch.compiler.reset()  # of one function it compiles a few variants, and then no more
    return torch.compile(function) if COMPILED else function


def _both_ways(function: Any, x: np.ndarray, g: np.ndarray, needs_grad: bool = True) -> Work:
    xt, gt = torch.tensor(x, requires_grad=needs_grad), torch.tensor(g)
    leaves = [xt, *(function.parameters() if isinstance(function, nn.Module) else ())]
    forward = _compiled(function)

    def run() -> None:
        for t in leaves:
            t.grad = None
        forward(xt).backward(gt)

    return run


def _step(model: nn.Module, x: np.ndarray, y: np.ndarray) -> Work:
    optimizer = torch.optim.Adam(model.parameters())
    xt, yt = torch.tensor(x), torch.tensor(y)
    loss_of = _compiled(lambda xt, yt: cross_entropy(model(xt), yt))

    def step() -> None:
        loss = loss_of(xt, yt)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def batch_norm(shape: list[int], relu: bool = False) -> Work:
    """BatchNorm in training, forward and backward."""
    return _both_ways(networks.normalize(nn, shape, relu), *normal(2, *shape))


def mlp_step(sizes: list[int], batch: int) -> Work:
    """Forward, cross-entropy, backward and Adam."""
    return _step(networks.mlp(nn, sizes), *networks.samples(sizes, batch))


def cnn_step(batch: int) -> Work:
    """Forward, cross-entropy, backward and Adam."""
    return _step(networks.cnn(nn), *networks.images(batch))


def cnn_derivative(batch: int, order: int) -> Work:
    """The gradient of the loss by all parameters; with order 2 the Hessian times a direction."""
    model, (x, y) = networks.cnn(nn), map(torch.tensor, networks.images(batch))
    parameters = list(model.parameters())
    direction = [torch.tensor(normal(*p.shape)) for p in parameters]

    def run() -> None:
        slopes = torch.autograd.grad(cross_entropy(model(x), y), parameters, create_graph=order == 2)
        if order == 2:
            torch.autograd.grad(slopes, parameters, direction)

    return run


def cnn_epoch(name: str) -> Work:
    """An epoch over a whole data set in batches of 256, the making of batches included."""
    data = datasets.load(name).scaled()
    x, y = torch.tensor(data.x[:, None]), torch.tensor(data.y)
    model = networks.cnn(nn)
    optimizer = torch.optim.Adam(model.parameters())

    def run() -> None:
        for chosen in torch.randperm(len(x)).split(256):
            loss = cross_entropy(model(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return run


def convolution(n: int, channels: int, size: int, out: int) -> Work:
    """3 × 3, forward and backward; the input of a first layer needs no gradient."""
    x, g = normal(n, channels, size, size), normal(n, out, size - 2, size - 2)
    return _both_ways(nn.Conv2d(channels, out, 3), x, g, channels > 1)


def block(n: int, channels: int, size: int) -> Work:
    """BatchNorm, ReLU and pooling by 2, forward and backward."""
    x, g = normal(n, channels, size, size), normal(n, channels, size // 2, size // 2)
    return _both_ways(networks.block(nn, channels), x, g)


def one_op() -> Work:
    """One product of (4, 4) tensors, forward and backward."""
    return _both_ways(lambda t: t * 2.0, *normal(2, 4, 4))


def reduction(name: str, shape: list[int], axis: int | list[int] | None) -> Work:
    """One reduction, without autograd."""
    x, function = torch.tensor(normal(*shape)), getattr(torch, {"max": "amax"}.get(name, name))
    axes = list(range(x.ndim)) if axis is None else axis
    reduce = _compiled(lambda x: function(x, axes))
    return lambda: reduce(x)
