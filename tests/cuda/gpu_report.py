"""`make gpu-report`: the bandwidth of each kernel relative to a copy, on a machine with an NVIDIA GPU.

Bytes are the least possible: every operand read once, every result written once. Times of PyTorch and CuPy for the same
operations are added if they are installed. `kernels/cuda_programs.md` lists the programs that the cases launch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from tinygrad_bn import Tensor, cuda, functional, grad, ops, optim
from tinygrad_bn.functional import batch_norm_relu

Run = Callable[[], Any]

# Images (N, C, H, W) and rows (M, C): larger than the cache, and of the size of small demos.
SIZES = (((128, 64, 56, 56), (1 << 15, 1024)), ((32, 32, 13, 13), (32, 100)))


class Peer:
    """PyTorch or CuPy. A call with a tensor returns its copy, which is made once."""

    def __init__(self, name: str) -> None:
        if name == "torch":
            import torch

            self.module, self.wait = torch, torch.cuda.synchronize
            self._copy: Callable[[Any], Any] = partial(torch.tensor, device="cuda")
        else:
            import cupy

            self.module, self.wait, self._copy = cupy, cupy.cuda.runtime.deviceSynchronize, cupy.array
        self.wait()  # raises without a device
        self._copies: dict[Tensor, Any] = {}

    def __call__(self, t: Tensor) -> Any:
        if t not in self._copies:
            self._copies[t] = self._copy(t.numpy())
        return self._copies[t]


class Case(NamedTuple):
    """An operation to time, the least bytes that it moves, and the same operation in PyTorch and CuPy."""

    name: str
    nbytes: int
    run: Run
    torch: Callable[[Any], Any] | None = None
    cupy: Callable[[Any], Any] | None = None


class Row(NamedTuple):
    """The best time of a call, here and in the peers."""

    name: str
    nbytes: int
    seconds: float
    torch: float | None
    cupy: float | None


class Operands:
    """The tensors that the cases share, on the device."""

    def __init__(self, images: tuple[int, ...], rows: tuple[int, int]) -> None:
        self._rng = np.random.default_rng(0)
        self.x, self.g, self.flat = self.random(*images), self.random(*images), self.random(*rows)
        self.weight, self.bias = self.random(images[1]), self.random(images[1])
        self.target = Tensor(self._rng.integers(0, rows[1], rows[0])).to("cuda")
        self.size, self.small = 4 * self.x.size, 4 * self.flat.size

    def random(self, *shape: int) -> Tensor:
        return Tensor(self._rng.standard_normal(shape, np.float32)).to("cuda")


def backward(y: Tensor, xs: list[Tensor], g: Tensor | None = None) -> Run:
    """A function that computes the gradients of y with respect to xs."""
    return lambda: grad(y, xs, g)


def sources(*ts: Tensor) -> list[Tensor]:
    """The same tensors as leaves that require gradients."""
    detached = [t.detach() for t in ts]
    for t in detached:
        t.requires_grad = True
    return detached


def elementwise(o: Operands) -> Iterator[Case]:
    """Elementwise passes over images."""
    x, g, size = o.x, o.g, o.size
    yield Case("copy", 2 * size, lambda: Tensor(x), lambda p: p(x).clone(), lambda p: p(x).copy())
    yield Case("add", 3 * size, lambda: x + g, lambda p: p(x) + p(g), lambda p: p(x) + p(g))
    yield Case("add a number", 2 * size, lambda: x + 1.5, lambda p: p(x) + 1.5, lambda p: p(x) + 1.5)
    row = x[0, 0, 0]
    yield Case("add a row", 2 * size, lambda: x + row, lambda p: p(x) + p(row), lambda p: p(x) + p(row))
    yield Case("exp", 2 * size, lambda: x.exp(), lambda p: p(x).exp(), lambda p: p.module.exp(p(x)))
    mask = x > 0
    yield Case("where", 3 * size + x.size, lambda: functional.where(mask, x, g))
    yield Case("clip", 2 * size, lambda: x.clip(-1.0, 1.0), lambda p: p(x).clip(-1.0, 1.0))
    yield Case("dropout", 2 * size, lambda: functional.dropout(x, 0.5), lambda p: p.module.dropout(p(x), 0.5, True))


def reductions(o: Operands) -> Iterator[Case]:
    """Reductions over all elements, channels, rows and columns."""
    x, flat, size, small = o.x, o.flat, o.size, o.small
    yield Case("sum of all", size, lambda: x.sum(), lambda p: p(x).sum(), lambda p: p(x).sum())
    channels = (0, 2, 3)
    yield Case(
        "sum over channels", size, lambda: x.sum(axis=channels), lambda p: p(x).sum(channels),
        lambda p: p(x).sum(channels),
    )  # fmt: skip
    yield Case("sum of rows", small, lambda: flat.sum(axis=1), lambda p: p(flat).sum(1), lambda p: p(flat).sum(1))
    yield Case("max of columns", small, lambda: flat.max(axis=0), lambda p: p(flat).amax(0), lambda p: p(flat).max(0))
    yield Case(
        "argmax of rows", small, lambda: flat.argmax(1), lambda p: p(flat).argmax(1), lambda p: p(flat).argmax(1)
    )


def moving(o: Operands) -> Iterator[Case]:
    """Transposes, gather and scatter."""
    flat, small = o.flat, o.small
    index = np.random.default_rng(0).permutation(len(flat))
    there = Tensor(index).to("cuda")
    yield Case("transpose", 2 * small, lambda: ops.transpose(flat), lambda p: p(flat).T.contiguous())
    yield Case("every other column", small, lambda: flat[:, ::2], lambda p: p(flat)[:, ::2].contiguous())
    yield Case("gather rows", 2 * small, lambda: flat[there], lambda p: p(flat)[p(there)])
    (source,) = sources(flat)
    yield Case("scatter rows", 3 * small, backward(source[there], [source], flat))


def norms(o: Operands) -> Iterator[Case]:
    """BatchNorm of images and rows, and layer norm."""
    x, g, w, b, flat, size, small = o.x, o.g, o.weight, o.bias, o.flat, o.size, o.small
    xs, var = sources(x, w, b), w * w
    columns = [o.random(flat.shape[1]) for _ in range(2)]
    rows, layer = sources(flat, *columns), sources(flat)

    def trained(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return functional.batch_norm(x, weight=w, bias=b, training=True)

    yield Case(
        "batch_norm training", 2 * size, lambda: trained(x, w, b),
        lambda p: p.module.nn.functional.batch_norm(p(x), None, None, p(w), p(b), training=True),
    )  # fmt: skip
    yield Case("batch_norm + relu training", 2 * size, lambda: batch_norm_relu(x, w, b, eps=1e-5))
    yield Case(
        "batch_norm inference", 2 * size, lambda: functional.batch_norm(x, b, var, w, b),
        lambda p: p.module.nn.functional.batch_norm(p(x), p(b), p(var), p(w), p(b)),
    )  # fmt: skip
    yield Case("batch_norm backward", 3 * size, backward(trained(*xs), xs, g))
    yield Case("batch_norm + relu backward", 4 * size, backward(batch_norm_relu(*xs, eps=1e-5), xs, g))
    yield Case("batch_norm of rows", 2 * small, lambda: trained(flat, *columns))
    yield Case("batch_norm of rows backward", 3 * small, backward(trained(*rows), rows, flat))
    yield Case("layer_norm", 2 * small, lambda: functional.layer_norm(flat, flat.shape[1]))
    yield Case("layer_norm backward", 3 * small, backward(functional.layer_norm(layer[0], flat.shape[1]), layer, flat))


def layers(o: Operands) -> Iterator[Case]:
    """Losses, products, convolution and pooling. Products are compute-bound: compare times, not bandwidth."""
    x, flat, target, size, small = o.x, o.flat, o.target, o.size, o.small
    (logits,), (image,) = sources(flat), sources(x)
    yield Case(
        "cross_entropy", small, lambda: functional.cross_entropy(flat, target),
        lambda p: p.module.nn.functional.cross_entropy(p(flat), p(target)),
    )  # fmt: skip
    yield Case("cross_entropy backward", 2 * small, backward(functional.cross_entropy(logits, target), [logits]))
    square = o.random(flat.shape[1], flat.shape[1])
    product = 2 * small + 4 * square.size
    yield Case("matmul", product, lambda: flat @ square, lambda p: p(flat) @ p(square), lambda p: p(flat) @ p(square))
    bias = o.random(flat.shape[1])
    yield Case(
        "linear", product, lambda: functional.linear(flat, square, bias),
        lambda p: p.module.nn.functional.linear(p(flat), p(square), p(bias)),
    )  # fmt: skip
    kernel = o.random(x.shape[1], x.shape[1], 3, 3)
    yield Case(
        "conv2d 3 x 3", 2 * size, lambda: functional.conv2d(x, kernel, padding=1),
        lambda p: p.module.nn.functional.conv2d(p(x), p(kernel), padding=1),
    )  # fmt: skip
    convolved = functional.conv2d(image, kernel, padding=1)
    yield Case("conv2d 3 x 3 backward", 2 * size, backward(convolved, [image], o.g))
    pooled = functional.max_pool2d(image, 2)
    yield Case(
        "max_pool2d", 5 * size // 4, lambda: functional.max_pool2d(x, 2),
        lambda p: p.module.nn.functional.max_pool2d(p(x), 2),
    )  # fmt: skip
    yield Case("max_pool2d backward", 5 * size // 4, backward(pooled, [image], pooled.detach()))


def updates(o: Operands) -> Iterator[Case]:
    """Optimiser steps on a parameter of the size of the images."""
    for name, make, count in (
        ("SGD step", lambda ps: optim.SGD(ps, lr=0.1, momentum=0.9), 5),
        ("Adam step", optim.Adam, 7),
    ):
        (p,) = sources(o.x)
        p.grad = o.g
        yield Case(name, count * o.size, make([p]).step)


def cases(images: tuple[int, ...], rows: tuple[int, int]) -> Iterator[Case]:
    """All cases; the first is the copy."""
    o = Operands(images, rows)
    for group in (elementwise, reductions, moving, norms, layers, updates):
        yield from group(o)


def best(run: Run, wait: Run, repeats: int, calls: int = 10) -> float:
    """Seconds of a call: the best of `repeats` means over `calls` calls."""
    run()
    times = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        wait()
        times.append((time.perf_counter() - start) / calls)
    return min(times)


def _peer(name: str) -> Peer | None:
    try:
        return Peer(name)
    except (ImportError, RuntimeError, AssertionError):  # AssertionError: PyTorch without CUDA
        return None


def measure(images: tuple[int, ...], rows: tuple[int, int], repeats: int = 20, calls: int = 10) -> Iterator[Row]:
    """Time every case here and in the installed peers."""
    peers = {name: _peer(name) for name in ("torch", "cupy")}
    for case in cases(images, rows):
        theirs = {
            name: best(partial(run, peer), peer.wait, repeats, calls) if peer and run else None
            for name, peer, run in zip(peers, peers.values(), (case.torch, case.cupy), strict=True)
        }
        yield Row(case.name, case.nbytes, best(case.run, cuda.synchronize, repeats, calls), **theirs)


def table(measured: list[Row]) -> Iterator[str]:
    """The report's lines. The first row is the copy that the others are compared with."""
    rate = measured[0].nbytes / measured[0].seconds
    yield f"{'kernel':<28}{'MB':>9}{'µs':>10}{'GB/s':>9}{'of copy':>9}{'PyTorch µs':>12}{'CuPy µs':>12}"
    for r in measured:
        own = r.nbytes / r.seconds
        theirs = "".join(f"{t * 1e6:12.1f}" if t else f"{'-':>12}" for t in (r.torch, r.cupy))
        yield f"{r.name:<28}{r.nbytes / 1e6:9.1f}{r.seconds * 1e6:10.1f}{own / 1e9:9.0f}{own / rate:9.0%}{theirs}"


def main() -> None:
    """Print the report, or the reason why there is no device."""
    info = cuda.info()
    if not info["available"]:
        raise SystemExit(info["reason"])
    print(f"{info['name']}, compute capability {info['compute_capability']}, {info['multiprocessors']} multiprocessors")
    for images, rows in SIZES:
        print(f"\nimages {images}, rows {rows}, float32")
        print("\n".join(table(list(measure(images, rows)))))


if __name__ == "__main__":
    main()
