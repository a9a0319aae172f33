"""The table of kernels: which loop computes an op, or its vector-Jacobian product, on which device.

A kernel takes arrays and gives arrays; it knows no Tensor. Its name is the op's name (the forward) or the op's
name with ``.vjp`` (the backward: ``(g, y, *operands, needs=…, **params)`` to one gradient for each operand, or None for
one that `needs` says nobody wants).
An op without a kernel, or whose kernel gives NotImplemented for these arguments, runs its NumPy reference. Kernels
called ``optim.…`` and ``nn.…`` update the state of optimisers and layers; ``array.…`` are operators of device arrays.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import Any, TypeVar

Kernel = Callable[..., Any]
F = TypeVar("F", bound=Kernel)


def _table(device: str, modules: dict[str, str]) -> dict[tuple[str, str], str]:
    """Which module of `device` has the kernel of a name."""
    return {
        (name, device): f"tinygrad_bn_kernels.{device}.{module}"
        for module, kernels in modules.items()
        for name in kernels.split()
    }


# Where the package's own kernels are written. A module is imported when one of its kernels is first asked for,
# so that a program which needs none never pays for importing Numba.
MODULES = _table(
    "cpu",
    {
        "reduce": "sum sum_to mean_fused mean_fused.vjp mean_and_var_fused var_fused sum_of_squares max min argmax "
        "argmin optim.sum_of_squares",
        "norm": "batch_norm_fused batch_norm_fused.vjp batch_norm_relu_fused batch_norm_relu_fused.vjp "
        "batch_norm_inference nn.running_statistics",
        "blocks": "block_norm_fused block_norm_fused.vjp",
        "softmax": "softmax_cross_entropy softmax_cross_entropy.vjp logsumexp_fused",
        "elementwise": "relu.vjp erf dropout_by_key",
        "conv": "conv conv_input conv_weight conv_fused conv_fused.vjp",
        "pool": "max_pool_fused max_pool_fused.vjp",
        "linear": "matmul linear linear.vjp",
        "optim": "optim.sgd optim.adam",
    },
)

# On cuda every primitive has one, as NumPy cannot run there; a fused op without one runs its composition.
CUDA_MODULES = _table(
    "cuda",
    {
        "maps": "add sub mul div neg pow exp expm1 log sqrt rsqrt tanh sigmoid softplus erf relu relu.vjp abs sign "
        "clip maximum minimum where astype array.fill array.equal array.not_equal array.less array.less_equal",
        "layout": "reshape transpose broadcast_to getitem scatter_add concatenate stack pad",
        "reduce": "sum sum_to max min argmax argmin sum_of_squares optim.sum_of_squares",
        "linear": "matmul matmul.vjp linear linear.vjp",
        "norm": "batch_norm_fused batch_norm_fused.vjp batch_norm_relu_fused batch_norm_relu_fused.vjp "
        "batch_norm_inference nn.running_statistics",
        "blocks": "block_norm_fused block_norm_fused.vjp",
        "softmax": "softmax_cross_entropy softmax_cross_entropy.vjp",
        "dropout": "dropout_by_key",
        "conv": "conv conv_input conv_weight conv_fused conv_fused.vjp",
        "pool": "max_pool_fused max_pool_fused.vjp nn.max_pool_places",
        "optim": "optim.sgd optim.adam",
    },
)

_kernels: dict[tuple[str, str], Kernel] = {}
_enabled: ContextVar[bool] = ContextVar("enabled", default=True)


def kernel(name: str, device: str) -> Callable[[F], F]:
    """Register the decorated function as the kernel `name` ("mul", "mul.vjp") of `device`.

    Raises ValueError if that place is taken.
    """

    def register(function: F) -> F:
        place = name, device
        holder = _kernels[place].__module__ if place in _kernels else _module(place) or function.__module__
        if holder != function.__module__:  # a module that is run again, after an interrupted import, may
            raise ValueError(f"{name!r} has a kernel for {device!r} already")
        _kernels[place] = function
        return function

    return register


def _module(place: tuple[str, str]) -> str | None:
    return MODULES.get(place) or CUDA_MODULES.get(place)


def lookup(name: str, device: str) -> Kernel | None:
    """The kernel `name` of `device`, or None where there is none (or kernels are `disabled`)."""
    if not _enabled.get() and device == "cpu":
        return None
    found = _kernels.get((name, device))
    if found is None and (module := _module((name, device))):
        import_module(module)
        found = _kernels[name, device]
    return found


def names() -> list[tuple[str, str]]:
    """Every (name, device) that has a kernel, the package's own and registered ones."""
    return sorted(MODULES.keys() | CUDA_MODULES.keys() | _kernels.keys())


@contextmanager
def disabled() -> Iterator[None]:
    """In this block and thread every op runs its NumPy reference, and a fused op its composition backwards.

    On the CPU, that is: elsewhere NumPy cannot run.
    """
    token = _enabled.set(False)
    try:
        yield
    finally:
        _enabled.reset(token)
