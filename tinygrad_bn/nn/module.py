"""Module: parameters, buffers and sub-modules under one name each, with PyTorch's conventions for their keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Self, TypeAlias

import numpy as np
from numpy.typing import DTypeLike

from tinygrad_bn.backend import Array, move, to_numpy
from tinygrad_bn.modes import no_grad
from tinygrad_bn.tensor import Tensor

Observer: TypeAlias = Callable[["Module", Tensor], None]

_observer: ContextVar[Observer | None] = ContextVar("observer", default=None)


class Parameter(Tensor):
    """A tensor that an optimiser trains, when it is an attribute of a module."""

    __slots__ = ()

    def __init__(self, data: object, requires_grad: bool = True, dtype: DTypeLike | None = None) -> None:
        super().__init__(data, requires_grad, dtype)


class Buffer(Tensor):
    """A tensor that belongs to a module's state but is not trained, as running statistics are."""

    __slots__ = ()


# What most attributes are, and no module: asked for first, as every step goes through all of them.
PLAIN = frozenset({Parameter, Buffer, bool, int, float, str, type(None)})


class Module:
    """Base of layers and networks: what is assigned to an attribute is found there.

    Parameters, buffers and modules, also modules in lists and tuples, are looked up among the attributes, so a
    subclass needs no registration and no `super().__init__()`; it defines `forward`.

    >>> class Twice(Module):
    ...     def __init__(self):
    ...         self.scale = Parameter([2.0])
    ...     def forward(self, x):
    ...         return x * self.scale
    >>> Twice()(np.ones(3)).shape, list(Twice().state_dict())
    ((3,), ['scale'])
    """

    training: bool = True

    def forward(self, *args: Any, **options: Any) -> Tensor:
        """The layer's function; `module(x)` calls it."""
        raise TypeError(f"{type(self).__name__} defines no forward")

    def __call__(self, *args: Any, **options: Any) -> Tensor:
        """Run `forward`; arrays and lists among the positional arguments become tensors where the module lives."""
        y = self.forward(*[self._tensor(a) if isinstance(a, (np.ndarray, list)) else a for a in args], **options)
        observer = _observer.get()
        if observer is not None:
            observer(self, y)
        return y

    def _tensor(self, data: Array | list[Any]) -> Tensor:
        return Tensor(data).to(next((t.device for _, t in self.named_tensors()), "cpu"))

    # ---- what it consists of ----------------------------------------------------------------------------

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """Modules among the attributes; one in a list is called `attribute.index`.

        Raises TypeError for what would not be found: parameters and buffers in a list, anything deeper, or in a
        dictionary.
        """
        for name, value in vars(self).items():
            if type(value) in PLAIN:
                continue
            if isinstance(value, Module):
                yield name, value
            elif isinstance(value, list | tuple):
                for i, item in enumerate(value):
                    if isinstance(item, Module):
                        yield f"{name}.{i}", item
                    elif _holds_state(item):
                        raise TypeError(f"{type(self).__name__}.{name}[{i}] would not be found; give it an attribute")
            elif isinstance(value, dict) and _holds_state(value):
                raise TypeError(f"{type(self).__name__}.{name} is a dictionary; use attributes, or a list of modules")

    def named_modules(self, prefix: str = "", _above: tuple[Module, ...] = ()) -> Iterator[tuple[str, Module]]:
        """This module (named "") and all below it."""
        if self in _above:
            raise ValueError(f"{type(self).__name__} contains itself, as {prefix!r}")
        yield prefix, self
        for name, child in self.named_children():
            yield from child.named_modules(f"{prefix}.{name}" if prefix else name, (*_above, self))

    def modules(self) -> Iterator[Module]:
        """This module and all below it."""
        return (module for _, module in self.named_modules())

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter and buffer under its key of the state dict; a shared one under each of its keys."""
        for prefix, module in self.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, Parameter | Buffer):
                    yield f"{prefix}.{name}" if prefix else name, value

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Each parameter once, under its first key."""
        seen = set()
        for name, t in self.named_tensors():
            if isinstance(t, Parameter) and t not in seen:
                seen.add(t)
                yield name, t

    def parameters(self) -> Iterator[Parameter]:
        """Each parameter once."""
        return (p for _, p in self.named_parameters())

    def named_buffers(self) -> Iterator[tuple[str, Buffer]]:
        """The buffers, under their keys."""
        return ((name, t) for name, t in self.named_tensors() if isinstance(t, Buffer))

    def buffers(self) -> Iterator[Buffer]:
        """The buffers."""
        return (t for _, t in self.named_buffers())

    def children(self) -> Iterator[Module]:
        """The modules directly below this one."""
        return (child for _, child in self.named_children())

    # ---- modes ------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:
        """Set training mode (or evaluation mode) here and below."""
        for module in self.modules():
            module.training = mode
        return self

    def eval(self) -> Self:
        """Set evaluation mode here and below: BatchNorm uses running statistics, Dropout does nothing."""
        return self.train(False)

    def apply(self, function: Callable[[Module], object]) -> Self:
        """Call `function` on every module here and below."""
        for module in self.modules():
            function(module)
        return self

    def zero_grad(self) -> None:
        """Forget every parameter's gradient."""
        for module in self.modules():
            for t in vars(module).values():
                if isinstance(t, Parameter):
                    t.grad = None

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Let every parameter be trained, or none."""
        for p in self.parameters():
            p.requires_grad = requires_grad
        return self

    def astype(self, dtype: DTypeLike) -> Self:
        """Convert the floating-point parameters and buffers."""
        for module in self.modules():
            module._convert(dtype)
        return self

    def _convert(self, dtype: DTypeLike) -> None:
        for t in vars(self).values():
            if isinstance(t, Parameter | Buffer) and t.dtype.kind == "f":
                t._data = t._data.astype(dtype)

    def to(self, device: str) -> Self:
        """Move parameters, their gradients and buffers to `device`, "cpu" or "cuda".

        An optimiser that has made steps already stays where it was: make it afterwards.

        Raises RuntimeError where there is no such device, saying what is missing: then nothing was moved.
        """
        tensors = {t for module in self.modules() for t in vars(module).values() if isinstance(t, Parameter | Buffer)}
        moved = [(t, move(t._data, device), None if t.grad is None else t.grad.detach().to(device)) for t in tensors]
        for t, data, gradient in moved:
            t._data, t.grad = data, gradient
        return self

    # ---- state ------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Array]:
        """Copies of all parameters and buffers, under PyTorch's keys: NumPy arrays, wherever the module lives."""
        return {name: to_numpy(t) for name, t in self.named_tensors()}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Copy arrays (or tensors), of any device, into the parameters and buffers. All of them, or, on an error, none.

        A missing `num_batches_tracked` is no error: older checkpoints have none.

        Raises:
            KeyError: with `strict`, naming the keys that are missing and those that are unexpected.
            ValueError: naming every key whose shape differs.
            TypeError: naming every key whose dtype is of another kind.
        """
        own = dict(self.named_tensors())
        missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
        unexpected = [k for k in state if k not in own]
        if strict and (missing or unexpected):
            raise KeyError(f"missing keys: {missing or 'none'}; unexpected keys: {unexpected or 'none'}")
        arrays = {k: to_numpy(state[k]) for k in own if k in state}
        wrong = [
            f"{k}: {a.shape} for {own[k].shape}"
            for k, a in arrays.items()
            if a.shape != own[k].shape and (own[k].ndim or a.size != 1)
        ]
        if wrong:
            raise ValueError(f"shapes do not fit: {'; '.join(wrong)}")
        wrong = [k for k, a in arrays.items() if not np.can_cast(a.dtype, own[k].dtype, "same_kind")]
        if wrong:
            raise TypeError(
                "dtypes do not fit: " + "; ".join(f"{k}: {arrays[k].dtype} for {own[k].dtype}" for k in wrong)
            )
        for k, a in arrays.items():
            own[k].data = a.reshape(own[k].shape)

    # ---- to look at -------------------------------------------------------------------------------------

    def extra_repr(self) -> str:
        """What the brackets of `repr` say of a layer."""
        return ""

    def __repr__(self) -> str:
        inner = "".join(f"\n  ({name}): " + repr(child).replace("\n", "\n  ") for name, child in self.named_children())
        return f"{type(self).__name__}({self.extra_repr()}{inner}{chr(10) if inner else ''})"

    def summary(self, input_shape: tuple[int, ...]) -> None:
        """Print layers, output shapes and how many numbers each holds, as Keras does.

        A BatchNorm of C channels counts 4C: 2C trainable (weight, bias) and 2C not (running mean and variance).

        Args:
            input_shape: the shape of one sample, without the batch axis.
        """
        from rich.console import Console
        from rich.table import Table

        table = Table("Layer", "Output shape", title=type(self).__name__)
        table.add_column("Parameters", justify="right")
        counted: set[Tensor] = set()

        def add(module: Module, y: Tensor) -> None:
            own = {t for t in vars(module).values() if isinstance(t, Parameter | Buffer) and t.dtype.kind == "f"}
            if own or not any(module.named_children()):
                tensors = own - counted
                counted.update(tensors)
                shape = ", ".join(["N", *map(str, y.shape[1:])])
                table.add_row(type(module).__name__, f"({shape})", f"{sum(t.size for t in tensors):,}")

        with no_grad(), evaluating(self), observe(add):
            self(np.zeros((2, *input_shape), np.float32))
        console = Console()
        console.print(table)
        trainable = sum(p.size for p in self.parameters() if p.requires_grad)
        total = sum({t: t.size for _, t in self.named_tensors() if t.dtype.kind == "f"}.values())
        console.print(f"Parameters: {total:,} = {trainable:,} trainable + {total - trainable:,} non-trainable")


def _holds_state(value: object) -> bool:
    """Whether `value` is, or somewhere contains, a module, a parameter or a buffer."""
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, Module | Parameter | Buffer) or (
        isinstance(value, list | tuple) and any(_holds_state(item) for item in value)
    )


@contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Inside this block `observer(module, output)` is called after every module's forward."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def being_observed() -> bool:
    """Whether somebody wants to see every module's output."""
    return _observer.get() is not None


@contextmanager
def evaluating(model: Module) -> Iterator[None]:
    """Evaluation mode for this block; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
