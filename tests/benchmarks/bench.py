"""The speed table: this package against NumPy, PyTorch and JAX, interleaved in one run. `make bench` prints it.

A ratio is the peer's time divided by ours: above 1 we are faster. In every round each contender runs in turn: after a
pause in which the others' threads go to sleep, some calls that are not timed, and then those that are. A time is the
median over the rounds. float32, two threads each.
"""

import argparse
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

# Before anything asks how many cores there are: two for everybody.
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])

import jax
import jax.numpy as jnp
import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from tests.benchmarks import cnn
from tests.benchmarks.steps import Work, jax_step, our_step, torch_step
from tinygrad_bn import Tensor, functional, manual_seed, nn
from tinygrad_bn.backend import find_kernel

torch.set_num_threads(2)

BATCH_NORM = [(32, 32), (500, 256), (4096, 1024), (32, 32, 26, 26), (128, 64, 28, 28), (64, 256, 56, 56)]
NETWORKS = [((4, 512, 512, 3), 32), ((784, 32, 32, 10), 32), ((784, 256, 128, 512, 64, 128, 256, 10), 500)]
LARGE = (64, 256, 56, 56)
PEERS = ("NumPy", "PyTorch", "compiled", "JAX jit")

# Seconds until the threads of NumPy's OpenBLAS sleep. After a product they spin for 0.11 s, measured as the CPU time of
# a process that only sleeps; the next contender would share a core with them.
SPIN = 0.15

# Seconds between two contenders otherwise.
PAUSE = 0.02

# Reductions: about so many elements each, over the last axis, the first, those of NCHW and of NHWC, and all.
REDUCTIONS = ("sum", "mean", "max", "var")
LAYOUTS: dict[str, list[tuple[tuple[int, ...], int | tuple[int, ...] | None]]] = {
    "1e3": [((32, 32), -1), ((32, 32), 0), ((4, 4, 8, 8), (0, 2, 3)), ((4, 8, 8, 4), (0, 1, 2)), ((1000,), None)],
    "1e5": [
        ((400, 256), -1),
        ((400, 256), 0),
        ((8, 16, 28, 28), (0, 2, 3)),
        ((8, 28, 28, 16), (0, 1, 2)),
        ((10**5,), None),
    ],
    "1e7": [
        ((9766, 1024), -1),
        ((9766, 1024), 0),
        ((200, 64, 28, 28), (0, 2, 3)),
        ((200, 28, 28, 64), (0, 1, 2)),
        ((10**7,), None),
    ],
    "1e8": [((97656, 1024), -1), ((97656, 1024), 0), ((10**8,), None)],
}

# Sizes whose reductions PyTorch compiles too, one in cache and one out of it: each takes seconds.
COMPILED = ("1e5", "1e7")


def interleaved(contenders: dict[str, Work], seconds: float, rounds: int = 5, pause: float = PAUSE) -> dict[str, float]:
    """Median time of each contender in milliseconds, in the steady state of a training loop."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for work in contenders.values():
        work()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < rounds:
        for name, work in contenders.items():
            time.sleep(pause)
            one = run_for(work, 0.01, least=2)  # untimed: caches, threads and clocks get going
            times[name].append(run_for(work, 2e-3, least=1, guess=one))
    return {name: statistics.median(values) * 1e3 for name, values in times.items()}


def run_for(work: Work, seconds: float, least: int, guess: float = 0.0) -> float:
    """Seconds that one call takes, over as many as fill `seconds`; the number may be guessed from what one takes."""
    start, calls = time.perf_counter(), 0
    if guess:
        calls = max(least, int(seconds / guess))
        for _ in range(calls):
            work()
    else:
        while calls < least or time.perf_counter() - start < seconds:
            work()
            calls += 1
    return (time.perf_counter() - start) / calls


def batch_norm(shape: tuple[int, ...]) -> dict[str, Work]:
    """Training forward and backward of one layer, input gradient included."""
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((2, *shape), dtype=np.float32)
    ours, theirs = _layers(shape)
    xo, go = Tensor(x, requires_grad=True), Tensor(g)
    xt, gt = torch.tensor(x, requires_grad=True), torch.tensor(g)
    axes, column = (0, *range(2, len(shape))), (1, -1) + (1,) * (len(shape) - 2)
    w, b = np.ones(shape[1], np.float32), np.zeros(shape[1], np.float32)

    def run_ours() -> None:
        xo.grad = None
        ours.zero_grad()
        ours(xo).backward(go)

    def torch_with(layer: Callable[[torch.Tensor], torch.Tensor]) -> Work:
        def run() -> None:
            xt.grad = None
            theirs.zero_grad()
            layer(xt).backward(gt)

        return run

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

    arrays = [jax.block_until_ready(jnp.asarray(a)) for a in (x, w, b, g)]
    return {
        "ours": run_ours,
        "NumPy": run_numpy,
        "PyTorch": torch_with(theirs),
        "compiled": torch_with(torch.compile(theirs)),
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
    manual_seed(0)
    theirs, compiled = (torch.nn.Sequential(*_mlp(torch.nn, sizes)) for _ in range(2))
    return {
        "ours": our_step(nn.Sequential(*_mlp(nn, sizes)), x, y),
        "PyTorch": torch_step(theirs, x, y, compiled=False),
        "compiled": torch_step(compiled, x, y, compiled=True),
        "JAX jit": _jax_step(sizes, x, y),
        "products": _products(sizes, batch),
    }


def _products(sizes: tuple[int, ...], batch: int) -> Work:
    """The matrix products of a training step alone, by NumPy: what no step can be faster than."""
    rng = np.random.default_rng(0)
    layers = [
        [rng.normal(size=shape).astype(np.float32) for shape in ((batch, i), (o, i), (batch, o))]
        for i, o in pairwise(sizes)
    ]

    def run() -> None:
        for number, (x, weight, g) in enumerate(layers):
            x @ weight.T
            g.T @ x
            if number:
                g @ weight

    return run


def _mlp(library: object, sizes: tuple[int, ...]) -> list:
    """The layers in ours or PyTorch's terms, which are the same."""
    layers = []
    for fan_in, fan_out in pairwise(sizes[:-1]):
        layers += [library.Linear(fan_in, fan_out), library.BatchNorm1d(fan_out), library.ReLU()]
    return [*layers, library.Linear(sizes[-2], sizes[-1])]


