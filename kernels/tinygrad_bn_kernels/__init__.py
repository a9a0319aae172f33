"""The table of kernels: functions of arrays that compute an op, or its vector-Jacobian product, on a device.

The kernel NAME computes the op NAME. The kernel NAME.vjp takes ``(g, y, *operands, needs=…, **params)`` and returns one
gradient for each operand, or None where `needs` is False. If there is no kernel, or it returns NotImplemented, the op
runs its NumPy reference. Kernels ``array.…`` are the operators of device arrays.
"""

# Imported for its lock, which imports need: at a fork, the lock that was registered last is taken first.
import logging  # noqa: F401
import os
from collections.abc import Callable
from contextvars import ContextVar
from importlib import import_module
from threading import RLock
from types import ModuleType
from typing import Any, TypeVar

Kernel = Callable[..., Any]
F = TypeVar("F", bound=Kernel)


def _table(device: str, modules: dict[str, str]) -> dict[tuple[str, str], str]:
    """The module of each kernel of `device`."""
    return {
        (name, device): f"tinygrad_bn_kernels.{device}.{module}"
        for module, kernels in modules.items()
        for name in kernels.split()
    }


# The package's own kernels. A module is imported at the first lookup of one of its kernels, so that a program without
# kernels does not import Numba.
MODULES = _table(
    "cpu",
    {
        "reduce": "sum sum_to mean mean.vjp mean_and_var var var.vjp std std.vjp sum_of_squares squared_norm max min "
        "argmax argmin",
        "norm": "batch_norm_training batch_norm_training.vjp batch_norm_relu batch_norm_relu.vjp running_statistics",
        "norm_inference": "batch_norm_inference batch_norm_inference.vjp",
        "norm_gradient": "batch_norm_gradient batch_norm_gradient.vjp batch_norm_weight_gradient "
        "batch_norm_weight_gradient.vjp",
        "blocks": "block_norm block_norm.vjp",
        "softmax": "softmax_cross_entropy softmax_cross_entropy.vjp logsumexp logsumexp.vjp",
        "elementwise": "where relu.vjp erf erfc silu silu.vjp gelu gelu.vjp sigmoid.vjp tanh.vjp dropout_by_key",
        "conv": "conv conv_input conv_weight conv_with_bias conv_with_bias.vjp",
        "pool": "max_pool max_pool.vjp max_pool_places",
        "linear": "matmul linear linear.vjp",
        "optim": "sgd adam",
    },
)

# On cuda every primitive needs a kernel, as NumPy cannot run there; a fused op without one runs its composition.
CUDA_MODULES = _table(
    "cuda",
    {
        "maps": "add sub mul div neg pow exp expm1 log log1p sqrt rsqrt tanh sech_squared sigmoid softplus erf erfc "
        "relu relu.vjp silu silu.vjp gelu gelu.vjp abs sign clip maximum minimum where astype array.fill array.equal "
        "array.not_equal array.less array.less_equal",
        "layout": "reshape transpose broadcast_to getitem scatter_add concatenate stack pad",
        "reduce": "sum sum_to max min argmax argmin sum_of_squares squared_norm",
        "linear": "matmul matmul.vjp linear linear.vjp",
        "norm": "batch_norm_training batch_norm_training.vjp batch_norm_relu batch_norm_relu.vjp "
        "batch_norm_inference running_statistics",
        "blocks": "block_norm block_norm.vjp",
        "softmax": "softmax_cross_entropy softmax_cross_entropy.vjp",
        "dropout": "dropout_by_key",
        "conv": "conv conv_input conv_weight conv_with_bias conv_with_bias.vjp",
        "pool": "max_pool max_pool.vjp max_pool_places",
        "optim": "sgd adam",
    },
)

DEVICES = "cpu", "cuda"
_kernels: dict[tuple[str, str], Kernel | None] = {}  # those that were looked up or registered; None: there is none
ENABLED: ContextVar[bool] = ContextVar("enabled", default=True)  # whether the CPU's kernels are used


# ---- imports and forks -----------------------------------------------------------------------------------


importing = RLock()  # held during an import at first use: Python's own locks of modules stay held in a forked child

