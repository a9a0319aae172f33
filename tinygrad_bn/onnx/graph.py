"""`load`: a module that computes the graph of an ONNX file."""

from __future__ import annotations

import inspect
import os
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from tinygrad_bn.arguments import shown
from tinygrad_bn.nn.batch_norm import _BatchNorm
from tinygrad_bn.nn.module import Module, Parameter
from tinygrad_bn.onnx.errors import OnnxError
from tinygrad_bn.onnx.operators import FROM_GRAPH, OPERATORS, expect_computable
from tinygrad_bn.onnx.reading import Model, Node, read
from tinygrad_bn.tensor import Array, Tensor

STATISTICS = ("weight", "bias", "running_mean", "running_var")  # of BatchNormalization, its inputs 1 to 4


def load(path: str | os.PathLike[str]) -> Graph:
    """The module of an ONNX file, in evaluation mode. It can be trained further: see `Graph`.

    Raises:
        OnnxError: the file is no ONNX model, is damaged, or uses what this package does not compute.
        OSError: it cannot be read.
        ImportError: the package `onnx` is not installed.

    Nothing of the file is executed but the operators of this package, and its data have to lie in it.
    """
    path = Path(path)
    model = read(path)
    try:
        return Graph(model)
    except OnnxError as error:
        raise OnnxError(f"{path}: {error}") from error


class BatchNorm(_BatchNorm):
    """BatchNorm of an ONNX file, over any number of axes."""

    _shapes: ClassVar = {2: "(N, C)", 3: "(N, C, ...)", **dict.fromkeys(range(4, 9), "(N, C, ...)")}


class Graph(Module):
    """An ONNX graph as a module: `graph(*inputs)` computes its outputs, a tensor or a tuple of them.

    Floating-point initializers with axes are parameters, by their names, with "." for "/". A BatchNormalization whose
    scale, bias, mean and variance are initializers is a module with parameters and buffers: in training mode it takes
    the statistics of the batch, and moves the running ones by ONNX' convention. `requires_grad_(False)`, and `freeze()`
    of its layers, freeze a graph or parts of it. All other initializers are constants.

    A graph is in evaluation mode at first, but for a BatchNormalization with training_mode=1, as the file asks for it.
    A Dropout whose training_mode is true in the file drops in every mode.
    """

    def __init__(self, model: Model) -> None:
        self.inputs, self.outputs, self.opset = model.inputs, model.outputs, model.opset
        self._nodes, self._constants = _without_aliases(model)
        for node in self._nodes:
            _check(node)
        self._given = [_given_by_graph(node) for node in self._nodes]
        self._norms: dict[int, str] = {}  # the attribute of a BatchNorm, by the position of its node
        self._weights: dict[str, str] = {}  # the attribute of a parameter, by its name in the file
        self._last = {name: i for i, node in enumerate(self._nodes) for name in node.inputs}
        taken: set[str] = set()  # keys of the state, and what stands before their dots
        uses = Counter((*(name for node in self._nodes for name in node.inputs), *model.outputs))
        layers: dict[tuple[str, ...], str] = {}
        for i, node in enumerate(self._nodes):
            if _is_layer(node, self._constants, uses):
                vectors = node.inputs[1:]
                if vectors not in layers:  # else it is called again
                    layer = _batch_norm(node, [self._constants[name] for name in vectors])
                    layers[vectors] = self._keep(_name_of(node, i), layer, taken)
                self._norms[i] = layers[vectors]
        uses -= Counter(name for i in self._norms for name in self._nodes[i].inputs[1:])
        statistics = {n for node in self._nodes if node.operator == "BatchNormalization" for n in node.inputs[3:]}
        for name, array in list(self._constants.items()):
            if not uses[name]:
                del self._constants[name]
            elif array.dtype.kind == "f" and array.ndim and name not in statistics:
                self._weights[name] = self._keep(name, Parameter(self._constants.pop(name)), taken)
        self.eval()
        for i, name in self._norms.items():
            getattr(self, name).train(bool(self._nodes[i].attributes.get("training_mode", 0)))

    def _keep(self, name: str, part: Parameter | Module, taken: set[str]) -> str:
        """The name of an attribute that holds `part`: this name, or one like it that is free."""
        name = name.replace("/", ".")
        name = f"w{name}" if name.startswith("__") else name
        while hasattr(self, name) or name in taken:
            name += "_"
        setattr(self, name, part)
        keys = [name] if isinstance(part, Parameter) else [f"{name}.{key}" for key, _ in part.named_tensors()]
        taken.update(key[:i] for key in keys for i in range(1, len(key)) if key[i] == ".")
        taken.update(keys)
        return name

    def forward(self, *inputs: Tensor) -> Any:
        """The outputs for the inputs in the order of `self.inputs`."""
        if len(inputs) != len(self.inputs):
            names = ", ".join(map(shown, self.inputs))
            raise ValueError(f"the graph takes {len(self.inputs)} inputs, {names}; got {len(inputs)}")
        values: dict[str, Any] = self._constants | {n: getattr(self, a) for n, a in self._weights.items()}
        values |= zip(self.inputs, inputs, strict=True)
        for i, node in enumerate(self._nodes):
            read = node.inputs[:1] if i in self._norms else node.inputs
            results = self._computed(i, node, [values[name] if name else None for name in read])
            for name, result in zip(node.outputs, results, strict=False):
                values[name] = result
            for name in node.inputs:
                if self._last.get(name) == i and name not in self.outputs:
                    values.pop(name, None)  # frees memory, if no gradient needs it
        found = [v if isinstance(v := values[name], Tensor) else Tensor(v) for name in self.outputs]
        return found[0] if len(found) == 1 else tuple(found)

    def _computed(self, i: int, node: Node, operands: list[Any]) -> tuple[Any, ...]:
        if i in self._norms:
            return (getattr(self, self._norms[i])(operands[0]),)
        given = {"opset": self.opset, "outputs": len(node.outputs), "training": self.training}
        options = node.attributes | {name: given[name] for name in self._given[i]}
        try:
            result = OPERATORS[node.operator](*operands, **options)
        except Exception as error:
            error.add_note(f"in the node {node} of an ONNX graph")
            raise
        results = result if isinstance(result, tuple) else (result,)
        if missing := [n for n in node.outputs[len(results) :] if n in self._last or n in self.outputs]:
            raise OnnxError(f"the output {shown(missing[0])} of the node {node} is not computed")
        return results

    def extra_repr(self) -> str:
        counts = Counter(node.operator for node in self._nodes).most_common()
        ends = " -> ".join(", ".join(map(shown, names)) for names in (self.inputs, self.outputs))
        return f"{ends}: {', '.join(f'{count} {name}' for name, count in counts)}"


