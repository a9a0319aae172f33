"""The error of every kernel, measured against float64. `python -m tinygrad_bn kernels` prints it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
from tinygrad_bn_kernels import MODULES

from tinygrad_bn.autograd import grad
from tinygrad_bn.backend import Array, kernels_disabled
from tinygrad_bn.modes import composed
from tinygrad_bn.tensor import OPS, Op, Tensor, apply
from tinygrad_bn.testing.calls import cast_real

__all__ = ["KernelError", "kernel_errors"]


class KernelError(NamedTuple):
    """The largest error of one kernel in one precision, over fixed operands."""

    name: str
    device: str
    dtype: str
    computes: str  # a "primitive", a "fused" op, or an "update" of state
    error: float  # largest |kernel − reference|, relative to the largest |reference|, over all results


# Operands that get no gradient from the kernel: the class weights of a loss, statistics that are given.
CONSTANTS = {"softmax_cross_entropy": (2,), "batch_norm_inference": (1, 2)}

Case = tuple[tuple[Array, ...], dict[str, Any]]  # operands in float64, and params


def _cases(op: str) -> list[Case]:
    """Operands for a kernel, larger than the tests' and away from 0: mean 100, deviation 1."""
    rng = np.random.default_rng(0)

    def normal(*shape: int, offset: float = 0.0) -> Array:
        return rng.normal(size=shape) + offset

    images, rows = normal(24, 16, 12, 12, offset=100), normal(300, 40, offset=100)
    vectors = {16: normal(2, 16), 40: normal(2, 40)}
    if op.startswith("batch_norm"):
        if op == "batch_norm_weight_gradient":
            return [((normal(*x.shape), x), {"eps": 1e-5}) for x in (images, rows)]
        if op == "batch_norm_gradient":
            return [((normal(*x.shape), x, normal(x.shape[1])), {"eps": 1e-5}) for x in (images, rows)]
        extra = (lambda c: (np.full(c, 100.0), np.full(c, 1.5))) if op == "batch_norm_inference" else lambda c: ()
        return [((x, *extra(x.shape[1]), *vectors[x.shape[1]]), {"eps": 1e-5}) for x in (images, rows)]
    if op == "block_norm":
        of_rows = {"blocks": (300, 1, 40, 1), "eps": 1e-5, "centered": True}
        of_images = {"blocks": (24, 4, 4, 144), "eps": 1e-5, "centered": True}
        uncentered = {**of_rows, "centered": False}
        return [
            ((rows, *vectors[40]), of_rows),
            ((images, *vectors[16]), of_images),
            ((rows, *vectors[40]), uncentered),
        ]
    if op == "softmax_cross_entropy":
        target = rng.integers(0, 40, 300)
        options = [("mean", 0.0), ("sum", 0.1), ("none", 0.1)]
        return [
            ((normal(300, 40) * 5, target, np.ones(40)), {"reduction": r, "smoothing": s, "ignore_index": -100})
            for r, s in options
        ]
    if op == "where":
        return [((images > 100, images, normal(*images.shape)), {})]
    if op == "linear":
        return [((normal(300, 64), normal(40, 64), normal(40)), {})]
    if op == "matmul":
        return [((normal(300, 70), normal(70, 50)), {})]
    if op == "sum_to":
        return [((rows,), {"shape": (1, 40)}), ((images,), {"shape": (16, 1, 1)})]
    if op == "dropout_by_key":
        return [((rows,), {"p": 0.3, "key": 7})]
    if op.startswith("conv"):
        x, weight, y = normal(4, 6, 12, 12), normal(8, 6, 3, 3), normal(4, 8, 6, 12)
        how: dict[str, Any] = {"stride": (2, 1), "padding": ((1, 1), (1, 1)), "dilation": (1, 1), "groups": 1}
        if op == "conv_with_bias":
            return [((x, weight, normal(8)), how)]
        if op == "conv":
            return [((x, weight), how)]
        if op == "conv_input":
            return [((y, weight), {"size": (12, 12), **how})]
        return [((x, y), {"kernel": (3, 3), **how})]
    if op in ("max_pool", "max_pool_places"):
        window: dict[str, Any] = {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1), "dilation": (1, 1)}
        return [((images,), {"out": (6, 6), **window})]
    p, g, m, v = (*rng.normal(size=(3, 5000)), rng.uniform(0.1, 1, 5000))
    if op == "adam":
        rates = {"beta1": 0.9, "beta2": 0.999, "step_size": 0.01, "root_scale": 1.1, "eps": 1e-8, "shrink": 0.99}
        return [((p, g, m, v), {**rates, "decay": 0.0})]
    if op == "sgd":
        return [((p, g, m), {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "decay": 0.01, "nesterov": True})]
    if op == "running_statistics":
        return [((p, v, np.array(3), m, v), {"momentum": 0.1, "unbias": 1.01})]
    if op == "squared_norm":
        return [((p,), {})]
    if op in ("relu", "erf", "erfc", "silu", "gelu", "sigmoid", "tanh"):
        return [((normal(5000),), {})]
    axes: list[Any] = [None, 0, -1] if op.startswith("arg") else [None, 0, -1, (0, 2, 3), (0, 1, 2)]
    return [((images,), {"axis": axis, "keepdims": False}) for axis in axes]


