"""BatchNorm folded into the layer before it, for inference."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import NamedTuple, cast

import numpy as np

from tinygrad_bn.backend import Array
from tinygrad_bn.modes import no_grad
from tinygrad_bn.nn.batch_norm import BATCH_NORMS, BatchNorm1d
from tinygrad_bn.nn.conv import Conv1d, Conv2d, Conv3d
from tinygrad_bn.nn.layers import Identity, Linear
from tinygrad_bn.nn.module import Module, Parameter
from tinygrad_bn.nn.sequential import Sequential, is_plain
from tinygrad_bn.tensor import Tensor

FOLDABLE = (Linear, Conv1d, Conv2d, Conv3d)
TOLERANCE = 1e-3  # above rounding in a deep network, below what a wrong fold makes


class Folded(NamedTuple):
    """What `fold_batch_norm` gives."""

    model: Module
    norms: int  # how many BatchNorms are gone
    difference: float  # the largest between the outputs of both models, relative to the largest output


def fold_batch_norm(model: Module, example: Array) -> Folded:
    """A copy of `model` in which every BatchNorm that follows a Linear or Conv in a Sequential is part of it.

    In evaluation mode BatchNorm is y = weight · (x − running_mean) / √(running_var + eps) + bias, which is linear, so
    that its factor and its shift go into the weight and the bias of the layer before. The copy is for inference: it
    does not normalise by batches.

    Args:
        model: in evaluation mode; it stays as it is.
        example: an input (N, ...), on which both models are compared.

    Raises:
        ValueError: the model is in training mode, a BatchNorm has no running statistics, there is none to fold, or
            the outputs differ by more than rounding.

    >>> model = Sequential(Linear(3, 4), BatchNorm1d(4)).eval()
    >>> fold_batch_norm(model, np.ones((2, 3), np.float32)).norms
    1
    """
    for name, module in model.named_modules():
        if module.training:
            raise ValueError(f"{name or 'the model'} is in training mode: call eval() on the model first")
        if isinstance(module, BATCH_NORMS) and module.running_mean is None:
            raise ValueError(f"{name or 'the model'} has track_running_stats=False: there is nothing to fold")
    with no_grad():
        folded = copy.deepcopy(model)
        norms = _fold_inside(folded)
        if not norms:
            raise ValueError("no BatchNorm follows a Linear or Conv in a Sequential of this model")
        y, z = model(Tensor(example)).numpy(), folded(Tensor(example)).numpy()
    if not y.size:
        raise ValueError(f"the example {np.shape(example)} gives no outputs that could be compared")
    if not np.isfinite(y).all():
        raise ValueError("the model's outputs on the example are not finite: they cannot be compared")
    difference = float(np.abs(y - z).max() / max(np.abs(y).max(), np.finfo(y.dtype).tiny))
    if not difference < TOLERANCE:
        raise ValueError(
            f"the folded model's output differs by {difference:.2g} of the largest: a BatchNorm normalises another "
            "axis than the layer before it makes"
        )
    return Folded(folded, norms, difference)


def _fold_inside(module: Module) -> int:
    """Fold in every Sequential within a module; how often. An Identity takes the place of the BatchNorm."""
    norms = sum(_fold_inside(child) for child in module.children())
    if isinstance(module, Sequential):
        layers = list(module)
        for i, (layer, norm) in enumerate(pairwise(layers)):
            if is_plain(layer, *FOLDABLE) and is_plain(norm, *BATCH_NORMS):
                setattr(module, str(i), _folded(cast(Linear, layer), cast(BatchNorm1d, norm)))
                setattr(module, str(i + 1), Identity())
                norms += 1
    return norms


def _folded(layer: Linear, norm: BatchNorm1d) -> Linear:
    """The layer with the BatchNorm after it, in float64; the layer itself, which may be used elsewhere, stays."""

    def wide(t: Tensor | None, default: float) -> Array:
        return np.full(norm.num_features, default) if t is None else t.numpy().astype(np.float64)

    factor = wide(norm.weight, 1) / np.sqrt(wide(norm.running_var, 1) + norm.eps)
    shift = wide(norm.bias, 0) + (wide(layer.bias, 0) - wide(norm.running_mean, 0)) * factor
    weight = layer.weight.numpy()
    layer = copy.copy(layer)
    layer.weight = Parameter((weight * factor.reshape(-1, *(1,) * (weight.ndim - 1))).astype(weight.dtype))
    layer.bias = Parameter(shift.astype(weight.dtype))
    return layer
