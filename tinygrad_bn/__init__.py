"""Autograd from scratch in which BatchNorm is a composition of primitive operations.

>>> from tinygrad_bn import Tensor, functional as F
>>> x = Tensor([[1.0], [2.0], [6.0]], requires_grad=True)
>>> F.batch_norm(x, training=True).numpy().round(4)
array([[-0.9258],
       [-0.4629],
       [ 1.3887]], dtype=float32)
"""

from typing import Any

from tinygrad_bn import cuda, datasets, diagnose, functional, nn, optim, testing, train
from tinygrad_bn.autograd import grad
from tinygrad_bn.backend import empty_cache
from tinygrad_bn.captured import capture
from tinygrad_bn.modes import composed, debug, is_recording, no_grad
from tinygrad_bn.random import manual_seed
from tinygrad_bn.tensor import Tensor, fused, held_constant, primitive

__all__ = [
    "Tensor", "capture", "composed", "cuda", "datasets", "debug", "diagnose", "empty_cache", "functional", "fused",
    "grad", "held_constant", "is_recording", "manual_seed", "nn", "no_grad", "optim", "primitive", "testing", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """`__version__`, from the installed package's metadata; read on demand, as that takes longer than the import."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import version

    return version("tinygrad-bn")
