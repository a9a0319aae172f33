"""Errors of calls with an argument that does not exist: what there is, and what may have been meant."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import wraps
from inspect import CO_VARKEYWORDS, Parameter, signature
from typing import Any, ParamSpec, Self, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# Names that other libraries, or other versions of them, have for arguments of this one: the first that there is.
MEANT: Mapping[str, tuple[str, ...]] = {
    "axes": ("axis",), "beta_1": ("betas",), "beta_2": ("betas",), "center": ("affine",), "class_weight": ("weight",),
    "clipnorm": ("clip_norm",), "ddof": ("correction",), "decay": ("weight_decay", "momentum"),
    "dim": ("axis", "axes", "start_axis", "normalized_shape"), "dims": ("axis", "axes"), "epsilon": ("eps",),
    "factor": ("gamma",), "filters": ("out_channels",), "input": ("x",), "input_dim": ("in_features",),
    "keepdim": ("keepdims",), "labels": ("target", "data"), "learning_rate": ("lr",), "max_epochs": ("epochs",),
    "metric": ("monitor",), "n_epochs": ("epochs",), "num_classes": ("out_features",), "num_epochs": ("epochs",),
    "output_dim": ("out_features",), "pool_size": ("kernel_size",), "prob": ("p",), "rate": ("p", "lr"),
    "rho": ("alpha",), "scale": ("affine",), "size": ("shape", "kernel_size"), "start_dim": ("start_axis",),
    "strides": ("stride",), "unbiased": ("correction",), "units": ("out_features",), "use_bias": ("bias",),
    "val": ("validation",), "validation_data": ("validation",), "verbose": ("progress",), "weights": ("weight",),
}  # fmt: skip
ADVICE: Mapping[str, str] = {
    "device": "call .to(device) afterwards",
    "dtype": "call .astype(dtype) afterwards",
    "inplace": "leave it out, as results are always new tensors",
}


def unknown(name: str, known: Iterable[str]) -> str:
    """An argument that does not exist, with what to write instead if that is clear: `dim (use axis)`."""
    known = list(known)
    meant = [n for n in MEANT.get(name, ()) if n in known] or get_close_matches(name, known, 1)
    advice = f"use {meant[0]}" if meant else ADVICE.get(name)
    return f"{name} ({advice})" if advice else name


def expect_keywords(cls: Any, options: Mapping[str, Any]) -> None:
    """Raise TypeError unless objects of `cls` are made with options of these names."""
    code = getattr(cls.__init__, "__code__", None)  # faster than a signature
    if code is None or code.co_flags & CO_VARKEYWORDS:
        return
    if not options.keys() <= set(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]):
        _, *parameters = signature(cls.__init__).parameters.values()
        known = {p.name: p for p in parameters if p.kind is not p.VAR_POSITIONAL}
        raise wrong_keywords(cls.__name__, known, options)


def wrong_keywords(name: str, known: Mapping[str, Parameter], options: Iterable[str]) -> TypeError:
    """The error of a call of `name` with such options, where the `known` ones are declared."""
    wrong = ", ".join(unknown(option, known) for option in options if option not in known)
    return TypeError(f"{name}({', '.join(map(_declared, known.values()))}): unknown: {wrong}")


def _declared(parameter: Parameter) -> str:
    name, default = parameter.name, parameter.default
    return name if default is parameter.empty else f"{name}={getattr(default, '__name__', repr(default))}"


class Named:
    """A class whose objects are made with options by name: an unknown name is an error that says what there is."""

    __slots__ = ()

    def __new__(cls, *_: Any, **options: Any) -> Self:
        if options:
            expect_keywords(cls, options)
        return super().__new__(cls)


def named(function: Callable[P, R]) -> Callable[P, R]:
    """The function, whose error for an argument that does not exist says what there is."""
    known = signature(function).parameters
    names = frozenset(known)

    @wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        if options and not names.issuperset(options):
            raise wrong_keywords(function.__name__, known, options)
        return function(*args, **options)

    return call
