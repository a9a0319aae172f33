"""The speed table: this package against NumPy, PyTorch and JAX, interleaved in one run. `make bench` prints it.

A ratio is the peer's time divided by ours: above 1 we are faster. In every round each contender runs in turn, after a
pause in which the others' threads go to sleep; a time is the median over the rounds. float32, two threads each.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np

# Before a peer loads OpenMP: this sets how long an idle thread spins, for all contenders alike.
import tinygrad_bn_kernels.cpu.threads  # noqa: F401
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from tinygrad_bn import Tensor, functional, manual_seed, nn, optim

torch.set_num_threads(2)

BATCH_NORM = [(32, 32), (500, 256), (4096, 1024), (32, 32, 26, 26), (128, 64, 28, 28), (64, 256, 56, 56)]
NETWORKS = [((4, 512, 512, 3), 32), ((784, 32, 32, 10), 32), ((784, 256, 128, 512, 64, 128, 256, 10), 500)]
PEERS = ("NumPy", "PyTorch", "JAX jit")

Work = Callable[[], object]


def interleaved(contenders: dict[str, Work], seconds: float) -> dict[str, float]:
    """Median time of each contender in milliseconds."""
    repeats = {}
    for name, work in contenders.items():
        for _ in range(3):
            work()
        start = time.perf_counter()
        work()
        repeats[name] = max(1, min(200, int(2e-3 / (time.perf_counter() - start))))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[name]) < 5:
        for name, work in contenders.items():
            time.sleep(0.02)
            work()
            start = time.perf_counter()
            for _ in range(repeats[name]):
                work()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return {name: statistics.median(values) * 1e3 for name, values in times.items()}


def batch_norm(shape: tuple[int, ...]) -> dict[str, Work]:
    """Training forward and backward of one layer, input gradient included."""
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=(2, *shape)).astype(np.float32)
    ours, theirs = _layers(shape)
    xo, go = Tensor(x, requires_grad=True), Tensor(g)
    xt, gt = torch.tensor(x, requires_grad=True), torch.tensor(g)
    axes, column = (0, *range(2, len(shape))), (1, -1) + (1,) * (len(shape) - 2)
    w, b = np.ones(shape[1], np.float32), np.zeros(shape[1], np.float32)

    def run_ours() -> None:
        xo.grad = None
        ours.zero_grad()
        ours(xo).backward(go)

    def run_torch() -> None:
        xt.grad = None
        theirs.zero_grad()
        theirs(xt).backward(gt)

    def run_numpy() -> object:
        n = x.size // shape[1]
        xmu = x - x.mean(axes, keepdims=True)
        ivar = 1 / np.sqrt((xmu * xmu).mean(axes, keepdims=True) + 1e-5)
        xhat = xmu * ivar
        y = xhat * w.reshape(column) + b.reshape(column)
        gb, gw = g.sum(axes), (g * xhat).sum(axes)
        gx = w.reshape(column) * ivar * (g - gb.reshape(column) / n - xhat * gw.reshape(column) / n)
        return y, gx, gw, gb

    def normalize(x: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
        mu, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
        return (x - mu) * jax.lax.rsqrt(var + 1e-5) * w.reshape(column) + b.reshape(column)

    @jax.jit
    def step(x: jax.Array, w: jax.Array, b: jax.Array, g: jax.Array) -> object:
        y, pull = jax.vjp(normalize, x, w, b)
        return y, pull(g)

    arrays = [jnp.asarray(a) for a in (x, w, b, g)]
    return {
        "ours": run_ours,
        "NumPy": run_numpy,
        "PyTorch": run_torch,
        "JAX jit": lambda: jax.block_until_ready(step(*arrays)),
    }


def _layers(shape: tuple[int, ...]) -> tuple[nn.Module, torch.nn.Module]:
    if len(shape) == 2:
        return nn.BatchNorm1d(shape[1]), torch.nn.BatchNorm1d(shape[1])
    return nn.BatchNorm2d(shape[1]), torch.nn.BatchNorm2d(shape[1])


def training_step(sizes: tuple[int, ...], batch: int) -> dict[str, Work]:
    """Forward, cross-entropy, backward and Adam of an MLP with BatchNorm and ReLU after each hidden layer."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, sizes[0])).astype(np.float32)
    y = rng.integers(0, sizes[-1], batch)
    return {
        "ours": _our_step(sizes, x, y),
        "PyTorch": _torch_step(sizes, x, y),
        "JAX jit": _jax_step(sizes, x, y),
    }


