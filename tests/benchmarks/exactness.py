"""How many digits BatchNorm keeps: ours, NumPy's formula in float32, PyTorch and JAX. `make exactness` prints it.

x = offset + N(0, 1) in float32, and likewise g, the gradient of the output. The error is the largest |result − float64
result of the same float32 input|, of the output (whose deviation is 1) and of the gradient of x, relative to its
largest element.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from tinygrad_bn import Tensor
from tinygrad_bn import functional as F
from tinygrad_bn.backend import kernels_disabled

SHAPES = [(500, 64), (32, 16, 26, 26)]
OFFSETS = [*((offset, 0.0) for offset in (0.0, 1e2, 1e3, 1e4, 1e5, 1e6)), (0.0, 1e2), (0.0, 1e4), (0.0, 1e6)]
EPS = 1e-5

Contender: TypeAlias = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def ours(x: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Output and gradient of this package."""
    t = Tensor(x, requires_grad=True)
    y = F.batch_norm(t, training=True, eps=EPS)
    y.backward(g)
    assert t.grad is not None
    return y.numpy(), t.grad.numpy()


def numpy_formula(x: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The textbook formulas, in x's precision."""
    axes = (0, *range(2, x.ndim))
    xmu = x - x.mean(axes, keepdims=True)
    ivar = 1 / np.sqrt((xmu * xmu).mean(axes, keepdims=True) + np.float32(EPS))
    xhat = xmu * ivar
    gx = ivar * (g - g.mean(axes, keepdims=True) - xhat * (g * xhat).mean(axes, keepdims=True))
    return xhat, gx


def pytorch(x: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Output and gradient of PyTorch on the CPU."""
    t = torch.tensor(x, requires_grad=True)
    y = torch.nn.functional.batch_norm(t, None, None, training=True, eps=EPS)
    y.backward(torch.tensor(g))
    return y.detach().numpy(), t.grad.numpy()


def jax_with(normalize: Callable[[jax.Array, tuple[int, ...]], jax.Array]) -> Contender:
    """Output and gradient of a function of x and the axes, compiled by JAX."""

    def run(x: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        axes = (0, *range(2, x.ndim))
        y, pull = jax.vjp(jax.jit(lambda x: normalize(x, axes)), jnp.asarray(x))
        return np.asarray(y), np.asarray(pull(jnp.asarray(g))[0])

    return run


def _by_var(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    mean, var = x.mean(axes, keepdims=True), jnp.var(x, axes, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(var + EPS)


CONTENDERS: dict[str, Contender] = {
    "ours": ours,
    "NumPy": numpy_formula,
    "PyTorch": pytorch,
    "jnp.var": jax_with(_by_var),
    "jax.nn.standardize": jax_with(lambda x, axes: jax.nn.standardize(x, axis=axes, epsilon=EPS)),
}


def errors(shape: tuple[int, ...], offset: float, offset_of_g: float) -> dict[str, tuple[float, float]]:
    """The error of output and gradient of each contender."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=shape) + offset).astype(np.float32)
    g = (rng.normal(size=shape) + offset_of_g).astype(np.float32)
    with kernels_disabled():
        want_y, want_gx = ours(x.astype(np.float64), g.astype(np.float64))
    found = {}
    for name, contender in CONTENDERS.items():
        y, gx = contender(x, g)
        found[name] = float(np.abs(y - want_y).max()), float(np.abs(gx - want_gx).max() / np.abs(want_gx).max())
    return found


def main() -> None:
    """Measure and print."""
    table = Table(box=box.MARKDOWN)
    for head in ("shape", "offset of x", "of g", *(f"{name}: y, ∂x" for name in CONTENDERS)):
        table.add_column(head, justify="left" if head == "shape" else "right")
    for shape in SHAPES:
        for offset, offset_of_g in OFFSETS:
            found = errors(shape, offset, offset_of_g)
            table.add_row(
                str(shape), f"{offset:g}", f"{offset_of_g:g}", *(f"{y:.0e}, {gx:.0e}" for y, gx in found.values())
            )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
