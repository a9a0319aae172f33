"""What can be known about a model without data: the options of its layers, and their order where that is fixed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from tinygrad_bn import nn
from tinygrad_bn.diagnose.findings import Finding
from tinygrad_bn.nn.batch_norm import BATCH_NORMS
from tinygrad_bn.nn.module import Module
from tinygrad_bn.nn.sequential import Sequential, is_plain
from tinygrad_bn.optim import Optimizer

WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
HALF = float(np.finfo(np.float16).max)

Named = tuple[str, Module]
Pair = tuple[Named, Named]  # a layer with weights, and the BatchNorm that gets its output


def label(named: Named) -> str:
    """A module in words: its path and type."""
    name, module = named
    return f"{name} ({type(module).__name__})" if name else type(module).__name__


def chains(model: Module) -> list[list[Named]]:
    """Layers that follow each other directly, in one Sequential or in nested ones."""
    done: list[list[Named]] = [[]]

    def visit(name: str, module: Module, chained: bool) -> None:
        children = [(f"{name}.{child}" if name else child, m) for child, m in module.named_children()]
        if not children and chained:
            done[-1].append((name, module))
            return
        in_order = is_plain(module, Sequential)
        if not (in_order and chained):
            done.append([])
        for child in children:
            visit(*child, in_order)
            if not in_order:
                done.append([])
        if not (in_order and chained):
            done.append([])

    visit("", model, False)
    return [chain for chain in done if chain]


def normalised(model: Module) -> list[Pair]:
    """Each layer with weights that has a BatchNorm directly after it, with that."""
    pairs = [pair for chain in chains(model) for pair in pairwise(chain)]
    return [(a, b) for a, b in pairs if isinstance(a[1], WEIGHTED) and isinstance(b[1], BATCH_NORMS)]


def useless_biases(pairs: list[Pair]) -> Iterator[Finding]:
    """Biases that the next BatchNorm subtracts again."""
    for layer, _ in pairs:
        bias = getattr(layer[1], "bias", None)
        if bias is not None and bias.requires_grad:
            yield Finding(
                "useless-bias", label(layer),
                "the BatchNorm after it subtracts the mean, and this bias with it: its gradient is 0 but for rounding",
                "bias=False; the bias of BatchNorm does the work. It costs memory and a little time, nothing else",
            )  # fmt: skip


def decayed_scales(pairs: list[Pair], optimizer: Optimizer) -> Iterator[Finding]:
    """Weights that decay although a BatchNorm after them undoes their scale."""
    decay = {p: g.get("weight_decay", 0) for g in optimizer.param_groups for p in g["params"]}
    for layer, _ in pairs:
        if rate := decay.get(getattr(layer[1], "weight", None), 0):
            yield Finding(
                "decayed-scale", label(layer),
                f"the BatchNorm after it undoes the scale of this weight, so a decay of {rate:g} does "
                "not make the function simpler: it keeps the weight small, and that its effective learning rate, "
                "lr / ‖w‖², large",
                "read it as a part of the learning rate; to regularise, let the last layer decay, or augment the data",
            )  # fmt: skip


def options(model: Module, half: bool) -> Iterator[Finding]:
    """Options of single layers that are unlikely to be meant. `half`: the activations are float16."""
    half = half or any(p.dtype == np.float16 for p in model.parameters())
    for name, module in model.named_modules():
        where = label((name, module))
        if isinstance(module, BATCH_NORMS):
            momentum = module.momentum if module.track_running_stats and module.running_var_correction else None
            if momentum is not None and 0.5 < momentum < 1:
                yield Finding(
                    "momentum", where,
                    f"momentum={momentum:g} is the weight of the new batch here; Keras' is that of the old value",
                    f"momentum={1 - momentum:.3g}, or {type(module).__name__}.keras(…), which takes {momentum:g}",
                )  # fmt: skip
        eps = getattr(module, "eps", None)
        if half and isinstance(eps, float) and 0 < eps < 1 / HALF**2:
            yield Finding(
                "eps", where,
                f"where the input is nearly constant, the gradient is multiplied by up to 1/√eps = "
                f"{1 / math.sqrt(eps):.0e}; float16 ends at {HALF:.0f}",
                "eps=1e-5",
            )  # fmt: skip


def dropout_before(dropout: Named, norm: Named) -> Finding:
    """A Dropout on the way to a BatchNorm."""
    return Finding(
        "dropout", label(dropout),
        f"in training it makes the variance of what {label(norm)} gets larger; in evaluation the running variance is "
        "then too large (Li et al. 2019)",
        "Dropout after the last BatchNorm, or none",
    )  # fmt: skip


def order(model: Module) -> Iterator[Finding]:
    """Layers in an order that is unlikely to be meant."""
    for chain in chains(model):
        dropout: Named | None = None
        for layer in chain:
            if isinstance(layer[1], nn.Dropout) and layer[1].p:
                dropout = layer
            elif isinstance(layer[1], BATCH_NORMS) and dropout is not None:
                yield dropout_before(dropout, layer)
                dropout = None
    name, last = "", model
    while is_plain(last, Sequential) and len(children := list(last.named_children())):
        name, last = f"{name}.{children[-1][0]}".lstrip("."), children[-1][1]
    yield from ending((name, last))


def ending(last: Named) -> Iterator[Finding]:
    """A last layer that fits no loss; for a part of a larger model this says nothing."""
    if isinstance(last[1], BATCH_NORMS):
        yield Finding(
            "last-norm", label(last),
            "it is the last layer: the outputs of a sample depend on the others in its batch, and their mean and "
            "deviation are the same for every batch",
            "end with a layer with weights",
        )  # fmt: skip
    if isinstance(last[1], nn.Softmax):
        yield Finding(
            "last-softmax", label(last),
            "it is the last layer; cross_entropy takes logits and applies a softmax itself, so two would flatten the "
            "gradient",
            "leave it out in training with cross_entropy; apply functional.softmax to read probabilities",
        )  # fmt: skip