# A child has no thread that would release a lock that another thread holds. So a fork waits for these locks, in this
# order. For a lock under which a thread may wait for one of them, that would be a deadlock: the child gets a new one,
# by one of the functions RENEWED_IN_CHILDREN.
HELD_AT_FORKS: list[Any] = [importing]
RENEWED_IN_CHILDREN: list[Callable[[], None]] = []
_held: list[Any] = []


def _before_fork() -> None:
    for lock in HELD_AT_FORKS:  # which grows if the import that the fork waits for adds a lock
        lock.acquire()
        _held.append(lock)


def _after_fork() -> None:
    global _held
    held, _held = _held, []
    for lock in reversed(held):
        lock.release()


def _in_child() -> None:
    for renew in RENEWED_IN_CHILDREN:
        renew()
    _after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_child)


def load(module: str) -> ModuleType:
    """A module that is imported at the first call only."""
    with importing:
        return import_module(module)


# ---- the table -------------------------------------------------------------------------------------------


_replaced: set[tuple[str, str]] = set()  # kernels that were registered again since their op was declared
_declared: dict[str, Any] = {}  # the code of the function that declares each op


def kernel(name: str, device: str) -> Callable[[F], F]:
    """Register the decorated function as the kernel `name` ("mul", "mul.vjp") of `device`.

    A module or a notebook cell that runs again replaces its kernels.

    Raises TypeError unless the name is a text, ValueError for a device that there is not, or if there is a kernel
    already, from another file.
    """
    if not isinstance(name, str):
        raise TypeError(f"the name of a kernel is a text, as 'mul' or 'mul.vjp'; got {name!r}")
    if device not in DEVICES:
        first = f": the name comes first, as in kernel({device!r}, {name!r})" if name in DEVICES else ""
        raise ValueError(f"the kernel {name!r} is for a device {device!r}; there are {' and '.join(DEVICES)}{first}")

    def register(function: F) -> F:
        key = name, device
        present = _kernels.get(key)
        owner = present.__module__ if present else _module(key) or function.__module__
        if owner != function.__module__ and not (present and _file(present) == _file(function)):
            raise ValueError(f"{name!r} has a kernel for {device!r} already, in {owner}; name your op otherwise")
        if present:
            _replaced.add(key)
        _kernels[key] = function
        return function

    return register


def _file(function: Any) -> Any:
    """The file that a kernel was read from, whatever name its module has; the function itself if it has none."""
    return getattr(getattr(function, "__code__", None), "co_filename", function)


def note_declaration(op: str, function: Kernel) -> None:
    """Note that `function` declares an op. If another one did before, the op's kernels go: they may compute that.

    Those stay that were registered again since, or stand above the function in its file; and those of this package.
    """
    code: Any = getattr(function, "__code__", None)
    before = _declared.get(op)
    own = [key for key in _kernels if key[0].removesuffix(".vjp") == op and _kernels[key] and not _module(key)]
    for key in own if code and before not in (None, code) else ():
        theirs: Any = getattr(_kernels[key], "__code__", None)
        above = theirs and theirs.co_filename == code.co_filename and theirs.co_firstlineno < code.co_firstlineno
        if key not in _replaced and not above:
            del _kernels[key]
    _replaced.difference_update(own)
    _declared[op] = code


def _module(key: tuple[str, str]) -> str | None:
    return MODULES.get(key) or CUDA_MODULES.get(key)


def lookup(name: str, device: str) -> Kernel | None:
    """The kernel `name` of `device`; None if there is none, or if it is on the CPU and kernels are not `ENABLED`."""
    if not ENABLED.get() and device == "cpu":
        return None
    key = name, device
    try:
        return _kernels[key]
    except KeyError:
        pass
    if module := _module(key):
        load(module)  # registers the kernel
    else:
        _kernels[key] = None
    return _kernels[key]


def names() -> list[tuple[str, str]]:
    """All (name, device) with a kernel: the package's own and registered ones."""
    return sorted(MODULES.keys() | CUDA_MODULES.keys() | {key for key, found in _kernels.items() if found})
