"""The rows of the speed table by JAX, each compiled as a whole: see `ours`."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.benchmarks import networks
from tests.benchmarks.networks import normal

Work = Callable[[], object]


def batch_norm(shape: list[int]) -> Work:
    """BatchNorm in training, forward and backward."""
    axes, column = (0, *range(2, len(shape))), (1, -1) + (1,) * (len(shape) - 2)

    def normalize(x: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
        mu, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
        return (x - mu) * jax.lax.rsqrt(var + 1e-5) * w.reshape(column) + b.reshape(column)

    @jax.jit
    def run(x: jax.Array, w: jax.Array, b: jax.Array, g: jax.Array) -> object:
        y, pull = jax.vjp(normalize, x, w, b)
        return y, pull(g)

    x, g = map(jnp.asarray, normal(2, *shape))
    w, b = jnp.ones(shape[1]), jnp.zeros(shape[1])
    return lambda: jax.block_until_ready(run(x, w, b, g))


def _loss(network: Callable[..., Any]) -> Callable[..., tuple]:
    """Cross-entropy of `network(params, stats, x)`, which gives logits and new running statistics."""

    def loss_of(params: Any, stats: list, x: jax.Array, y: jax.Array) -> tuple:
        logits, stats = network(params, stats, x)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean(), stats

    return loss_of


def _step(network: Callable[..., Any], params: Any, features: list[int], x: np.ndarray, y: np.ndarray) -> Work:
    """Forward, cross-entropy, backward and Adam; `features` are those of the network's BatchNorms."""
    loss_of = _loss(network)

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
    state = (params, _statistics(features), zeros, zeros, jnp.float32(0))
    xj, yj = jnp.asarray(x), jnp.asarray(y)

    def step() -> None:
        nonlocal state
        state = jax.block_until_ready(update(state, xj, yj))

    return step


def _statistics(features: list[int]) -> list[tuple]:
    return [(jnp.zeros(n), jnp.ones(n)) for n in features]


def mlp_step(sizes: list[int], batch: int) -> Work:
    """Forward, cross-entropy, backward and Adam."""
    rng = np.random.default_rng(0)
    params = [
        [rng.normal(size=(i, o)).astype(np.float32) / np.sqrt(i), *np.zeros((2, o), np.float32), np.ones(o, np.float32)]
        for i, o in pairwise(sizes)
    ]

    def network(params: list, stats: list, x: jax.Array) -> tuple:
        new = []
        for (w, b, beta, gamma), (mean, var) in zip(params[:-1], stats, strict=True):
            x = x @ w + b
            mu, v = x.mean(0), x.var(0)
            new.append((0.9 * mean + 0.1 * mu, 0.9 * var + 0.1 * v))
            x = jax.nn.relu((x - mu) * jax.lax.rsqrt(v + 1e-5) * gamma + beta)
        return x @ params[-1][0] + params[-1][1], new

    return _step(network, params, sizes[1:-1], *networks.samples(sizes, batch))


CNN_FEATURES = [32, 64]


def cnn_step(batch: int) -> Work:
    """Forward, cross-entropy, backward and Adam."""
    return _step(*_cnn(), CNN_FEATURES, *networks.images(batch))


def cnn_derivative(batch: int, order: int) -> Work:
    """The gradient of the loss by all parameters; with order 2 the Hessian times a direction."""
    network, params = _cnn()
    params = jax.tree.map(jnp.asarray, params)
    direction = jax.tree.map(lambda p: jnp.asarray(normal(*p.shape)), params)
    x, y = map(jnp.asarray, networks.images(batch))
    stats = _statistics(CNN_FEATURES)

    def slopes(params: dict, x: jax.Array) -> dict:
        return jax.grad(_loss(network), has_aux=True)(params, stats, x, y)[0]

    @jax.jit
    def run(params: dict, direction: dict, x: jax.Array) -> object:
        if order == 1:
            return slopes(params, x)
        return jax.jvp(lambda params: slopes(params, x), (params,), (direction,))[1]

    return lambda: jax.block_until_ready(run(params, direction, x))


def _cnn() -> tuple[Callable[..., Any], dict]:
    """The network and its parameters."""
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

    return network, params


def reduction(name: str, shape: list[int], axis: int | list[int] | None) -> Work:
    """One reduction."""
    x, function = jnp.asarray(normal(*shape)), getattr(jnp, name)
    axes = tuple(axis) if isinstance(axis, list) else axis
    reduce = jax.jit(lambda x: function(x, axis=axes))
    return lambda: jax.block_until_ready(reduce(x))