def _without_aliases(model: Model) -> tuple[list[Node], dict[str, Array]]:
    """The nodes and the arrays, without nodes that give an array another name, as PyTorch's exporter has them."""
    arrays, nodes = dict(model.arrays), []
    for node in model.nodes:
        if (
            node.operator == "Identity"
            and len(node.inputs) == 1
            and node.inputs[0] in arrays
            and len(node.outputs) == 1
        ):
            arrays[node.outputs[0]] = arrays[node.inputs[0]].copy()
        else:
            nodes.append(node)
    return nodes, arrays


def _check(node: Node) -> None:
    try:
        expect_computable(node)
    except OnnxError as error:
        raise OnnxError(f"{error} (node {node})" if node.name else str(error)) from error


def _given_by_graph(node: Node) -> set[str]:
    """The arguments of a node's function that are no attributes."""
    return inspect.signature(OPERATORS[node.operator]).parameters.keys() & FROM_GRAPH


def _is_layer(node: Node, arrays: dict[str, Array], uses: Counter[str]) -> bool:
    """Whether a node is a BatchNormalization of four vectors in the file, whose first output alone is read."""
    plain = node.operator == "BatchNormalization" and node.attributes.get("spatial", 1)
    own = all(name in arrays for name in node.inputs[1:])
    return bool(plain and own and not any(uses[name] for name in node.outputs[1:]))


def _name_of(node: Node, i: int) -> str:
    """The attribute of a BatchNorm: what the names of its initializers have in common, as in PyTorch's files."""
    prefixes = {name.rpartition(".")[0] for name in node.inputs[1:]}
    prefix = prefixes.pop() if len(prefixes) == 1 else ""
    return prefix or f"batch_norm_{i}"


def _batch_norm(node: Node, arrays: list[Array]) -> BatchNorm:
    channels = arrays[0].shape
    if len(channels) != 1 or any(a.shape != channels or a.dtype.kind != "f" for a in arrays) or not channels[0]:
        raise OnnxError(f"{node} has vectors of the shapes {', '.join(str(a.shape) for a in arrays)}")
    options, (weight, *_) = node.attributes, arrays
    try:
        layer = BatchNorm.onnx(channels[0], options.get("epsilon", 1e-5), options.get("momentum", 0.9))
        if weight.dtype != np.float32:
            layer.astype(weight.dtype)
        layer.load_state_dict(dict(zip(STATISTICS, arrays, strict=True)) | {"num_batches_tracked": np.int64(0)})
    except (ValueError, TypeError) as error:  # of options and numbers that make no sense
        raise OnnxError(f"{node}: {error}") from error
    return layer
