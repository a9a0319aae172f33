"""`lint`: what is wrong, or useless, in a model, each with the cure."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygrad_bn.arguments import expect_array, expect_flags
from tinygrad_bn.diagnose import measured, structure
from tinygrad_bn.diagnose.findings import Finding, Findings
from tinygrad_bn.nn.module import Module
from tinygrad_bn.optim import Optimizer


def lint(model: Module, x: Any = None, optimizer: Optimizer | None = None, *, show: bool = True) -> Findings:
    """Look for what is wrong or useless in a model, print it as a table, and return it.

    Without data it looks at the options of the layers, and at their order where a Sequential fixes it: a bias before
    BatchNorm, Dropout before BatchNorm, a momentum that looks like Keras', an eps too small for float16, BatchNorm or
    Softmax as the last layer. What a loss is given cannot be seen.

    With a batch it also follows the data through any model, so the order of the layers counts in any module. It runs
    one forward pass in evaluation mode and one with the statistics of the batch; the model does not change. It looks
    for BatchNorms with one or two values per channel, constant channels, a mean so large that digits are lost, a
    variance below eps, and running statistics that do not fit the batch; for layers with most units dead or saturated.
    A unit counts as dead if it is 0 for the whole batch, so give one of a hundred samples or more.

    With an optimizer it also names weights that decay although BatchNorm undoes their scale.

    Args:
        model: any module.
        x: samples as in training (N, ...): an array or a tensor.
        optimizer: the one that trains the model.
        show: print the table.

    Raises:
        TypeError: `model` is not a module, `optimizer` no optimizer, or `x` no array.
        ValueError: `x` has no samples.

    >>> from tinygrad_bn import nn
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    >>> [(found.kind, found.where) for found in lint(model, show=False)]
    [('useless-bias', '0 (Linear)')]
    """
    if not isinstance(model, Module):
        raise TypeError(f"model has to be a module; got a {type(model).__name__}")
    if not (optimizer is None or isinstance(optimizer, Optimizer)):
        raise TypeError(f"optimizer has to be an Optimizer, such as optim.Adam(model.parameters()); got {optimizer!r}")
    expect_flags(show=show)
    found: list[Finding] = []
    pairs = structure.normalised(model)
    if x is not None:
        expect_array(x, "lint")
        if not x.ndim or not len(x):
            raise ValueError(f"lint needs a batch of samples (N, ...); got shape {x.shape}")
        traced, output = measured.trace(model, x, by_batch=False)
        found += measured.too_few(traced)
        found += measured.order(traced)
        pairs += [pair for pair in traced.pairs() if pair not in pairs]
        if (last := traced.maker(output._data)) is not None:
            found += structure.ending(last)
        if not any(measured.values_of_a_channel(call) == 1 for _, call in traced.norms()):
            traced, output = measured.trace(model, x, by_batch=True)
            found += measured.of_statistics(measured.statistics(traced))
            found += measured.of_activations(traced, output._data)
    pairs = [(layer, norm) for layer, norm in pairs if not getattr(norm[1], "stats_frozen", False)]
    found += structure.useless_biases(pairs)
    found += structure.options(model, half=x is not None and x.dtype == np.float16)
    found += structure.order(model)
    if optimizer is not None:
        found += structure.decayed_scales(pairs, optimizer)
    places = [structure.label(named) for named in model.named_modules()]
    found.sort(key=lambda finding: places.index(finding.where) if finding.where in places else 0)
    findings = Findings(dict.fromkeys(found))  # each once, though a layer be called twice
    if show:
        from rich.console import Console

        Console().print(findings)
    return findings
