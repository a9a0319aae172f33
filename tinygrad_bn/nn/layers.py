"""Sequential, Linear, activations, Dropout, Flatten: layers without statistics."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast, overload

import numpy as np

from tinygrad_bn import functional as F
from tinygrad_bn.nn import init
from tinygrad_bn.nn.module import Module, Parameter, being_observed
from tinygrad_bn.nn.norm import BATCH_NORMS
from tinygrad_bn.tensor import Tensor


class Sequential(Module):
    """Apply layers in order. Their names are "0", "1", …, as in PyTorch's state dict.

    A BatchNorm and the ReLU after it are computed in one pass over memory, unless somebody observes their outputs.
    """

    def __init__(self, *layers: Module) -> None:
        for i, layer in enumerate(layers):
            if not isinstance(layer, Module):
                raise TypeError(f"layer {i} is a {type(layer).__name__}, not a module")
            setattr(self, str(i), layer)

    def forward(self, x: Tensor) -> Tensor:
        layers = iter([child for child in vars(self).values() if isinstance(child, Module)])
        for layer in layers:
            following = next(layers, None) if is_plain(layer, *BATCH_NORMS) and not being_observed() else None
            if following is not None and is_plain(following, ReLU):
                x = layer(x, relu=True)
            else:
                x = layer(x)
                x = x if following is None else following(x)
        return x

    def __iter__(self) -> Iterator[Module]:
        return (child for _, child in self.named_children())

    def __len__(self) -> int:
        return sum(1 for _ in self.named_children())

    @overload
    def __getitem__(self, index: int) -> Module: ...
    @overload
    def __getitem__(self, index: slice) -> Sequential: ...
    def __getitem__(self, index: int | slice) -> Module:
        layers = list(self)
        return Sequential(*layers[index]) if isinstance(index, slice) else layers[index]


def is_plain(layer: Module, *types: type) -> bool:
    """Whether `layer` is exactly of one of these types, with its `forward`: a subclass may compute something else."""
    return type(layer) in types and "forward" not in vars(layer)


class Linear(Module):
    """y = x Wᵀ + b, from (..., in_features) to (..., out_features).

    `weight` is (out_features, in_features), as in PyTorch; both parameters start uniform on ±1/√in_features.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, rng: np.random.Generator | None = None
    ) -> None:
        if in_features < 1 or out_features < 1:
            raise ValueError(f"Linear needs at least one feature in and out; got ({in_features}, {out_features})")
        bound = 1 / math.sqrt(in_features)
        self.in_features, self.out_features = in_features, out_features
        self.weight = Parameter(np.empty((out_features, in_features), np.float32))
        init.uniform_(self.weight, -bound, bound, rng)
        self.bias = Parameter(np.empty(out_features, np.float32)) if bias else None
        if self.bias is not None:
            init.uniform_(self.bias, -bound, bound, rng)

    def forward(self, x: Tensor) -> Tensor:
        if not x.ndim or x.shape[-1] != self.in_features:
            raise ValueError(f"{self!r} got an input of shape {x.shape}; its last axis has to be {self.in_features}")
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class Identity(Module):
    """y = x."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Flatten(Module):
    """(N, ...) to (N, product of the rest)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.flatten(x)


class Dropout(Module):
    """In training, zeroes elements with probability `p` and scales the others by 1 / (1 − p)."""

    def __init__(self, p: float = 0.5, rng: np.random.Generator | None = None) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"dropout probability has to be in [0, 1]; got {p}")
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
        self.negative_slope = negative_slope

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, self.negative_slope)

    def extra_repr(self) -> str:
        return f"negative_slope={self.negative_slope}"


class ELU(Module):
    """x where x > 0, alpha · (eˣ − 1) elsewhere."""

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = alpha

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
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(x, self.axis)

    def extra_repr(self) -> str:
        return f"axis={self.axis}"