def _error(got: Any, want: Any) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.max(np.abs(got - want)) / max(np.max(np.abs(want)), 1e-300))


Operands = tuple[Any, ...]
Pairs = list[tuple[Any, Any]]  # results of the kernel, and what they should be


def _forward(op: Op, cast: Operands, wide: Operands, params: dict[str, Any]) -> Pairs:
    """Results, by-products and updated state, against those of the reference in float64."""
    with kernels_disabled():
        want, exact_saved = apply(op, wide, params)
    got, saved = apply(op, cast, params)
    updated = zip(cast, wide, strict=True) if op.updates else ()
    return [(got, want), *zip(saved, exact_saved, strict=True), *updated]


def _backward(op: Op, cast: Operands, wide: Operands, params: dict[str, Any]) -> Pairs:
    """Gradients, against those of the composition in float64 by the differentiable route: no backward kernel."""
    results = []
    for arrays, exact in ((cast, False), (wide, True)):
        constants = CONSTANTS.get(op.name, ())
        real = [x.dtype.kind == "f" and i not in constants for i, x in enumerate(arrays)]
        ts = [Tensor(x, requires_grad=needed) for x, needed in zip(arrays, real, strict=True)]
        with composed() if exact else nullcontext():
            y = apply(op, ts, params)[0]
        g = Tensor(np.random.default_rng(1).normal(size=y.shape).astype(cast[0].dtype).astype(y.dtype))
        results.append(grad(y, [t for t in ts if t.requires_grad], g, create_graph=exact))
    return list(zip(*results, strict=True))


def _kernel_error(name: str, dtype: type) -> float:
    """The largest error of a kernel over its cases; the name of a backward kernel ends in `.vjp`."""
    op, measured = OPS[name.removesuffix(".vjp")], _backward if name.endswith(".vjp") else _forward
    errors = []
    for operands, params in _cases(op.name):
        cast = cast_real(operands, dtype)
        wide = cast_real(cast, np.float64)  # from `cast`, so that rounding the operands is no error of the kernel
        errors += [_error(got, want) for got, want in measured(op, cast, wide, params)]
    return max(errors)


def kernel_errors() -> Iterator[KernelError]:
    """Measure every kernel of the package in float32 and float64: some seconds, half a minute with compilation."""
    for name, device in sorted(MODULES):
        op = OPS[name.removesuffix(".vjp")]
        computes = "fused" if op.fused else "primitive" if op.differentiable or not op.updates else "update"
        for dtype in (np.float32, np.float64):
            yield KernelError(name, device, np.dtype(dtype).name, computes, _kernel_error(name, dtype))
