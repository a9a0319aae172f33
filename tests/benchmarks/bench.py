"""The speed table: this package against NumPy, PyTorch and JAX. `make bench` prints it.

A ratio is the peer's time divided by ours: above 1 we are faster. Each contender is a process of its own, which is
stopped while another has its turn; a time is the median of its turns. float32, two threads each.
"""

import argparse
import os
import platform
import sys
from contextlib import ExitStack, closing
from importlib.metadata import version
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from tests.benchmarks.turns import MODULES, Contender, measured

BATCH_NORM = [[32, 32], [500, 256], [4096, 1024], [32, 32, 26, 26], [128, 64, 28, 28], [64, 256, 56, 56]]
NETWORKS = [([4, 512, 512, 3], 32), ([784, 32, 32, 10], 32), ([784, 256, 128, 512, 64, 128, 256, 10], 500)]
CNN_BATCHES = [32, 256]
CONVOLUTIONS = [(32, 1, 28, 32), (256, 1, 28, 32), (32, 32, 13, 64), (256, 32, 13, 64)]  # N, C, H = W, maps
BLOCKS = [(32, 32, 26), (256, 32, 26)]  # N, C, H = W
LARGE = [64, 256, 56, 56]
IN_CACHE = 32 << 20  # bytes up to which memory is no limit
RATE_OF = 1 << 28  # bytes that are read or copied to measure the rate of memory
PEERS = [name for name in MODULES if name not in ("ours", "captured")]

# Reductions: about so many elements each, over the last axis, the first, those of NCHW and of NHWC, and all.
REDUCTIONS = ("sum", "mean", "max", "var")
LAYOUTS: dict[str, list[tuple[list[int], int | list[int] | None]]] = {
    "1e3": [([32, 32], -1), ([32, 32], 0), ([4, 4, 8, 8], [0, 2, 3]), ([4, 8, 8, 4], [0, 1, 2]), ([1000], None)],
    "1e5": [
        ([400, 256], -1),
        ([400, 256], 0),
        ([8, 16, 28, 28], [0, 2, 3]),
        ([8, 28, 28, 16], [0, 1, 2]),
        ([10**5], None),
    ],
    "1e7": [
        ([9766, 1024], -1),
        ([9766, 1024], 0),
        ([200, 64, 28, 28], [0, 2, 3]),
        ([200, 28, 28, 64], [0, 1, 2]),
        ([10**7], None),
    ],
    "1e8": [([97656, 1024], -1), ([97656, 1024], 0), ([10**8], None)],
}
COMPILED = ("1e5", "1e7")  # sizes whose reductions PyTorch compiles too, in cache and out of it: each takes seconds


class Bench:
    """The table, and the contenders that fill it."""

    def __init__(self, seconds: float, quick: bool) -> None:
        self.seconds, self.rounds = seconds, 2 if quick else 5
        names = [name for name in MODULES if not (quick and name == "compiled")]
        with ExitStack() as stack:
            self.contenders = [stack.enter_context(closing(Contender(name))) for name in names]
            self._running = stack.pop_all()  # only if all have started
        self.table = Table(box=box.MARKDOWN)
        for head in ("work", "ours, ms", *(f"vs {peer}" for peer in PEERS), "share of the limit"):
            self.table.add_column(head, justify="left" if head == "work" else "right")

    def times(self, work: str, *args: Any, without: tuple[str, ...] = (), share: float = 1.0) -> dict[str, float]:
        """Milliseconds of each contender that has this work, except some; `share` is that of the seconds of a row."""
        present = [c for c in self.contenders if c.name not in without]
        return measured(present, share * self.seconds, self.rounds, work, *args)

    def row(self, title: str, *rows: dict[str, float], limit: str = "–") -> None:
        """Our time, and each peer's as a ratio; of several rows the range from the worst to the best."""
        ratios = [_ratio([t[peer] / t["ours"] for t in rows if peer in t]) for peer in PEERS]
        self.table.add_row(title, _range([t["ours"] for t in rows]), *ratios, limit)

    def captured_row(self, title: str, times: dict[str, float]) -> None:
        """The same row with the time of our captured step."""
        self.row(f"{title}, captured", times | {"ours": times["captured"]})

    def peaks(self, relu: bool) -> str:
        """Memory that a step of BatchNorm (and ReLU) takes at its peak, ours and PyTorch's, in fresh processes."""
        found = []
        for name in ("ours", "PyTorch"):
            with closing(Contender(name)) as contender:
                contender.prepare("batch_norm", BATCH_NORM[3], relu)  # compiles, and starts threads
                found.append(f"{name} {contender.peak('batch_norm', LARGE, relu) // 10**6} MB")
        return ", ".join(found)

    def close(self) -> None:
        """End the contenders."""
        self._running.close()


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"


