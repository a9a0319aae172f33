"""Every op on operands of any size, from denormal to nearly infinite: float32 against the reference in float64."""

import numpy as np
import pytest

from tests.framework.test_ops import BUILT_IN
from tinygrad_bn import Tensor, grad, sample
from tinygrad_bn.arguments import is_floating
from tinygrad_bn.backend import kernels_disabled
from tinygrad_bn.tensor import OPS, Op, apply
from tinygrad_bn.testing.calls import Operands, cast_real, positions

LARGEST, LEAST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).smallest_subnormal)
OF_BATCHES = {"batch_norm_training", "batch_norm_gradient", "batch_norm_weight_gradient"}
PRODUCTS = {"matmul", "linear", "conv", "conv_input", "conv_weight", "conv_with_bias"}

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, where a result overflows


def scaled(op: Op, seed: int) -> tuple[Operands, dict] | None:
    """Operands of the op that float32 can hold, each times a power of ten; None if it has no real ones."""
    xs, params = op.sample(sample.RandomDraw(seed))
    rng = np.random.default_rng(seed)
    least = -30 if op.name == "pow" else -44  # b xᵇ⁻¹ overflows on the way if x is a denormal
    factors = [10.0 ** rng.integers(least, 39) if rng.random() < 0.8 else 1.0 for _ in xs]
    if op.name == "softmax_cross_entropy":
        factors[2] = 1.0  # of class weights, in whose gradients terms cancel
    xs = tuple(
        x if x is None or not is_floating(x) else (x * f).astype(np.float32).astype(float)
        for x, f in zip(xs, factors, strict=True)
    )
    real = [x for x in xs if x is not None and is_floating(x)]
    return (xs, params) if real and all(np.isfinite(x).all() for x in real) else None


def expect_close(got: np.ndarray, want: np.ndarray, terms: np.ndarray, what: str) -> None:
    """`terms` are upper limits of what is added up on the way: where they overflow, so may the result."""
    got, largest = np.asarray(got, float), np.abs(want[np.isfinite(want)]).max(initial=0)
    with np.errstate(over="ignore"):
        same = (got == want.astype(np.float32)) | (np.isnan(got) & np.isnan(want))
    near = np.abs(got - want) <= 1e-4 * np.abs(want) + 1e-5 * largest + 10_000 * LEAST
    overflow = ~np.isfinite(got) & ~(terms < LARGEST / 4)
    assert (same | near | overflow).all(), f"{what}: {got} instead of {want}"


@pytest.mark.parametrize("name", [name for name in BUILT_IN if not OPS[name].updates])
def test_any_scale(name):
    op = OPS[name]
    for seed in range(60):
        if (drawn := scaled(op, seed)) is None:
            continue
        xs, params = drawn
        if name in OF_BATCHES and xs[0].size == 2 * xs[0].shape[1]:
            continue  # the gradients of two values are 0, but for rounding
        with kernels_disabled():
            want = np.asarray(apply(op, xs, params)[0])
            bound = want
            if name in PRODUCTS:
                bound = np.asarray(apply(op, tuple(x if x is None else np.abs(x) for x in xs), params)[0])
        narrow = cast_real(xs, np.float32)
        got = np.asarray(apply(op, narrow, params)[0])
        if (want.dtype, got.dtype) != (np.float64, np.float32):
            continue
        what = f"seed {seed}, {params}"
        expect_close(got, want, np.abs(bound), what)
        if op.differentiable and (at := positions(op, xs)):
            g = np.random.default_rng(seed).normal(size=want.shape)
            with kernels_disabled():
                exact = gradients(op, xs, at, params, g)
                bounds = exact
                if name in PRODUCTS:
                    bounds = gradients(op, [x if x is None else np.abs(x) for x in xs], at, params, np.abs(g))
            for i, a, b, c in zip(at, gradients(op, narrow, at, params, np.float32(g)), exact, bounds, strict=True):
                expect_close(a, b, np.abs(c), f"gradient {i}, {what}")


def gradients(op: Op, xs: Operands, at: list[int], params: dict, g: np.ndarray) -> list[np.ndarray]:
    operands = [Tensor(x, requires_grad=True) if i in at else x for i, x in enumerate(xs)]
    y = apply(op, operands, params)[0]
    return [np.asarray(d) for d in grad(y, [operands[i] for i in at], Tensor(g))]
