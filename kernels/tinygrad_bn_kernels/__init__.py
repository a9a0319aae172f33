"""The table of kernels: which loop computes an op, or its vector-Jacobian product, on which device.

A kernel takes arrays and gives arrays; it knows no Tensor. Its name is the op's name (the forward) or the op's
name with ``.vjp`` (the backward: ``(g, y, *operands, needs=…, **params)`` to one gradient for each operand, or None for
one that `needs` says nobody wants).
An op without a kernel, or whose kernel gives NotImplemented for these arguments, runs its NumPy reference. Kernels
called ``optim.…`` and ``nn.…`` update the state of optimisers and layers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import Any, TypeVar

Kernel = Callable[..., Any]
F = TypeVar("F", bound=Kernel)

# Where the package's own kernels are written. A module is imported when one of its kernels is first asked for,
# so that a program which needs none never pays for importing Numba.
MODULES: dict[tuple[str, str], str] = {
    (name, "cpu"): f"tinygrad_bn_kernels.cpu.{module}"
    for module, kernels in {
        "reduce": "sum sum_to mean_fused mean_fused.vjp mean_and_var_fused var_fused sum_of_squares max min argmax "
        "argmin optim.sum_of_squares",
        "norm": "batch_norm_fused batch_norm_fused.vjp batch_norm_relu_fused batch_norm_relu_fused.vjp "
        "batch_norm_inference nn.running_statistics",
        "blocks": "block_norm_fused block_norm_fused.vjp",
        "softmax": "softmax_cross_entropy softmax_cross_entropy.vjp logsumexp_fused",
        "elementwise": "relu.vjp erf dropout_by_key",
        "conv": "conv conv_input conv_weight conv_fused conv_fused.vjp",
        "pool": "max_pool_fused max_pool_fused.vjp",
        "linear": "linear.vjp",
        "optim": "optim.sgd optim.adam",
    }.items()
    for name in kernels.split()
}

_kernels: dict[tuple[str, str], Kernel] = {}
_enabled: ContextVar[bool] = ContextVar("enabled", default=True)


def kernel(name: str, device: str) -> Callable[[F], F]:
    """Register the decorated function as the kernel `name` ("mul", "mul.vjp") of `device`.

    Raises ValueError if that place is taken.
    """

    def register(function: F) -> F:
        place = name, device
        holder = _kernels[place].__module__ if place in _kernels else MODULES.get(place, function.__module__)
        if holder != function.__module__:  # a module that is run again, after an interrupted import, may
            raise ValueError(f"{name!r} has a kernel for {device!r} already")
        _kernels[place] = function
        return function

    return register


def lookup(name: str, device: str) -> Kernel | None:
    """The kernel `name` of `device`, or None where there is none (or kernels are `disabled`)."""
    if not _enabled.get():
        return None
    found = _kernels.get((name, device))
    if found is None and (name, device) in MODULES:
        import_module(MODULES[name, device])
        found = _kernels[name, device]
    return found


def names() -> list[tuple[str, str]]:
    """Every (name, device) that has a kernel, the package's own and registered ones."""
    return sorted(MODULES.keys() | _kernels.keys())


@contextmanager
def disabled() -> Iterator[None]:
    """In this block and thread every op runs its NumPy reference, and a fused op its composition backwards."""
    token = _enabled.set(False)
    try:
        yield
    finally:
        _enabled.reset(token)
