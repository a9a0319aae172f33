"""Sequential, and its pass that computes BatchNorm and the ReLU after it together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from tinygrad_bn import functional as F
from tinygrad_bn.gradient_hooks import HOOKS
from tinygrad_bn.nn.activations import ReLU
from tinygrad_bn.nn.batch_norm import BATCH_NORMS
from tinygrad_bn.nn.containers import Numbered
from tinygrad_bn.nn.module import Module, being_observed
from tinygrad_bn.tensor import Tensor


class Sequential(Numbered):
    """Apply layers in order. Their names are "0", "1", …, as in PyTorch's state dict.

    A BatchNorm and the ReLU after it are computed in one pass over memory, unless their outputs are observed, or they
    have hooks.
    """

    def __init__(self, *layers: Module) -> None:
        self.extend(layers)

    def forward(self, x: Tensor) -> Tensor:
        layers = [child for child in vars(self).values() if isinstance(child, Module)]
        for layer in layers if being_observed() else fused_layers(layers):
            x = layer(x)
        return x


def fused_layers(layers: Iterable[Module]) -> Iterator[Module]:
    """The same layers, but a `BatchNormReLU` for each BatchNorm with a ReLU after it."""
    norm: Module | None = None
    for layer in layers:
        if norm is not None and is_plain(layer, ReLU):
            yield BatchNormReLU(norm)
            norm = None
            continue
        if norm is not None:
            yield norm
        norm = layer if is_plain(layer, *BATCH_NORMS) else None
        if norm is None:
            yield layer
    if norm is not None:
        yield norm


class BatchNormReLU(Module):
    """The ReLU of a BatchNorm layer's output, computed together. The state is that layer's: there is no copy."""

    def __init__(self, norm: Any) -> None:
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        if norm.virtual_batch_size or not norm.uses_batch(x):
            return norm.forward(x).relu()
        y, (mean, var) = F.batch_norm_relu.run(x, norm.weight, norm.bias, eps=norm.eps)
        norm.track(mean, var, x.size // norm.num_features)
        return y


def is_plain(layer: Module, *types: type) -> bool:
    """Whether `layer` is exactly of one of these types, with its `forward`, and without hooks."""
    return type(layer) in types and "forward" not in vars(layer) and id(layer) not in HOOKS