def _ratio(values: list[float]) -> str:
    if not values:
        return "–"
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return f"{low} ×" if low == high else f"{low} to {high} ×"


def fill(bench: Bench, quick: bool) -> str:
    """Measure every row. The rates of memory, in words."""
    eager = ("compiled",)
    copied, read = (RATE_OF / bench.times("memory", RATE_OF, copy, share=0.5)["NumPy"] for copy in (True, False))
    for shape in BATCH_NORM[: -1 if quick else None]:
        times = bench.times("batch_norm", shape)
        least = 5 * 4 * float(np.prod(shape))  # x read, y written; x and g read, gx written
        limit = f"{least / copied / times['ours']:.0%} of copying" if least > IN_CACHE else "in cache"
        bench.row(f"BatchNorm, forward + backward, {tuple(shape)}", times, limit=limit)
    for sizes, batch in NETWORKS:
        times = bench.times("mlp_step", sizes, batch)
        limit = f"{bench.times('products', sizes, batch, share=0.5)['NumPy'] / times['ours']:.0%} of products"
        title = f"training step, {'-'.join(map(str, sizes))}, batch {batch}"
        bench.row(title, times, limit=limit)
        bench.captured_row(title, times)
    for batch in CNN_BATCHES:
        times, title = bench.times("cnn_step", batch), f"training step, the first article's CNN, batch {batch}"
        bench.row(title, times)
        bench.captured_row(title, times)
    gradient, product = (bench.times("cnn_derivative", CNN_BATCHES[0], order, without=eager) for order in (1, 2))
    bench.row(f"gradient of that CNN, batch {CNN_BATCHES[0]}", gradient)
    bench.row(f"Hessian times a vector, {product['ours'] / gradient['ours']:.1f} gradients", product)
    for n, channels, size, maps in CONVOLUTIONS:
        times = bench.times("convolution", n, channels, size, maps, without=eager, share=0.5)
        bench.row(f"convolution, forward + backward, {(n, channels, size, size)} to {maps} maps", times)
    for n, channels, size in BLOCKS:
        times = bench.times("block", n, channels, size, without=eager, share=0.5)
        bench.row(f"BatchNorm, ReLU, pooling by 2, forward + backward, {(n, channels, size, size)}", times)
    bench.row("one product of (4, 4), forward + backward", bench.times("one_op", without=eager))
    for elements, layouts in LAYOUTS.items():
        if quick and elements == "1e8":
            continue
        without = () if elements in COMPILED else eager
        for name in ("sum", "var") if quick else REDUCTIONS:
            rows = [bench.times("reduction", name, *layout, without=without, share=1 / 8) for layout in layouts]
            shares = [4 * float(np.prod(s)) / read / t["ours"] for (s, _), t in zip(layouts, rows, strict=True)]
            limit = f"{min(shares):.0%} of reading" if float(elements) > 1e6 else "in cache"
            bench.row(f"{name} of {elements} elements, {len(rows)} layouts of axes", *rows, limit=limit)
    return f"two threads copy {copied / 1e6:.1f} GB/s and read {read / 1e6:.1f} GB/s"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="for each row (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and rows, no compiled PyTorch")
    parser.add_argument("--epoch", metavar="DATA", help="time an epoch of the CNN on a data set, such as fashion_mnist")
    args = parser.parse_args()
    bench = Bench(args.seconds, args.quick)
    try:
        if args.epoch:
            present = [
                c for c in bench.contenders if c.name in ("ours", "PyTorch") and c.prepare("cnn_epoch", args.epoch)
            ]
            each = ", ".join(f"{c.name} {c.once():.1f} s" for c in present)
            print(f"an epoch of the first article's CNN on {args.epoch}, in batches of 256: {each}")
            return
        rates = fill(bench, args.quick)
        Console(width=190).print(bench.table)
        print(rates)
        if sys.platform == "linux" and not args.quick:
            for relu, what in ((False, "BatchNorm"), (True, "BatchNorm and ReLU")):
                print(f"memory that a training step of {what}, {tuple(LARGE)}, takes at its peak: {bench.peaks(relu)}")
    finally:
        bench.close()
    print(f"load {os.getloadavg()[0]:.1f}; {os.cpu_count()} cores, {platform.machine()}")
    versions = ", ".join(f"{name} {version(name)}" for name in ("numpy", "torch", "jax"))
    print(f"python {platform.python_version()}, {versions}")


if __name__ == "__main__":
    main()