def _our_step(sizes: tuple[int, ...], x: np.ndarray, y: np.ndarray) -> Work:
    manual_seed(0)
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes[:-1]):
        layers += [nn.Linear(fan_in, fan_out), nn.BatchNorm1d(fan_out), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))
    optimizer = optim.Adam(model.parameters())

    def step() -> None:
        loss = functional.cross_entropy(model(Tensor(x)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _torch_step(sizes: tuple[int, ...], x: np.ndarray, y: np.ndarray) -> Work:
    layers: list[torch.nn.Module] = []
    for fan_in, fan_out in pairwise(sizes[:-1]):
        layers += [torch.nn.Linear(fan_in, fan_out), torch.nn.BatchNorm1d(fan_out), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(sizes[-2], sizes[-1]))
    optimizer = torch.optim.Adam(model.parameters())
    xt, yt = torch.tensor(x), torch.tensor(y)

    def step() -> None:
        loss = torch.nn.functional.cross_entropy(model(xt), yt)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _jax_step(sizes: tuple[int, ...], x: np.ndarray, y: np.ndarray) -> Work:
    rng = np.random.default_rng(0)
    params = [
        [rng.normal(size=(i, o)).astype(np.float32) / np.sqrt(i), *np.zeros((2, o), np.float32), np.ones(o, np.float32)]
        for i, o in pairwise(sizes)
    ]

    def loss_of(params: list, stats: list, x: jax.Array, y: jax.Array) -> tuple:
        new = []
        for (w, b, beta, gamma), (mean, var) in zip(params[:-1], stats, strict=True):
            x = x @ w + b
            mu, v = x.mean(0), x.var(0)
            new.append((0.9 * mean + 0.1 * mu, 0.9 * var + 0.1 * v))
            x = jax.nn.relu((x - mu) * jax.lax.rsqrt(v + 1e-5) * gamma + beta)
        logits = x @ params[-1][0] + params[-1][1]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean(), new

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
    stats = [(jnp.zeros(o), jnp.ones(o)) for o in sizes[1:-1]]
    state = (params, stats, zeros, zeros, jnp.float32(0))
    xj, yj = jnp.asarray(x), jnp.asarray(y)

    def step() -> None:
        nonlocal state
        state = jax.block_until_ready(update(state, xj, yj))

    return step


def one_op() -> dict[str, Work]:
    """One product of (4, 4) tensors, forward and backward."""
    a, g = Tensor(np.ones((4, 4), np.float32), requires_grad=True), Tensor(np.ones((4, 4), np.float32))
    at, gt = torch.ones(4, 4, requires_grad=True), torch.ones(4, 4)

    def run_ours() -> None:
        a.grad = None
        (a * 2.0).backward(g)

    def run_torch() -> None:
        at.grad = None
        (at * 2.0).backward(gt)

    return {"ours": run_ours, "PyTorch": run_torch}


def copy_rate() -> float:
    """Bytes a millisecond that a large copy reads and writes."""
    a = np.ones(1 << 25, np.float32)
    b = np.empty_like(a)
    return 2 * a.nbytes / interleaved({"copy": lambda: np.copyto(b, a)}, 1.0)["copy"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="for each row (default: %(default)s)")
    args = parser.parse_args()

    rate = copy_rate()
    table = Table(box=box.MARKDOWN)
    for head in ("work", "ours, ms", *(f"vs {peer}" for peer in PEERS), "share of copy rate"):
        table.add_column(head, justify="left" if head == "work" else "right")
    for shape in BATCH_NORM:
        times = interleaved(batch_norm(shape), args.seconds)
        least = 5 * 4 * float(np.prod(shape))  # x read, y written; x and g read, gx written
        share = f"{least / rate / times['ours']:.0%}" if least > 32 << 20 else "in cache"
        table.add_row(f"BatchNorm, forward + backward, {shape}", *cells(times), share)
    for sizes, batch in NETWORKS:
        times = interleaved(training_step(sizes, batch), args.seconds)
        table.add_row(f"training step, {'-'.join(map(str, sizes))}, batch {batch}", *cells(times), "–")
    table.add_row("one product of (4, 4), forward + backward", *cells(interleaved(one_op(), args.seconds)), "–")
    Console(width=140).print(table)
    print(
        f"copy rate {rate / 1e6:.1f} GB/s; load {os.getloadavg()[0]:.1f}; {os.cpu_count()} cores, {platform.machine()}"
    )
    versions = {"Python": platform.python_version(), "NumPy": np.__version__, "PyTorch": torch.__version__}
    print(", ".join(f"{name} {version}" for name, version in {**versions, "JAX": jax.__version__}.items()))


def cells(times: dict[str, float]) -> list[str]:
    """Our time, and each peer's as a ratio."""
    return [f"{times['ours']:.3f}", *(f"{times[p] / times['ours']:.1f} ×" if p in times else "–" for p in PEERS)]


if __name__ == "__main__":
    main()
