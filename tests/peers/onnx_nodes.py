"""The node tests of the package `onnx`: which ones `tinygrad_bn.onnx` computes. `python -m tests.peers.onnx_nodes`

Each is a model of mostly one operator with inputs and outputs, at the tolerances of its authors.
"""

import warnings
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import onnx
from onnx.backend.test.loader import load_model_tests

from tinygrad_bn import Tensor
from tinygrad_bn.onnx import Graph, OnnxError
from tinygrad_bn.onnx.reading import DTYPES, array_of_proto, checked

# Cases that are computed otherwise, and why.
DIFFERENT = {
    "test_attention_4d_causal_fp16_expanded": "two of 192 numbers differ by one unit of float16",
    "test_training_dropout": "the random numbers of NumPy's old generator",
    "test_training_dropout_default": "the random numbers of NumPy's old generator",
    "test_training_dropout_default_mask": "the random numbers of NumPy's old generator",
    "test_training_dropout_mask": "the random numbers of NumPy's old generator",
}


@cache
def cases() -> dict[str, Any]:
    """All cases by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of making their numbers
        return {case.name: case for case in load_model_tests(kind="node")}


def plain(case: Any) -> bool:
    """Whether inputs and outputs are arrays of real numbers that NumPy has."""
    values = [array(v) for inputs_and_outputs in case.data_sets for vs in inputs_and_outputs for v in vs]
    return all(v is not None and v.dtype.char in "?bBhHiIlLqQefd" for v in values)


def array(value: Any) -> np.ndarray | None:
    """An input or output of a case as an array; None if it is none, or of a type that is not read."""
    if isinstance(value, onnx.TensorProto):
        return array_of_proto(value) if value.data_type in DTYPES else None
    return np.asarray(value) if isinstance(value, np.ndarray | np.generic) else None


def refusal(name: str) -> str:
    """Why a case is not computed; "" if it is."""
    case = cases()[name]
    try:
        Graph(checked(case.model))
    except OnnxError as error:
        return str(error)
    return "" if plain(case) else "texts, sequences, optional values, or numbers that NumPy does not have"


def results(name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of what is computed and what it should be."""
    case = cases()[name]
    graph = Graph(checked(case.model))
    for inputs, outputs in case.data_sets:
        found = graph(*(Tensor(array(x)) for x in inputs))
        found = found if isinstance(found, tuple) else (found,)
        yield from zip([y.numpy() for y in found], map(array, outputs), strict=True)


def compare(name: str) -> None:
    """Raise AssertionError unless the case comes out right, shape, dtype and numbers."""
    case = cases()[name]
    for got, want in results(name):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        np.testing.assert_allclose(got, want, rtol=case.rtol, atol=case.atol)


def main() -> None:
    right, reasons = 0, defaultdict(list)
    for name in cases():
        reason = DIFFERENT.get(name) or refusal(name)
        if reason:
            reasons[reason].append(name.removeprefix("test_"))
        else:
            compare(name)
            right += 1
    for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1])):
        print(f"{len(names)} × {reason}: {', '.join(names)}")
    print(f"{right} of {len(cases())} node tests of onnx are computed, and right")


if __name__ == "__main__":
    main()
