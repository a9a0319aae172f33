"""Compare a function of ours with PyTorch's on the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from tinygrad_bn import Tensor, grad

torch = pytest.importorskip("torch")

TOLERANCE = {"float64": 1e-9, "float32": 1e-5}


def peer(a: Any) -> Any:
    """The numbers as PyTorch's tensor.

    Floats become float64, whatever our dtype: so a float32 test measures our rounding, not PyTorch's as well.
    """
    if a is None:
        return None
    a = np.asarray(a)
    return torch.tensor(a, dtype=torch.float64 if a.dtype.kind == "f" else None)


def close(got: Any, want: Any, tolerance: float, what: str = "") -> None:
    """Shape and values of `got` (ours) are those of `want` (PyTorch's)."""
    got, want = np.asarray(got), want.detach().numpy()
    assert got.shape == want.shape, f"{what}: {got.shape}, PyTorch {want.shape}"
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance, err_msg=what)


def check(ours: Callable[..., Any], theirs: Callable[..., Any], operands: Sequence[Any], tolerance: float) -> None:
    """Values, and every operand's gradient under a random cotangent, on both of our routes back.

    An operand None is passed on as it is.
    """
    xs = [None if a is None else Tensor(a, requires_grad=True) for a in operands]
    ts = [None if a is None else peer(a).requires_grad_() for a in operands]
    y, z = ours(*xs), theirs(*ts)
    inputs, peers = [x for x in xs if x is not None], [t for t in ts if t is not None]
    assert y.dtype == np.result_type(*inputs)
    close(y, z, tolerance, "value")
    g = np.random.default_rng(0).normal(size=y.shape).astype(y.dtype)
    want = torch.autograd.grad(z, peers, peer(g), materialize_grads=True)
    for create_graph in (False, True):
        for i, (x, got, w) in enumerate(zip(inputs, grad(y, inputs, g, create_graph=create_graph), want, strict=True)):
            assert got.dtype == x.dtype
            close(got, w, tolerance, f"gradient of operand {i}, create_graph={create_graph}")
