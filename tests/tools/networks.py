"""The networks of the articles with small batches of random data, and training steps of them."""

from functools import partial

import numpy as np

from demos import deep_mlp, iris_mlp, mnist_cnn, mnist_mlp, titanic_mlp
from tinygrad_bn import Tensor, capture, manual_seed, optim
from tinygrad_bn import functional as F

# The network, the shape of a sample, and the number of classes.
NETWORKS = {
    "mnist_mlp": (partial(mnist_mlp.build, True, 0), (784,), 10),
    "deep_mlp": (partial(deep_mlp.build, True, 0), (784,), 10),
    "iris_mlp": (partial(iris_mlp.build, True, 4, 3), (4,), 3),
    "titanic_mlp": (partial(titanic_mlp.build, True, 0), (3,), 2),
    "mnist_cnn": (partial(mnist_cnn.build, 0), (1, 28, 28), 10),
}


def samples_of(name: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Random samples (count, ...) and labels (count,) for the network `name`."""
    _, shape, classes = NETWORKS[name]
    rng = np.random.default_rng(0)
    return rng.normal(size=(count, *shape)).astype(np.float32), rng.integers(0, classes, count)


class Training:
    """Steps of the network `name`, each with another batch size than the step before."""

    PERIOD = 11  # steps after which the batch sizes repeat

    def __init__(self, name: str, captured: bool) -> None:
        manual_seed(0)
        self.model = NETWORKS[name][0]()
        self.optimizer = optim.Adam(self.model.parameters(), 1e-3)
        self.x, self.y = samples_of(name, self.PERIOD + 2)
        self.update = capture(self._update) if captured else self._update

    def _update(self, x, y):
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        return loss

    def step(self, n: int) -> None:
        """Step `n`, with 2 to 12 samples."""
        size = 2 + n * 4 % self.PERIOD
        self.update(self.x[:size], self.y[:size])


def deep_graph(layers: int = 2000) -> None:
    """Forward and backward pass of a network of `layers` layers."""
    h, weight = np.ones((2, 3), np.float32), Tensor(np.eye(3, dtype=np.float32), requires_grad=True)
    for _ in range(layers):
        h = F.relu(F.linear(h, weight))
    h.sum().backward()


def wide_graph(branches: int = 2000) -> None:
    """Forward and backward pass of a sum of `branches` functions of one tensor."""
    x = Tensor(np.ones((2, 3), np.float32), requires_grad=True)
    F.concatenate([x * i for i in range(branches)]).sum().backward()
