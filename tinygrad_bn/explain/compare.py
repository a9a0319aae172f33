"""The gradients of a layer computed in four ways, side by side."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinygrad_bn.backend import to_numpy
from tinygrad_bn.explain.table import Table
from tinygrad_bn.modes import composed, no_grad
from tinygrad_bn.nn.batch_norm import BATCH_NORMS
from tinygrad_bn.nn.module import Module
from tinygrad_bn.tensor import Array, Tensor
from tinygrad_bn.testing.gradients import ridders

SEED = 1502_03167  # not 0: data are often drawn with that, and then g would be x, which BatchNorm's gradient takes to 0
DIFFERENTIATED = 40  # elements of each tensor that differences are taken of


@dataclass(frozen=True)
class Comparison:
    """The gradients of each tensor by each method, and how far they are from each other.

    `gradients[tensor][method]` is an array. The methods are "composed", "fused", for BatchNorm "closed form", and
    "differences", which has NaN where no difference was taken; `errors[tensor]` are the error bars of the latter.
    """

    gradients: dict[str, dict[str, Array]]
    errors: dict[str, Array]

    def ulps(self, tensor: str, method: str) -> float:
        """The largest difference from the composed gradient, in units in the last place of the largest gradient."""
        want = self.gradients[tensor]["composed"]
        off = np.nanmax(np.abs(self.gradients[tensor][method] - want.astype(np.float64)), initial=0)
        return float(off / np.spacing(max(np.abs(want).max(initial=0), np.finfo(want.dtype).tiny)))

    def __bool__(self) -> bool:
        """Whether all methods agree: by 10,000 units in the last place, and differences within their error bars."""
        for tensor, by in self.gradients.items():
            if any(self.ulps(tensor, method) > 1e4 for method in by if method != "differences"):
                return False
            size = np.abs(by["composed"]).max(initial=0)
            allowed = 10 * self.errors[tensor] + 1e4 * np.finfo(by["composed"].dtype).eps * size + 1e-9
            if np.nanmax(np.abs(by["differences"] - by["composed"]) - allowed, initial=-1) > 0:
                return False
        return True

    def table(self) -> Table:
        """A row for each tensor and method: first numbers, and the distance from the composed gradient."""
        rows = []
        for tensor, by in self.gradients.items():
            for method, gradient in by.items():
                known = gradient.ravel()[~np.isnan(gradient.ravel())]
                first = " ".join(f"{v:+.8g}" for v in known[:3])
                off = np.nanmax(np.abs(gradient - by["composed"]), initial=0)
                bar = f" ± {np.nanmax(self.errors[tensor], initial=0):.1g}" if method == "differences" else ""
                rows.append((f"∂{tensor}", method, first, f"{off:.2g}{bar}", f"{self.ulps(tensor, method):.3g}"))
        head = ("gradient", "computed by", "first numbers", "largest difference from composed", "in ULPs")
        return Table("One gradient, computed in several ways", head, rows)

    def __str__(self) -> str:
        return str(self.table())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def compare_gradients(layer: Module, x: Any, g: Any = None) -> Comparison:
    """The gradients of a layer's input and parameters: composed, fused, by the closed form, and by differences.

    Args:
        layer: any module; the closed form is there for `nn.BatchNorm1d`, 2d and 3d. Its state does not change.
        x: a floating-point input, an array or a tensor.
        g: the gradient of the output; by default random numbers, as BatchNorm's gradient of a sum is 0.

    Returns:
        A `Comparison`, which prints as a table and is true if all agree. All is computed on the CPU. Differences are
        taken in float64, of at most 40 elements of each tensor, by Ridders' method, which estimates their error.

    Raises:
        TypeError: the layer is no module, or x is not floating-point.
    """
    if not isinstance(layer, Module):
        raise TypeError(f"compare_gradients takes a module; got a {type(layer).__name__}")
    layer, x = copy.deepcopy(layer).to("cpu"), to_numpy(x)
    if x.dtype.kind != "f":
        raise TypeError(f"compare_gradients differentiates by x, which has to be floating-point; got {x.dtype}")
    with no_grad():
        shape = copy.deepcopy(layer)(Tensor(x)).shape
    g = np.random.default_rng(SEED).normal(size=shape) if g is None else np.asarray(to_numpy(g), np.float64)
    fused = _gradients(layer, x, g)
    with composed():
        gradients = {name: {"composed": by_steps} for name, by_steps in _gradients(layer, x, g).items()}
    closed = _closed_form(layer, x.astype(np.float64), g) if isinstance(layer, BATCH_NORMS) else {}
    errors = {}
    for name, by in gradients.items():
        by["fused"] = fused[name]
        if name in closed:
            by["closed form"] = closed[name]
        by["differences"], errors[name] = _differences(layer, x, g, name)
    return Comparison(gradients, errors)


def _gradients(layer: Module, x: Array, g: Array) -> dict[str, Array]:
    """The engine's gradients of the input and the parameters, by a copy of the layer."""
    layer, x_leaf = copy.deepcopy(layer), Tensor(x, requires_grad=True)
    layer.zero_grad()
    layer(x_leaf).backward(g)
    leaves = {"x": x_leaf, **{k: p for k, p in layer.named_parameters() if p.requires_grad}}
    return {name: to_numpy(t.grad) for name, t in leaves.items() if t.grad is not None}


def _closed_form(layer: Any, x: Array, g: Array) -> dict[str, Array]:
    """∂x = weight · ivar / N · (N g − Σ g − x̂ Σ g x̂) in training; with given statistics weight · ivar · g."""
    axis, vector = (0, *range(2, x.ndim)), (1, -1, *(1,) * (x.ndim - 2))
    weight = 1.0 if layer.weight is None else layer.weight.numpy().astype(np.float64).reshape(vector)
    batch = layer.uses_batch(Tensor(x))
    mean = x.mean(axis) if batch else layer.running_mean.numpy().astype(np.float64)
    var = x.var(axis) if batch else layer.running_var.numpy().astype(np.float64)
    ivar = 1 / np.sqrt(var + layer.eps).reshape(vector)
    xhat = (x - mean.reshape(vector)) * ivar
    dx = weight * ivar * g
    if batch:
        dx = weight * ivar * (g - g.mean(axis, keepdims=True) - xhat * (g * xhat).mean(axis, keepdims=True))
    return {"x": dx, "weight": (g * xhat).sum(axis), "bias": g.sum(axis)}


def _differences(layer: Module, x: Array, g: Array, name: str) -> tuple[Array, Array]:
    """Numerical derivatives of Σ g · layer(x), and their errors; NaN for elements that are left out."""
    wide, x64 = copy.deepcopy(layer).astype(np.float64), x.astype(np.float64)
    values = x64 if name == "x" else to_numpy(dict(wide.named_parameters())[name])
    found, errors = np.full(values.shape, np.nan), np.full(values.shape, np.nan)
    order = np.random.default_rng(0).permutation(values.size)[:DIFFERENTIATED]
    state = wide.state_dict()

    def result(i: int, h: float) -> float:
        wide.load_state_dict(state)
        moved = values.copy()
        moved.flat[i] += h
        if name != "x":
            dict(wide.named_parameters())[name].data = moved
        with no_grad():
            return float((wide(Tensor(moved if name == "x" else x64)).numpy() * g).sum())

    for i in map(int, order):
        found.flat[i], errors.flat[i] = ridders(lambda h, i=i: result(i, h))  # type: ignore[misc]
    return found, errors
