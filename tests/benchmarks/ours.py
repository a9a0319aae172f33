"""The rows of the speed table by this package: each function returns the work that is timed."""

from collections.abc import Callable

import numpy as np

from tests.benchmarks import networks
from tests.benchmarks.networks import normal
from tinygrad_bn import Tensor, datasets, functional, manual_seed, nn, optim, train
from tinygrad_bn.captured import capture
from tinygrad_bn.transforms import functional_call, grad, hvp

Work = Callable[[], object]


def _both_ways(function: Callable[[Tensor], Tensor], x: np.ndarray, g: np.ndarray, needs_grad: bool = True) -> Work:
    """Forward and backward; of a module, with the gradients of its parameters."""
    xt, gt = Tensor(x, requires_grad=needs_grad), Tensor(g)
    leaves = [xt, *(function.parameters() if isinstance(function, nn.Module) else ())]

    def run() -> None:
        for t in leaves:
            t.grad = None
        function(xt).backward(gt)

    return run


def _step(model: nn.Module, x: np.ndarray, y: np.ndarray, captured: bool) -> Work:
    optimizer = optim.Adam(model.parameters())

    def step(x: np.ndarray, y: np.ndarray) -> Tensor:
        loss = functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    run = capture(step) if captured else step
    return lambda: run(x, y)


def batch_norm(shape: list[int], relu: bool = False) -> Work:
    """BatchNorm in training, forward and backward."""
    return _both_ways(networks.normalize(nn, shape, relu), *normal(2, *shape))


def mlp_step(sizes: list[int], batch: int, captured: bool = False) -> Work:
    """Forward, cross-entropy, backward and Adam."""
    manual_seed(0)
    return _step(networks.mlp(nn, sizes), *networks.samples(sizes, batch), captured)


def cnn_step(batch: int, captured: bool = False) -> Work:
    """Forward, cross-entropy, backward and Adam."""
    manual_seed(0)
    return _step(networks.cnn(nn), *networks.images(batch), captured)


def cnn_derivative(batch: int, order: int) -> Work:
    """The gradient of the loss by all parameters; with order 2 the Hessian times a direction."""
    manual_seed(0)
    model, (x, y) = networks.cnn(nn), networks.images(batch)
    state = {name: p.detach() for name, p in model.named_parameters()}
    direction = {name: Tensor(normal(*p.shape)) for name, p in state.items()}

    def loss(state: dict[str, Tensor]) -> Tensor:
        return functional.cross_entropy(functional_call(model, state, Tensor(x)), y)

    return (lambda: grad(loss)(state)) if order == 1 else (lambda: hvp(loss, state, direction))


def cnn_epoch(name: str) -> Work:
    """An epoch over a whole data set in batches of 256, the making of batches included."""
    data = datasets.load(name).scaled()
    manual_seed(0)
    model = networks.cnn(nn)
    optimizer = optim.Adam(model.parameters())
    options = {"epochs": 1, "batch_size": 256, "optimizer": optimizer, "progress": False}
    return lambda: train.fit(model, (data.x[:, None], data.y), **options)


def convolution(n: int, channels: int, size: int, out: int) -> Work:
    """3 × 3, forward and backward; the input of a first layer needs no gradient."""
    x, g = normal(n, channels, size, size), normal(n, out, size - 2, size - 2)
    return _both_ways(nn.Conv2d(channels, out, 3), x, g, channels > 1)


def block(n: int, channels: int, size: int) -> Work:
    """BatchNorm, ReLU and pooling by 2, forward and backward."""
    return _both_ways(
        networks.block(nn, channels), normal(n, channels, size, size), normal(n, channels, size // 2, size // 2)
    )


def one_op() -> Work:
    """One product of (4, 4) tensors, forward and backward."""
    return _both_ways(lambda t: t * 2.0, *normal(2, 4, 4))


def reduction(name: str, shape: list[int], axis: int | list[int] | None) -> Work:
    """One reduction of an array, without autograd."""
    x, function = normal(*shape), getattr(functional, name)
    axes = tuple(axis) if isinstance(axis, list) else axis
    return lambda: function(x, axis=axes)
