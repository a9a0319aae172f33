"""Derivatives of BatchNorm of orders 0 to 6: of the kernels, of the steps, of PyTorch, and the truth.

h(t) = Σ BN(x + t·v) · w moves a batch x (6, 3) along a direction v. Its derivatives at t = 0 are computed by this
package, with its fused kernels and step by step; by PyTorch, if it is installed; and by power series in decimals of 60
digits, without any autograd engine: the truth. The figure shows the relative errors, and how far the Taylor
polynomials of these derivatives are from h. A polynomial of order 6 comes near it as t⁷ does, unless one of its
derivatives is wrong. NaN stands for a derivative that cannot be computed.
"""

import importlib.util
import math

import numpy as np

from tinygrad_bn import Tensor, composed, functional, viz
from tinygrad_bn.datasets.fetch import EMBEDDED
from tinygrad_bn.tensor import Array
from tinygrad_bn.testing.taylor import batch_norm_derivatives
from tinygrad_bn.transforms import grad

from .common import Run
from .output import start

ORDER = 6
EPS = (1e-5, 0.25)
FUSED, COMPOSED, TORCH, TRUTH = "fused kernels", "step by step", "PyTorch", "truth"
X, V, W = np.split(np.loadtxt(EMBEDDED / "high_order.csv", delimiter=",", skiprows=1), 3, axis=1)
TS = np.geomspace(0.01, 0.3)
SMALLEST = 1e-17  # an error of 0 in a logarithmic figure


def ours(eps: float) -> list[float]:
    """The derivatives by this package: a gradient of a gradient, and so on."""

    def h(t: Tensor) -> Tensor:
        return (functional.batch_norm(X + t * V, training=True, eps=eps) * W).sum()

    derivative, found = h, []
    for _ in range(ORDER + 1):
        found.append(derivative(Tensor(np.float64(0))).item())
        derivative = grad(derivative)
    return found


def in_torch(eps: float) -> list[float]:
    """The same in PyTorch; NaN from the order on for which it has no graph."""
    import torch

    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    x, v, w = map(torch.from_numpy, (X, V, W))
    y = (torch.nn.functional.batch_norm(x + t * v, None, None, training=True, eps=eps) * w).sum()
    found = [y.item()]
    while len(found) <= ORDER and y.requires_grad:
        (y,) = torch.autograd.grad(y, t, create_graph=True)
        found.append(y.item())
    return found + [math.nan] * (ORDER + 1 - len(found))


def curve(eps: float) -> Array:
    """h itself, at `TS`."""
    moved = (X + t * V for t in TS)
    return np.array([((x - x.mean(0)) / np.sqrt(x.var(0) + eps) * W).sum() for x in moved])


def polynomial(derivatives: list[float]) -> Array:
    """The Taylor polynomial of h at 0, at `TS`."""
    return np.array(sum(d / math.factorial(k) * TS**k for k, d in enumerate(derivatives) if d == d))


def errors(found: list[float], truth: list[float]) -> list[float]:
    """The relative error of each order."""
    return [abs(a - b) / abs(b) for a, b in zip(found, truth, strict=True)]


def main(argv: list[str] | None = None) -> Run:
    """Compute the derivatives in all ways, and draw their errors and the polynomials."""
    run = Run("high_order", __doc__, argv)
    has_torch = importlib.util.find_spec("torch") is not None
    figure, grid = viz.subplots(1, 2 * len(EPS), 15, 4.4)
    results, worst = {}, 0.0
    for eps, (left, right) in zip(EPS, grid[0].reshape(-1, 2), strict=True):
        ways = {TRUTH: batch_norm_derivatives((X,), (V,), W, eps, ORDER), FUSED: ours(eps)}
        with composed():
            ways[COMPOSED] = ours(eps)
        if has_torch:
            ways[TORCH] = in_torch(eps)
        results[str(eps)] = ways
        wrong = {name: errors(found, ways[TRUTH]) for name, found in ways.items() if name != TRUTH}
        worst = max(worst, *wrong[FUSED], *wrong[COMPOSED])
        for (name, each), style, at in zip(wrong.items(), ("o-", "x--", "s-"), (0, 1, 3), strict=False):
            left.semilogy(range(ORDER + 1), np.maximum(each, SMALLEST), style, color=viz.COLOURS[at], label=name)
            right.loglog(TS, np.abs(polynomial(ways[name]) - curve(eps)), style[1:], color=viz.COLOURS[at])
        left.set(title=f"relative error, eps = {eps:g}", xlabel="order of the derivative", ylim=(SMALLEST / 3, 1e2))
        right.set(title=f"|polynomial − h|, eps = {eps:g}", xlabel="t")
        rows = [[str(k), *(f"{found[k]:.4f}" for found in ways.values())] for k in range(ORDER + 1)]
        head = ("order", *ways)
        run.print(run.table(head, rows, title=f"derivatives of h at 0, eps = {eps:g}"))
    viz.legend_below(grid[0, 0])
    run.save(figure, "high_order")
    if not has_torch:
        run.print("PyTorch is not installed: `pip install torch` to compare with it.")
    run.claim("ours are right to 10 digits at every order, fused and step by step", worst < 1e-10)
    return run.finish(derivatives=results)


if __name__ == "__main__":
    start(lambda: main().code)
