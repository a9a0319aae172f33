"""Linear, activations, Dropout, Flatten."""

from __future__ import annotations

import math
from typing import ClassVar, cast

import numpy as np

from tinygrad_bn import functional as F
from tinygrad_bn.arguments import (
    expect_array,
    expect_fits_memory,
    expect_flags,
    expect_integer,
    expect_number,
    expect_size,
)
from tinygrad_bn.functional.basics import expect_probability
from tinygrad_bn.nn import init
from tinygrad_bn.nn.module import AFFINE, Module, Parameter
from tinygrad_bn.random import generator
from tinygrad_bn.tensor import Tensor


class Linear(Module):
    """y = x Wᵀ + b, from (..., in_features) to (..., out_features).

    `weight` is (out_features, in_features), as in PyTorch; both parameters start uniform on ±1/√in_features.
    """

    _optional: ClassVar = AFFINE

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, rng: np.random.Generator | None = None
    ) -> None:
        in_features = expect_size("in_features", in_features)
        out_features = expect_size("out_features", out_features)
        expect_flags(bias=bias)
        expect_fits_memory("the weight of Linear", (out_features, in_features))
        bound = 1 / math.sqrt(in_features)
        self.in_features, self.out_features = in_features, out_features
        self.weight = Parameter(np.empty((out_features, in_features), np.float32))
        init.uniform_(self.weight, -bound, bound, rng)
        self.bias = Parameter(np.empty(out_features, np.float32)) if bias else None
        if self.bias is not None:
            init.uniform_(self.bias, -bound, bound, rng)

    def forward(self, x: Tensor) -> Tensor:
        expect_array(x, "Linear")
        if not x.ndim or x.shape[-1] != self.in_features:
            raise ValueError(f"{self!r} got an input of shape {x.shape}; its last axis has to be {self.in_features}")
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class Identity(Module):
    """y = x."""

    def forward(self, x: Tensor) -> Tensor:
        expect_array(x, "Identity")
        return x


class Flatten(Module):
    """(N, ...) to (N, product of the rest)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.flatten(x)


class Dropout(Module):
    """In training, zeroes elements with probability `p` and scales the others by 1 / (1 − p)."""

    def __init__(self, p: float = 0.5, rng: np.random.Generator | None = None) -> None:
        expect_probability(p)
        generator(rng)  # raises TypeError unless it is one
        self.p, self.rng = p, rng

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, F.dropout(x, self.p, self.training, self.rng))

    def extra_repr(self) -> str:
        return f"p={self.p}"


class ReLU(Module):
    """max(x, 0)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


class LeakyReLU(Module):
    """x where x > 0, negative_slope · x elsewhere."""

    def __init__(self, negative_slope: float = 0.01) -> None:
        self.negative_slope = expect_number("negative_slope", negative_slope)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, self.negative_slope)

    def extra_repr(self) -> str:
        return f"negative_slope={self.negative_slope}"


class ELU(Module):
    """x where x > 0, alpha · (eˣ − 1) elsewhere."""

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = expect_number("alpha", alpha)

    def forward(self, x: Tensor) -> Tensor:
        return F.elu(x, self.alpha)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"


class Sigmoid(Module):
    """1 / (1 + e⁻ˣ)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.sigmoid(x)


class Tanh(Module):
    """Hyperbolic tangent."""

    def forward(self, x: Tensor) -> Tensor:
        return F.tanh(x)


class Softplus(Module):
    """log(1 + eˣ)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(x)


class SiLU(Module):
    """x · sigmoid(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x)


class GELU(Module):
    """x · Φ(x), where Φ is the standard normal distribution function."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x)


class Softmax(Module):
    """eˣ / Σ eˣ over `axis`. `cross_entropy` takes logits: use no Softmax before it."""

    def __init__(self, axis: int = -1) -> None:
        self.axis = expect_integer("axis", axis)

    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(x, self.axis)

    def extra_repr(self) -> str:
        return f"axis={self.axis}"
