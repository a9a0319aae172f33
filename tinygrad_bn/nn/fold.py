"""Fold BatchNorm into the layer before it, for inference."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import NamedTuple, cast

import numpy as np

from tinygrad_bn.arguments import full_name
from tinygrad_bn.backend import Array
from tinygrad_bn.modes import no_grad
from tinygrad_bn.nn.batch_norm import BATCH_NORMS, BatchNorm1d
from tinygrad_bn.nn.conv import Conv1d, Conv2d, Conv3d
from tinygrad_bn.nn.layers import Identity, Linear
from tinygrad_bn.nn.module import Module, Parameter
from tinygrad_bn.nn.sequential import Sequential, is_plain
from tinygrad_bn.tensor import Tensor

FOLDABLE = (Linear, Conv1d, Conv2d, Conv3d)
TOLERANCE = 1e-3  # above rounding in deep networks, below the error of a wrong fold


class Folded(NamedTuple):
    """The result of `fold_batch_norm`."""

    model: Module
    norms: int  # number of folded BatchNorms
    difference: float  # max |y − y_folded| / max |y| over the outputs y on the example


def fold_batch_norm(model: Module, example: Array) -> Folded:
    """Copy `model`, folding every BatchNorm into the Linear or Conv directly before it in a Sequential.

    In evaluation mode BatchNorm is affine: y = weight · (x − running_mean) / √(running_var + eps) + bias. Its scale
    and shift go into the weight and bias of the layer before. The copy is for inference only: it has no batch
    statistics.

    Args:
        model: a model in evaluation mode; it does not change.
        example: an input (N, ...) on which the outputs of both models are compared.

    Raises:
        ValueError: the model is in training mode, a BatchNorm has no running statistics, no BatchNorm can be folded,
            the outputs on the example are empty or not finite, or they differ by more than rounding.

    >>> model = Sequential(Linear(3, 4), BatchNorm1d(4)).eval()
    >>> fold_batch_norm(model, np.ones((2, 3), np.float32)).norms
    1
    """
    if not isinstance(model, Module):
        raise TypeError(f"model has to be a module; got {full_name(model)}")
    for name, module in model.named_modules():
        if module.training:
            raise ValueError(f"{name or 'the model'} is in training mode: call eval() on the model first")
        if isinstance(module, BATCH_NORMS) and module.running_mean is None:
            raise ValueError(f"{name or 'the model'} has track_running_stats=False: folding needs running statistics")
    with no_grad():
        folded = copy.deepcopy(model)
        norms = _fold_in_place(folded)
        if not norms:
            raise ValueError("no BatchNorm follows a Linear or Conv in a Sequential of this model")
        y, z = model(Tensor(example)).numpy(), folded(Tensor(example)).numpy()
    if not y.size:
        raise ValueError(f"the example {np.shape(example)} gives no outputs to compare")
    if not np.isfinite(y).all():
        raise ValueError("the model's outputs on the example are not finite: they cannot be compared")
    difference = float(np.abs(y - z).max() / max(np.abs(y).max(), np.finfo(y.dtype).tiny))
    if not difference < TOLERANCE:
        raise ValueError(
            f"the outputs of the folded model differ by {difference:.2g} of the largest output: a BatchNorm "
            "normalises another axis than the output axis of the layer before it"
        )
    return Folded(folded, norms, difference)


def _fold_in_place(module: Module) -> int:
    """Fold in every Sequential inside `module`, in place, and count. An Identity replaces each BatchNorm."""
    norms = sum(_fold_in_place(child) for child in module.children())
    if isinstance(module, Sequential):
        layers = list(module)
        for i, (layer, norm) in enumerate(pairwise(layers)):
            if is_plain(layer, *FOLDABLE) and is_plain(norm, *BATCH_NORMS):
                setattr(module, str(i), _folded(cast(Linear, layer), cast(BatchNorm1d, norm)))
                setattr(module, str(i + 1), Identity())
                norms += 1
    return norms


def _folded(layer: Linear, norm: BatchNorm1d) -> Linear:
    """A copy of `layer` with `norm` folded in, computed in float64. `layer` does not change: it may be shared."""

    def float64(t: Tensor | None, default: float) -> Array:
        return np.full(norm.num_features, default) if t is None else t.numpy().astype(np.float64)

    factor = float64(norm.weight, 1) / np.sqrt(float64(norm.running_var, 1) + norm.eps)
    shift = float64(norm.bias, 0) + (float64(layer.bias, 0) - float64(norm.running_mean, 0)) * factor
    weight = layer.weight.numpy()
    layer = copy.copy(layer)
    layer.weight = Parameter((weight * factor.reshape(-1, *(1,) * (weight.ndim - 1))).astype(weight.dtype))
    layer.bias = Parameter(shift.astype(weight.dtype))
    return layer
