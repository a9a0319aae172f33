"""Sequential, and its pass that computes BatchNorm and the ReLU after it together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, overload

from tinygrad_bn import functional as F
from tinygrad_bn.arguments import expect_integer, full_name
from tinygrad_bn.gradient_hooks import HOOKS
from tinygrad_bn.nn.batch_norm import BATCH_NORMS
from tinygrad_bn.nn.layers import ReLU
from tinygrad_bn.nn.module import Module, being_observed
from tinygrad_bn.tensor import Tensor


class Sequential(Module):
    """Apply layers in order. Their names are "0", "1", …, as in PyTorch's state dict.

    A BatchNorm and the ReLU after it are computed in one pass over memory, unless their outputs are observed.
    """

    def __init__(self, *layers: Module) -> None:
        for i, layer in enumerate(layers):
            if not isinstance(layer, Module):
                cure = "; unpack it with *" if isinstance(layer, Iterable) and not isinstance(layer, str) else ""
                got = full_name(layer)
                if isinstance(layer, type):
                    got, cure = f"the class {layer.__name__}", f"; make an object of it: {layer.__name__}(…)"
                raise TypeError(f"Sequential takes modules; layer {i} is {got}, not a module{cure}")
            setattr(self, str(i), layer)

    def forward(self, x: Tensor) -> Tensor:
        layers = [child for child in vars(self).values() if isinstance(child, Module)]
        for layer in layers if being_observed() else fused_layers(layers):
            x = layer(x)
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
        if isinstance(index, slice):
            return Sequential(*layers[index])
        position = expect_integer("the index of a layer", index)
        if not -len(layers) <= position < len(layers):
            raise IndexError(f"there is no layer {position}; this Sequential has {len(layers)} layers, counted from 0")
        return layers[position]


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