def _jax_step(sizes: tuple[int, ...], x: np.ndarray, y: np.ndarray) -> Work:
    """The network in JAX's terms."""
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

    return jax_step(network, params, list(sizes[1:-1]), x, y)


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


def reduction(name: str, shape: tuple[int, ...], axis: int | tuple[int, ...] | None) -> dict[str, Work]:
    """One reduction of an array, without autograd."""
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    xt, xj = torch.tensor(x), jnp.asarray(x)
    ours, numpys = getattr(functional, name), getattr(np, name)
    theirs = getattr(torch, {"max": "amax"}.get(name, name))
    dim = tuple(range(x.ndim)) if axis is None else axis
    jitted = jax.jit(lambda x: getattr(jnp, name)(x, axis=axis))
    torch.compiler.reset()  # of one function it compiles a few variants, and then no more
    compiled = torch.compile(lambda x: theirs(x, dim))
    return {
        "ours": lambda: ours(x, axis=axis),
        "NumPy": lambda: numpys(x, axis=axis),
        "PyTorch": lambda: theirs(xt, dim),
        "compiled": lambda: compiled(xt),
        "JAX jit": lambda: jax.block_until_ready(jitted(xj)),
    }


def peak_memory(contender: str, *, relu: bool) -> int:
    """Megabytes that a training step of BatchNorm (and ReLU) of LARGE takes at its peak, in a fresh process."""
    command = [sys.executable, "-m", "tests.benchmarks.bench", "--peak", contender, *["--relu"] * relu]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _print_peak(contender: str, relu: bool) -> None:
    def work(shape: tuple[int, ...]) -> Work:
        x, g = (np.random.default_rng(0).standard_normal(shape, dtype=np.float32) for _ in range(2))
        if contender == "ours":
            layers: list[nn.Module] = [nn.BatchNorm2d(shape[1]), *[nn.ReLU()] * relu]
            model, xo, go = nn.Sequential(*layers), Tensor(x, requires_grad=True), Tensor(g)
            return lambda: model(xo).backward(go)
        theirs = torch.nn.Sequential(torch.nn.BatchNorm2d(shape[1]), *[torch.nn.ReLU()] * relu)
        xt, gt = torch.tensor(x, requires_grad=True), torch.tensor(g)
        return lambda: theirs(xt).backward(gt)

    work(BATCH_NORM[3])()  # compile, and start threads
    step = work(LARGE)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _memory("VmRSS")
    step()
    print((_memory("VmHWM") - before) // 1000)


def _memory(field: str) -> int:
    """A line of Linux' account of this process, in kB."""
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def stall() -> tuple[float, float]:
    """A matrix product by BLAS and a kernel on threads, in ms: the sum of both alone, and in turn in one loop."""
    a, b = np.ones((500, 784), np.float32), np.ones((784, 256), np.float32)
    x, vector = np.ones((4096, 512), np.float32), np.ones(512, np.float32)
    kernel = find_kernel("batch_norm_training", "cpu")
    assert kernel is not None

    def product() -> object:
        return a @ b

    def normalization() -> object:
        return kernel(x, vector, vector, eps=1e-5)

    alone = [interleaved({"one": work}, 1.0)["one"] for work in (product, normalization)]
    return sum(alone), interleaved({"both": lambda: (product(), normalization())}, 1.0)["both"]


def memory_rates() -> tuple[float, float]:
    """Bytes a millisecond that two threads read and write when they copy, and read when they only read."""
    a = np.ones(1 << 25, np.float32)
    b, half = np.empty_like(a), a.size // 2
    halves = [(a[:half], b[:half]), (a[half:], b[half:])]
    with ThreadPoolExecutor(2) as pool:

        def both(work: Callable[[np.ndarray, np.ndarray], object]) -> Work:
            return lambda: [f.result() for f in [pool.submit(work, *pair) for pair in halves]]

        times = interleaved(
            {"copy": both(lambda x, y: np.copyto(y, x)), "read": both(lambda x, y: np.maximum.reduce(x))}, 1.0
        )
    return 2 * a.nbytes / times["copy"], a.nbytes / times["read"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="for each row (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and rows, no compiled PyTorch")
    parser.add_argument("--epoch", metavar="DATA", help="time an epoch of the CNN on a data set, such as fashion_mnist")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--relu", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        return _print_peak(args.peak, args.relu)
    if args.epoch:
        seconds = {name: run_for(work, 0.0, least=1) for name, work in cnn.epoch(args.epoch).items()}
        each = ", ".join(f"{name} {time:.1f} s" for name, time in seconds.items())
        return print(f"an epoch of the first article's CNN on {args.epoch}, in batches of 256: {each}")

    rate, read_rate = memory_rates()
    table = Table(box=box.MARKDOWN)
    for head in ("work", "ours, ms", *(f"vs {peer}" for peer in PEERS), "share of the limit"):
        table.add_column(head, justify="left" if head == "work" else "right")

    def measured(contenders: dict[str, Work], seconds: float, compile: bool = True) -> dict[str, float]:
        if args.quick or not compile:
            contenders.pop("compiled", None)
        pause = SPIN if "products" in contenders else PAUSE
        return interleaved(contenders, seconds, rounds=2 if args.quick else 5, pause=pause)

    for shape in BATCH_NORM:
        if args.quick and shape == LARGE:
            continue
        times = measured(batch_norm(shape), args.seconds)
        least = 5 * 4 * float(np.prod(shape))  # x read, y written; x and g read, gx written
        share = f"{least / rate / times['ours']:.0%} of copying" if least > 32 << 20 else "in cache"
        table.add_row(f"BatchNorm, forward + backward, {shape}", *cells([times]), share)
    for sizes, batch in NETWORKS:
        times = measured(training_step(sizes, batch), args.seconds)
        share = f"{times['products'] / times['ours']:.0%} of products"
        table.add_row(f"training step, {'-'.join(map(str, sizes))}, batch {batch}", *cells([times]), share)
    for batch in cnn.BATCHES:
        times = measured(cnn.training_step(batch), args.seconds)
        table.add_row(f"training step, the first article's CNN, batch {batch}", *cells([times]), "–")
    for work in cnn.CONVOLUTIONS:
        times = measured(cnn.convolution(*work), args.seconds / 2)
        n, channels, size, out = work
        table.add_row(f"convolution, fwd + bwd, {(n, channels, size, size)} to {out} maps", *cells([times]), "–")
    for shape in cnn.AROUND:
        times = measured(cnn.around(shape), args.seconds / 2)
        table.add_row(f"BatchNorm, ReLU, pooling by 2, fwd + bwd, {shape}", *cells([times]), "–")
    table.add_row("one product of (4, 4), forward + backward", *cells([measured(one_op(), args.seconds)]), "–")
    for size, layouts in LAYOUTS.items():
        if args.quick and size == "1e8":
            continue
        for name in ("sum", "var") if args.quick else REDUCTIONS:
            rows = [measured(reduction(name, *layout), args.seconds / 8, size in COMPILED) for layout in layouts]
            reading = [
                4 * float(np.prod(shape)) / read_rate / t["ours"] for (shape, _), t in zip(layouts, rows, strict=True)
            ]
            share = f"{min(reading):.0%} of reading" if float(size) > 1e6 else "in cache"
            table.add_row(f"{name} of {size} elements, {len(rows)} layouts of axes", *cells(rows), share)
    Console(width=170).print(table)
    if sys.platform == "linux" and not args.quick:
        for relu, what in ((False, "BatchNorm"), (True, "BatchNorm and ReLU")):
            peaks = ", ".join(f"{name} {peak_memory(name, relu=relu)} MB" for name in ("ours", "PyTorch"))
            print(f"memory that a training step of {what}, {LARGE}, takes at its peak: {peaks}")
    alone, together = stall()
    print(f"a product by BLAS and a kernel on threads: {alone:.2f} ms one by one, {together:.2f} ms in turn")
    print(f"two threads copy {rate / 1e6:.1f} GB/s and read {read_rate / 1e6:.1f} GB/s")
    print(f"load {os.getloadavg()[0]:.1f}; {os.cpu_count()} cores, {platform.machine()}")
    versions = {"Python": platform.python_version(), "NumPy": np.__version__, "PyTorch": torch.__version__}
    print(", ".join(f"{name} {version}" for name, version in {**versions, "JAX": jax.__version__}.items()))
    return None


def cells(rows: list[dict[str, float]]) -> list[str]:
    """Our time, and each peer's as a ratio; of several rows the range from the worst to the best."""
    return [_range([t["ours"] for t in rows]), *(_ratio([t[p] / t["ours"] for t in rows if p in t]) for p in PEERS)]


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"


def _ratio(values: list[float]) -> str:
    if not values:
        return "–"
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return f"{low} ×" if low == high else f"{low} to {high} ×"


if __name__ == "__main__":
    main()
