"""Contenders for the speed table: the first article's convolutional network, and its parts."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch

from tests.benchmarks.steps import Work, jax_step, our_step, torch_step
from tinygrad_bn import Tensor, datasets, manual_seed, nn, optim, train

CONVOLUTIONS = [(32, 1, 28, 32), (256, 1, 28, 32), (32, 32, 13, 64), (256, 32, 13, 64)]  # N, C, H = W, O
AROUND = [(32, 32, 26, 26), (256, 32, 26, 26)]
BATCHES = [32, 256]


def layers(library: object) -> list:
    """The network in ours or PyTorch's terms, which are the same."""
    return [
        library.Conv2d(1, 32, 3), library.BatchNorm2d(32), library.ReLU(), library.MaxPool2d(2),
        library.Conv2d(32, 64, 3), library.BatchNorm2d(64), library.ReLU(), library.MaxPool2d(2),
        library.Flatten(), library.Linear(1600, 256), library.Linear(256, 10),
    ]  # fmt: skip


def training_step(batch: int) -> dict[str, Work]:
    """Forward, cross-entropy, backward and Adam on a batch of images."""
    rng = np.random.default_rng(0)
    x, y = rng.random((batch, 1, 28, 28), dtype=np.float32), rng.integers(0, 10, batch)
    manual_seed(0)
    ours, theirs, compiled = nn.Sequential(*layers(nn)), *(torch.nn.Sequential(*layers(torch.nn)) for _ in range(2))
    return {
        "ours": our_step(ours, x, y),
        "PyTorch": torch_step(theirs, x, y, compiled=False),
        "compiled": torch_step(compiled, x, y, compiled=True),
        "JAX jit": _jax_step(x, y),
    }


def _jax_step(x: np.ndarray, y: np.ndarray) -> Work:
    """The network in JAX's terms."""
    rng = np.random.default_rng(0)
    shapes = {"w1": (32, 1, 3, 3), "w2": (64, 32, 3, 3), "w3": (1600, 256), "w4": (256, 10)}
    params = {k: rng.normal(size=s).astype(np.float32) / np.sqrt(np.prod(s[:-1])) for k, s in shapes.items()}
    for name, size in {"b1": 32, "b2": 64, "b3": 256, "b4": 10, "beta1": 32, "beta2": 64}.items():
        params[name] = np.zeros(size, np.float32)
    params |= {"gamma1": np.ones(32, np.float32), "gamma2": np.ones(64, np.float32)}

    def block(p: dict, i: int, x: jax.Array, stats: tuple) -> tuple:
        x = jax.lax.conv(x, p[f"w{i}"], (1, 1), "VALID") + p[f"b{i}"][:, None, None]
        mu, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
        new = (0.9 * stats[0] + 0.1 * mu, 0.9 * stats[1] + 0.1 * var)
        scale = jax.lax.rsqrt(var + 1e-5) * p[f"gamma{i}"]
        x = jax.nn.relu((x - mu[:, None, None]) * scale[:, None, None] + p[f"beta{i}"][:, None, None])
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID"), new

    def network(p: dict, stats: list, x: jax.Array) -> tuple:
        x, first = block(p, 1, x, stats[0])
        x, second = block(p, 2, x, stats[1])
        logits = (x.reshape(len(x), -1) @ p["w3"] + p["b3"]) @ p["w4"] + p["b4"]
        return logits, [first, second]

    return jax_step(network, params, [32, 64], x, y)


def convolution(n: int, channels: int, size: int, out: int) -> dict[str, Work]:
    """One convolution, 3 × 3, forward and backward; a first layer's input wants no gradient."""
    ours, theirs = nn.Conv2d(channels, out, 3), torch.nn.Conv2d(channels, out, 3)
    return _layer(ours, theirs, (n, channels, size, size), (n, out, size - 2, size - 2), channels > 1)


def around(shape: tuple[int, ...]) -> dict[str, Work]:
    """BatchNorm, ReLU and pooling by 2, forward and backward."""

    def build(library: object, join: Callable) -> object:
        return join(library.BatchNorm2d(shape[1]), library.ReLU(), library.MaxPool2d(2))

    out = (*shape[:2], shape[2] // 2, shape[3] // 2)
    return _layer(build(nn, nn.Sequential), build(torch.nn, torch.nn.Sequential), shape, out, True)


def _layer(
    ours: nn.Module, theirs: torch.nn.Module, shape: tuple[int, ...], out: tuple[int, ...], needs_grad: bool
) -> dict[str, Work]:
    rng = np.random.default_rng(0)
    x, g = rng.random(shape, dtype=np.float32), rng.random(out, dtype=np.float32)
    xo, go = Tensor(x, requires_grad=needs_grad), Tensor(g)
    xt, gt = torch.tensor(x, requires_grad=needs_grad), torch.tensor(g)

    def run_ours() -> None:
        xo.grad = None
        ours.zero_grad()
        ours(xo).backward(go)

    def run_torch() -> None:
        xt.grad = None
        theirs.zero_grad()
        theirs(xt).backward(gt)

    return {"ours": run_ours, "PyTorch": run_torch}


def epoch(name: str) -> dict[str, Work]:
    """An epoch of the network over a whole data set in batches of 256, the making of batches included."""
    data = datasets.load(name).scaled()
    x, y = data.x[:, None], data.y
    manual_seed(0)
    ours, theirs = nn.Sequential(*layers(nn)), torch.nn.Sequential(*layers(torch.nn))
    our_rule, their_rule = optim.Adam(ours.parameters()), torch.optim.Adam(theirs.parameters())
    xt, yt = torch.tensor(x), torch.tensor(y)

    def run_torch() -> None:
        for chosen in torch.randperm(len(xt)).split(256):
            loss = torch.nn.functional.cross_entropy(theirs(xt[chosen]), yt[chosen])
            their_rule.zero_grad()
            loss.backward()
            their_rule.step()

    return {
        "ours": lambda: train.fit(ours, (x, y), epochs=1, batch_size=256, optimizer=our_rule, progress=False),
        "PyTorch": run_torch,
    }
