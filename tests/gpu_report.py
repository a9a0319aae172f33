"""Bandwidth of each kernel as a share of the copy rate, on a machine with an NVIDIA GPU: `make gpu-report`.

Bytes are those that a kernel cannot do without: every operand read once, every result written once. Beside it, if they
are installed, what CuPy and PyTorch take for the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from tinygrad_bn import Tensor, cuda, functional, grad, ops
from tinygrad_bn.functional.normalization import batch_norm_relu_fused


class Row(NamedTuple):
    """A kernel, what it moves at least, and the best time of a call."""

    name: str
    nbytes: int
    seconds: float
    torch: float | None  # seconds of PyTorch for the same


def best(run: Callable[[], Any], wait: Callable[[], None], repeats: int, calls: int = 10) -> float:
    """Seconds of a call: the best of `repeats` means over some calls, launched one after the other."""
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


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None


def measure(images: tuple[int, ...], rows: tuple[int, int], repeats: int = 20, calls: int = 10) -> Iterator[Row]:
    """Every kernel that moves memory, for images (N, C, H, W) and rows (M, C) of float32."""
    rng, torch = np.random.default_rng(0), _torch()

    def here(*shape: int) -> Tensor:
        return Tensor(rng.normal(size=shape), dtype=np.float32).to("cuda")

    x, g, flat = here(*images), here(*images), here(*rows)
    weight, bias, target = here(images[1]), here(images[1]), Tensor(rng.integers(0, rows[1], rows[0])).to("cuda")
    size, small = 4 * x.size, 4 * flat.size

    def backward(y: Tensor, xs: list[Tensor]) -> Callable[[], Any]:
        return lambda: grad(y, xs, g if y.shape == g.shape else None)

    sources = [t.detach() for t in (x, weight, bias)]
    for t in (*sources, logits := flat.detach()):
        t.requires_grad = True
    ordered: tuple[Any, ...] = (sources[0], None, None, *sources[1:])
    their = {t: torch.tensor(t.numpy(), device="cuda") for t in (x, g, weight, bias)} if torch else {}
    F = torch.nn.functional if torch else None
    cases: list[tuple[str, int, Callable[[], Any], Callable[[], Any] | None]] = [
        ("copy", 2 * size, lambda: Tensor(x), lambda: their[x].clone()),
        ("add", 3 * size, lambda: x + g, lambda: their[x] + their[g]),
        ("exp", 2 * size, lambda: x.exp(), lambda: their[x].exp()),
        ("sum of all", size, lambda: x.sum(), lambda: their[x].sum()),
        ("sum over channels", size, lambda: x.sum(axis=(0, 2, 3)), lambda: their[x].sum(dim=(0, 2, 3))),
        ("sum of rows", small, lambda: flat.sum(axis=1), None),
        ("max of columns", small, lambda: flat.max(axis=0), None),
        (
            "batch_norm training",
            2 * size,
            lambda: functional.batch_norm(x, weight=weight, bias=bias, training=True),
            lambda: F.batch_norm(their[x], None, None, their[weight], their[bias], training=True),
        ),
        ("batch_norm + relu training", 2 * size, lambda: batch_norm_relu_fused(x, weight, bias, eps=1e-5), None),
        (
            "batch_norm inference",
            2 * size,
            lambda: functional.batch_norm(x, bias, weight * weight, weight, bias),
            lambda: F.batch_norm(their[x], their[bias], their[weight] ** 2, their[weight], their[bias]),
        ),
        (
            "batch_norm backward",
            3 * size,
            backward(functional.batch_norm(*ordered, training=True), sources),
            None,
        ),
        (
            "batch_norm + relu backward",
            4 * size,
            backward(batch_norm_relu_fused(*sources, eps=1e-5), sources),
            None,
        ),
        ("layer_norm", 2 * small, lambda: functional.layer_norm(flat, rows[1]), None),
        ("cross_entropy", small, lambda: functional.cross_entropy(flat, target), None),
        ("cross_entropy backward", 2 * small, backward(functional.cross_entropy(logits, target), [logits]), None),
        ("transpose", 2 * small, lambda: ops.transpose(flat), None),
        ("dropout", 2 * size, lambda: functional.dropout(x, 0.5), lambda: F.dropout(their[x], 0.5)),
    ]
    for name, nbytes, run, theirs in cases:
        seconds = best(run, cuda.synchronize, repeats, calls)
        other = best(theirs, torch.cuda.synchronize, repeats, calls) if torch and theirs else None
        yield Row(name, nbytes, seconds, other)


def table(measured: list[Row]) -> Iterator[str]:
    """The rows in words; the first is the copy that the others are compared with."""
    rate = measured[0].nbytes / measured[0].seconds
    yield f"{'kernel':<28}{'MB':>9}{'µs':>10}{'GB/s':>9}{'of copy':>9}{'PyTorch µs':>12}"
    for r in measured:
        own = r.nbytes / r.seconds
        theirs = f"{r.torch * 1e6:12.1f}" if r.torch else f"{'-':>12}"
        yield f"{r.name:<28}{r.nbytes / 1e6:9.1f}{r.seconds * 1e6:10.1f}{own / 1e9:9.0f}{own / rate:9.0%}{theirs}"


def main() -> None:
    """Print the report, or why there is none."""
    info = cuda.info()
    if not info["available"]:
        raise SystemExit(info["reason"])
    print(f"{info['name']}, compute capability {info['compute_capability']}, {info['multiprocessors']} multiprocessors")
    for images, rows in (((128, 64, 56, 56), (1 << 15, 1024)), ((32, 32, 13, 13), (32, 100))):
        print(f"\nimages {images}, rows {rows}, float32")
        print("\n".join(table(list(measure(images, rows)))))


if __name__ == "__main__":
    main()
