"""Module: the base of layers and networks, with PyTorch's names and state-dict keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextvars import ContextVar
from os import PathLike
from types import FunctionType, ModuleType
from typing import Any, ClassVar, Self, TypeAlias

import numpy as np
from numpy.typing import DTypeLike

from tinygrad_bn.arguments import (
    expect_flags,
    expect_integer,
    fitting,
    flag,
    floating_dtype,
    full_name,
    shown,
    warn_caller,
)
from tinygrad_bn.backend import Array, move, to_numpy
from tinygrad_bn.keywords import expect_keywords, unknown
from tinygrad_bn.modes import Block, Mode, attributes_as_before, no_grad
from tinygrad_bn.nn.paths import add_path
from tinygrad_bn.notebook import ModuleInNotebook
from tinygrad_bn.tensor import Tensor

Observer: TypeAlias = Callable[["Module", Tensor], None]

OBSERVER: ContextVar[Observer | None] = ContextVar("observer", default=None)


class Parameter(Tensor):
    """A trainable tensor, found when it is an attribute of a module."""

    __slots__ = ()

    def __init__(self, data: object, requires_grad: bool = True, dtype: DTypeLike | None = None) -> None:
        super().__init__(data, requires_grad, dtype)


class Buffer(Tensor):
    """A tensor of a module's state that is not trained, such as running statistics."""

    __slots__ = ()


AFFINE: dict[str, type] = {"weight": Parameter, "bias": Parameter}

# Types of most attributes, none of them modules. Checked first, since every step visits all attributes.
PLAIN = frozenset({Parameter, Buffer, bool, int, float, str, type(None)})


