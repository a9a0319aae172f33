"""One training step of each library, for any network: forward, cross-entropy, backward and Adam."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch

from tinygrad_bn import Tensor, functional, nn, optim

Work = Callable[[], object]


def our_step(model: nn.Module, x: np.ndarray, y: np.ndarray) -> Work:
    """A step of ours."""
    optimizer = optim.Adam(model.parameters())

    def step() -> None:
        loss = functional.cross_entropy(model(Tensor(x)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def torch_step(model: torch.nn.Module, x: np.ndarray, y: np.ndarray, compiled: bool) -> Work:
    """A step of PyTorch's."""
    optimizer = torch.optim.Adam(model.parameters())
    xt, yt = torch.tensor(x), torch.tensor(y)

    def loss_of(xt: torch.Tensor, yt: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(xt), yt)

    loss_or_compiled = torch.compile(loss_of) if compiled else loss_of

    def step() -> None:
        loss = loss_or_compiled(xt, yt)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def jax_step(network: Callable, params: object, features: list[int], x: np.ndarray, y: np.ndarray) -> Work:
    """A step of JAX's, compiled as a whole.

    `network(params, stats, x)` gives logits and new running statistics; `features` are those of its BatchNorms.
    """

    def loss_of(params: object, stats: list, x: jax.Array, y: jax.Array) -> tuple:
        logits, stats = network(params, stats, x)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean(), stats

    @jax.jit
    def update(state: tuple, x: jax.Array, y: jax.Array) -> tuple:
        params, stats, m, v, t = state
        grads, stats = jax.grad(loss_of, has_aux=True)(params, stats, x, y)
        t = t + 1
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, grads)
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, v, grads)
        scale = 1e-3 * jnp.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        params = jax.tree.map(lambda p, m, v: p - scale * m / (jnp.sqrt(v) + 1e-8), params, m, v)
        return params, stats, m, v, t

    params = jax.tree.map(jnp.asarray, params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    state = (params, [(jnp.zeros(n), jnp.ones(n)) for n in features], zeros, zeros, jnp.float32(0))
    xj, yj = jnp.asarray(x), jnp.asarray(y)

    def step() -> None:
        nonlocal state
        state = jax.block_until_ready(update(state, xj, yj))

    return step