class Module(ModuleInNotebook):
    """Base class of layers and networks. A subclass defines `forward`.

    Parameters, buffers, modules, and modules in lists and tuples are found among the attributes. No registration and
    no `super().__init__()` is needed.

    >>> class Twice(Module):
    ...     def __init__(self):
    ...         self.scale = Parameter([2.0])
    ...     def forward(self, x):
    ...         return x * self.scale
    >>> Twice()(np.ones(3)).shape, list(Twice().state_dict())
    ((3,), ['scale'])
    """

    __slots__ = ("__dict__", "__weakref__", "_kinds")

    training: bool = True
    _optional: ClassVar[Mapping[str, type]] = {}  # what an attribute is that may be None from the beginning
    _checks: ClassVar[Mapping[str, Callable[[str, Any], Any]]] = {"training": flag}  # of options
    _kinds: dict[str, type]  # whether an attribute is, or was before it was None, a Parameter, a Buffer or a Module

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name, value in vars(cls).items():
            if _is_state(value) and not (isinstance(value, Module) and not any(value.named_tensors())):
                raise TypeError(
                    f"{cls.__name__}.{name} would not be found, since the class has it and not its objects; assign the "
                    f"{type(value).__name__} in __init__"
                )

    def __new__(cls, *args: Any, **options: Any) -> Self:
        if options:
            expect_keywords(cls, options)
        self = super().__new__(cls)
        object.__setattr__(self, "_kinds", dict(cls._optional))
        return self

    def __init__(self, *args: Any, **options: Any) -> None:
        """Of a layer without options. Raises TypeError for any."""
        if args or options:
            got = ", ".join((*map(shown, args), *(unknown(name, ()) for name in options)))
            raise TypeError(f"{type(self).__name__} takes no options; got {got}")
        super().__init__()  # of a class beside this one

    def __setattr__(self, name: str, value: object) -> None:
        """Set an attribute.

        Raises TypeError if anything of another kind, except None, is to replace a parameter, buffer or module.
        Raises TypeError for state that would not be found, as `named_children` does; also for state in attributes of
        an object that is no module, unless this module has it too. Raises TypeError or ValueError for an option that
        does not fit.
        """
        if name in self._checks:
            value = self._checks[name](name, value)
        wanted = self._kinds.get(name)
        holds_modules = type(value) not in PLAIN and any(list(self._children_in(name, value)))
        if type(value) not in PLAIN and not isinstance(value, UNSEARCHED):
            self._expect_found(name, value)
        others = wanted is Module and (holds_modules or (isinstance(value, list | tuple) and not value))
        if wanted and value is not None and not isinstance(value, wanted) and not others:
            values = "" if wanted is Module or getattr(self, name, None) is None else ", or new values to its .data"
            raise TypeError(
                f"{type(self).__name__}.{name} is a {wanted.__name__}; assign a {wanted.__name__} or None{values}; "
                f"got a {type(value).__name__}"
            )
        for kind in (Parameter, Buffer, Module):
            if isinstance(value, kind) or (kind is Module and holds_modules):
                self._kinds[name] = kind
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        """Delete an attribute; the next one of its name may be anything."""
        object.__delattr__(self, name)
        self._kinds.pop(name, None)

    def __getstate__(self) -> object:
        """For `copy` and `pickle`. Raises RuntimeError if an attribute is, or holds, a result with a graph."""
        for name, value in vars(self).items():
            if _holds(value, lambda item: isinstance(item, Tensor) and not item.is_leaf):
                raise RuntimeError(
                    f"{type(self).__name__}.{name} is a result with a graph, which cannot be copied or pickled; "
                    "keep its detach(), or set the attribute to None before"
                )
        return dict(vars(self)), {"_kinds": dict(self._kinds)}

    def forward(self, *args: Any, **options: Any) -> Tensor:
        """Compute the output; `module(x)` calls this."""
        raise TypeError(f"{type(self).__name__} defines no forward; a subclass has to: def forward(self, x)")

    def __call__(self, *args: Any, **options: Any) -> Tensor:
        """Run `forward`. Positional arrays and lists become tensors on the module's device.

        An error gets a note that says in which module it was raised.
        """
        try:
            y = self.forward(*[self._tensor(a) if isinstance(a, (np.ndarray, list)) else a for a in args], **options)
        except Exception as error:
            add_path(error)
            raise
        observer = OBSERVER.get()
        if observer is not None:
            observer(self, y)
        return y

    def _tensor(self, data: Array | list[Any]) -> Tensor:
        return Tensor(data).to(next((t.device for _, t in self.named_tensors()), "cpu"))

    # ---- contents ---------------------------------------------------------------------------------------

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """Modules among the attributes. A module in a list is named `attribute.index`.

        Raises TypeError for state that would not be found: parameters, buffers and tensors that require a gradient in
        a list; modules in nested lists, dictionaries, sets and other collections; arrays among modules.
        """
        for name, value in vars(self).items():
            if isinstance(value, Module):
                yield name, value
            elif type(value) not in PLAIN:
                yield from self._children_in(name, value)

    def _children_in(self, name: str, value: object) -> Iterator[tuple[str, Module]]:
        if isinstance(value, Module):
            yield name, value
        elif isinstance(value, list | tuple):
            among_modules = self._kinds.get(name) is Module or any(isinstance(item, Module) for item in value)
            for i, item in enumerate(value):
                if type(item) in (int, float, str):  # soon done, as there may be many
                    continue
                if isinstance(item, Module):
                    yield f"{name}.{i}", item
                elif _holds(item, _is_state) or (among_modules and isinstance(item, Tensor | np.ndarray)):
                    raise TypeError(
                        f"{type(self).__name__}.{name}[{i}] would not be found, since it is not a module but a "
                        f"{type(item).__name__}; make it an attribute"
                    )
        elif isinstance(value, (*COLLECTIONS, np.ndarray)) and _holds(value, _is_state):
            kind = "dictionary" if isinstance(value, Mapping) else type(value).__name__
            raise TypeError(f"{type(self).__name__}.{name} is a {kind}; use attributes, or a list of modules")

    def _expect_found(self, name: str, value: object) -> None:
        """Raise TypeError if attributes of an object that is no module are state, and nothing here has it."""
        inside = getattr(value, "__dict__", {})
        if not any(_holds(item, _is_state) for item in inside.values()):
            return
        own = {*self.modules(), *(t for _, t in self.named_tensors())}  # an optimizer may keep those
        for inner, item in inside.items():
            if _holds(item, lambda part: _is_state(part) and part not in own):
                raise TypeError(
                    f"{type(self).__name__}.{name}.{inner} would not be found, since {name} is {full_name(value)} and "
                    "not a module; make it an attribute of the module, or derive its class from Module"
                )

    def named_modules(self, prefix: str = "", _above: tuple[Module, ...] = ()) -> Iterator[tuple[str, Module]]:
        """This module, named "", and all below it. Raises ValueError if a module contains itself."""
        if self in _above:
            raise ValueError(f"{type(self).__name__} contains itself, as {prefix!r}")
        yield prefix, self
        for name, child in self.named_children():
            yield from child.named_modules(f"{prefix}.{name}" if prefix else name, (*_above, self))

    def modules(self) -> Iterator[Module]:
        """This module and all below it."""
        return (module for _, module in self.named_modules())

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All parameters and buffers with their state-dict keys; a shared tensor with each of its keys."""
        for prefix, module in self.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, Parameter | Buffer):
                    yield f"{prefix}.{name}" if prefix else name, value

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Each parameter once, with its first key."""
        seen = set()
        for name, t in self.named_tensors():
            if isinstance(t, Parameter) and t not in seen:
                seen.add(t)
                yield name, t

    def parameters(self) -> Iterator[Parameter]:
        """Each parameter once."""
        return (p for _, p in self.named_parameters())

    def named_buffers(self) -> Iterator[tuple[str, Buffer]]:
        """The buffers, with their keys."""
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
        expect_flags(mode=mode)
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
        """Set the gradient of every parameter to None."""
        for module in self.modules():
            for t in vars(module).values():
                if isinstance(t, Parameter):
                    t.grad = None

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Set `requires_grad` of every parameter."""
        expect_flags(requires_grad=requires_grad)
        for p in self.parameters():
            p.requires_grad = requires_grad
        return self

    def astype(self, dtype: DTypeLike) -> Self:
        """Convert the floating-point parameters and buffers to `dtype`, which is floating-point too, else TypeError."""
        dtype = floating_dtype("the dtype of parameters", dtype)
        for module in self.modules():
            module._convert(dtype)
        return self

    def _convert(self, dtype: DTypeLike) -> None:
        for t in vars(self).values():
            if isinstance(t, Parameter | Buffer) and t.dtype.kind == "f":
                t._data = t._data.astype(dtype)

    def to(self, device: str) -> Self:
        """Move parameters, their gradients and buffers to `device`, "cpu" or "cuda".

        Create the optimiser after this call: the state of an existing one does not move.

        Raises RuntimeError if the device is not available; the message says why, and nothing was moved.
        """
        tensors = {t for module in self.modules() for t in vars(module).values() if isinstance(t, Parameter | Buffer)}
        moved = [(t, move(t._data, device), None if t.grad is None else t.grad.detach().to(device)) for t in tensors]
        for t, data, gradient in moved:
            t._data, t.grad = data, gradient
        return self

    # ---- state ------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Array]:
        """Copies of all parameters and buffers as NumPy arrays, under PyTorch's keys."""
        return {name: to_numpy(t) for name, t in self.named_tensors()}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Copy arrays, or tensors on any device, into the parameters and buffers. On an error nothing changes.

        A missing `num_batches_tracked` is not an error: older checkpoints have none.

        Raises:
            KeyError: with `strict`, keys are missing or unexpected.
            ValueError: shapes differ; a number overflows in the parameter's dtype; a running variance or a count is
                negative.
            TypeError: dtypes cannot be cast within their kind (NumPy's "same_kind"), such as float to int; or `state`
                is not a dictionary.
        """
        expect_flags(strict=strict)
        if not isinstance(state, Mapping):
            raise TypeError(f"a state is a dictionary of arrays, as state_dict() gives it; got {full_name(state)}")
        own = dict(self.named_tensors())
        missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
        unexpected = [k for k in state if k not in own]
        if strict and (missing or unexpected):
            raise KeyError(
                f"missing keys: {missing or 'none'}; unexpected keys: {unexpected or 'none'}: the state is of another "
                "model; strict=False loads the keys that fit"
            )
        arrays = {k: _array_of(k, state[k]) for k in own if k in state}
        wrong = [k for k, a in arrays.items() if not np.can_cast(a.dtype, own[k].dtype, "same_kind")]
        if wrong:
            raise TypeError(
                "the state does not fit: " + "; ".join(f"{k} is {_kind(arrays[k])}, not {own[k].dtype}" for k in wrong)
            )
        wrong = [
            f"{k}: got {a.shape}, expected {own[k].shape}"
            for k, a in arrays.items()
            if a.shape != own[k].shape and (own[k].ndim or a.size != 1)
        ]
        if wrong:
            raise ValueError(f"shapes differ, as of another model: {'; '.join(wrong)}")
        for k, a in arrays.items():
            fitting(k, a, own[k].dtype)
            counts = isinstance(own[k], Buffer) and k.split(".")[-1] in ("running_var", "num_batches_tracked")
            if counts and (a < 0).any():
                raise ValueError(f"{k} is negative")
        for k, a in arrays.items():
            own[k].data = a.reshape(own[k].shape)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the parameters and buffers to a safetensors file, whole or not at all; PyTorch loads it too.

        Raises OSError if it cannot be written.
        """
        from tinygrad_bn.checkpoint import save_model

        save_model(path, self)

    def load(self, path: str | PathLike[str], strict: bool = True) -> None:
        """Load parameters and buffers from a safetensors file, also of PyTorch. On an error nothing changes.

        Warns of what was converted (bfloat16 becomes float32) or is missing and may be (`num_batches_tracked`).

        Raises checkpoint.CheckpointError if the file is damaged or does not fit, OSError if it cannot be read.
        """
        from tinygrad_bn.checkpoint import load_model

        for note in load_model(path, self, strict=strict).notes:
            warn_caller(note)

    # ---- printing ---------------------------------------------------------------------------------------

    def extra_repr(self) -> str:
        """The arguments of the layer, for `repr`."""
        return ""

    def __repr__(self) -> str:
        inner = "".join(f"\n  ({name}): " + repr(child).replace("\n", "\n  ") for name, child in self.named_children())
        return f"{type(self).__name__}({self.extra_repr()}{inner}{chr(10) if inner else ''})"

    def summary(self, input_shape: tuple[int, ...]) -> None:
        """Print the layers, their output shapes and parameter counts, as Keras does.

        A BatchNorm of C channels counts 4C: 2C trainable (weight, bias), 2C not (running mean and variance).

        Args:
            input_shape: the shape of one sample, without the batch axis.

        Raises TypeError for another kind of shape, ValueError for a number below 0.
        """
        from rich.console import Console
        from rich.table import Table

        if not isinstance(input_shape, tuple | list):
            raise TypeError(f"input_shape is the shape of one sample, such as (3,); got {shown(input_shape)}")
        sample = [expect_integer("each number of input_shape", n, 0) for n in input_shape]
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
            self(np.zeros((2, *sample), np.float32))
        console = Console()
        console.print(table)
        trainable = sum(p.size for p in self.parameters() if p.requires_grad)
        total = sum({t: t.size for _, t in self.named_tensors() if t.dtype.kind == "f"}.values())
        console.print(f"Parameters: {total:,} = {trainable:,} trainable + {total - trainable:,} non-trainable")


def _array_of(name: str, value: Any) -> Array:
    try:
        return to_numpy(value)
    except ValueError as error:  # lists of different lengths
        raise ValueError(f"{name} is no array: {error}") from None


def _kind(array: Array) -> str:
    return "text" if array.dtype.kind in "US" else str(array.dtype)


def _is_state(value: object) -> bool:
    trained = isinstance(value, Tensor) and value.requires_grad and value.is_leaf
    return trained or isinstance(value, Module | Parameter | Buffer)


COLLECTIONS = (Sequence, Set, Mapping)  # no iterators, which looking inside would use up
UNSEARCHED = (Module, Tensor, np.ndarray, *COLLECTIONS, type, ModuleType, FunctionType)  # of attributes


def _holds(value: object, wanted: Callable[[Any], bool]) -> bool:
    """Whether `value` is what is wanted, or contains it: in lists, tuples, sets and dictionaries."""
    if isinstance(value, COLLECTIONS) and not isinstance(value, str | bytes | range):
        items = (*value, *value.values()) if isinstance(value, Mapping) else value
        return any(_holds(item, wanted) for item in items)
    if isinstance(value, np.ndarray) and value.dtype == object:
        return any(map(wanted, value.flat))
    return wanted(value)


def observe(observer: Observer) -> Mode:
    """Inside this block, `observer(module, output)` is called after the forward of every module."""
    return Mode(OBSERVER, observer)


def being_observed() -> bool:
    """Whether an observer is set."""
    return OBSERVER.get() is not None


def evaluating(model: Module) -> Block[Module]:
    """Evaluation mode inside this block; afterwards each module is back in its mode."""
    return Block(lambda: (attributes_as_before((m, "training") for m in model.modules()), model.eval))
