"""Saving and loading a model with its training state: everything is checked before anything is changed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import tinygrad_bn
from tinygrad_bn import random
from tinygrad_bn.arguments import expect_flags, full_name, shown, warn_caller
from tinygrad_bn.backend import Array, to_numpy
from tinygrad_bn.checkpoint.codec import pack
from tinygrad_bn.checkpoint.files import CheckpointError, Contents, read, to_bytes, write
from tinygrad_bn.nn.module import Module
from tinygrad_bn.optim import Optimizer, Schedule

CONVENTIONS = ("eps", "momentum", "running_var_correction")  # options that weights alone do not show
Generators = Mapping[str, np.random.Generator] | Iterable[tuple[str, np.random.Generator]]


def save(
    path: str | os.PathLike[str],
    model: Module,
    *,
    optimizer: Optimizer | None = None,
    schedule: Schedule | None = None,
    generators: Generators = (),
    extra: Any = None,
    arrays: Mapping[str, Array] | None = None,
) -> Path:
    """Write a checkpoint, whole or not at all, and return its path.

    The generators of the model's modules, such as Dropout's, and the default one are saved too.

    Args:
        generators: further ones by name, such as that of the order of batches.
        extra: numbers, texts, None, lists, tuples, dictionaries and arrays in any nesting; read back the same.
        arrays: further arrays by name.

    Raises TypeError or ValueError for what cannot be saved, OSError if the file cannot be written.
    """
    _expect(model, optimizer, schedule)
    named = _generators(model, generators)
    content = {
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        "schedule": None if schedule is None else schedule.state_dict(),
        "generators": {name: rng.bit_generator.state for name, rng in named.items()},
        "extra": extra,
        "arrays": {name: to_numpy(a) for name, a in dict(arrays or {}).items()},
    }
    classes = {k: type(v).__name__ for k, v in (("optimizer", optimizer), ("schedule", schedule)) if v is not None}
    return _write(path, model, content, classes)


def save_model(path: str | os.PathLike[str], model: Module) -> Path:
    """Write the parameters and buffers alone, under PyTorch's keys; errors as `save`."""
    _expect(model)
    return _write(path, model, dict.fromkeys(("optimizer", "schedule", "generators", "extra", "arrays")), {})


def _write(path: str | os.PathLike[str], model: Module, content: dict[str, Any], classes: dict[str, str]) -> Path:
    arrays = model.state_dict()
    if wrong := [k for k in arrays if "/" in k or k == "__metadata__"]:
        raise ValueError(f"{wrong[0]!r} cannot be the name of a parameter or buffer in a file; rename the attribute")
    keys = list(arrays)
    packed = {part: pack(value, part, arrays) for part, value in content.items()}
    metadata = {"package_version": tinygrad_bn.__version__, "conventions": _conventions(model), **classes}
    path = Path(path)
    write(path, to_bytes(arrays, {**packed, "keys": keys, "metadata": metadata}))
    return path


def load(
    path: str | os.PathLike[str],
    model: Module,
    *,
    optimizer: Optimizer | None = None,
    schedule: Schedule | None = None,
    generators: Generators = (),
    strict: bool = True,
) -> Contents:
    """Load a checkpoint into the objects given, and return all that is in it. On an error nothing changes.

    The states go into the generators that are there, so those that are shared stay shared. Only states are restored,
    not the seeds that `Generator.spawn` counts from.

    Also restored is the state of the default generator, that of `manual_seed`; `Module.load` and `load_model` take the
    parameters and buffers alone.

    Args:
        strict: without it, keys of the model may be missing or unexpected, and options of normalisations may differ,
            with a warning.

    Raises CheckpointError if the file is damaged, or does not fit; OSError if it cannot be read.
    """
    _expect(model, optimizer, schedule, strict)
    return apply(read(path), model, optimizer=optimizer, schedule=schedule, generators=generators, strict=strict)


def load_model(path: str | os.PathLike[str], model: Module, *, strict: bool = True) -> Contents:
    """Load parameters and buffers alone, and return all that is in the file; errors and `strict` as `load`."""
    _expect(model, strict=strict)
    return _apply(read(path), model, None, None, {}, strict)


def apply(
    contents: Contents,
    model: Module,
    *,
    optimizer: Optimizer | None = None,
    schedule: Schedule | None = None,
    generators: Generators = (),
    strict: bool = True,
) -> Contents:
    """Take over what was read; arguments and errors as of `load`. On an error, or an interrupt, nothing changes."""
    _expect(model, optimizer, schedule, strict)
    return _apply(contents, model, optimizer, schedule, _generators(model, generators), strict)


def _apply(
    contents: Contents,
    model: Module,
    optimizer: Optimizer | None,
    schedule: Schedule | None,
    generators: Mapping[str, np.random.Generator],
    strict: bool,
) -> Contents:
    path = contents.path
    _compare_conventions(contents, model, strict)
    _expect_part(contents, "optimizer", optimizer)
    _expect_part(contents, "schedule", schedule)
    states = _fitting_states(contents, generators)
    arrays, notes = _with_aliases(contents.model, model)
    undo = _undoing(model, optimizer, schedule, generators)
    try:
        model.load_state_dict(arrays, strict)
        if optimizer is not None and contents.optimizer is not None:
            optimizer.load_state_dict(contents.optimizer)
        if schedule is not None and contents.schedule is not None:
            schedule.load_state_dict(contents.schedule)
        for name, state in states.items():
            generators[name].bit_generator.state = state
    except BaseException as error:
        undo()
        if isinstance(error, KeyError | ValueError | TypeError | AttributeError | OverflowError):
            problem = error.args[0] if error.args else error
            raise CheckpointError(path, f"it does not fit, and nothing was loaded: {problem}") from error
        raise
    return replace(contents, notes=(*contents.notes, *notes))


def _expect(
    model: Module, optimizer: Optimizer | None = None, schedule: Schedule | None = None, strict: bool = True
) -> None:
    expect_flags(strict=strict)
    if isinstance(model, str | os.PathLike):
        raise TypeError("the path comes first, then the model: save(path, model)")
    for name, value, kind in (
        ("model", model, Module),
        ("optimizer", optimizer, Optimizer),
        ("schedule", schedule, Schedule),
    ):
        if not (isinstance(value, kind) or (value is None and name != "model")):
            raise TypeError(f"{name} has to be a {kind.__name__}; got {full_name(value)}")


def _generators(model: Module, given: Generators) -> dict[str, np.random.Generator]:
    """All generators by name: those given, those of modules, and the default one."""
    found = dict(given)
    for name, value in found.items():
        if not (isinstance(name, str) and isinstance(value, np.random.Generator)):
            raise TypeError(f"generators are NumPy Generators by name; got {name!r}: {full_name(value)}")
        if name == "default" or name.startswith("module:"):
            raise ValueError(f"a generator cannot be named {name!r}, which is the name of one that is saved anyway")
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, np.random.Generator):
                found[f"module:{prefix}.{name}" if prefix else f"module:{name}"] = value
    return {**found, "default": random.generator()}


def _fitting_states(contents: Contents, generators: Mapping[str, np.random.Generator]) -> dict[str, Any]:
    """The saved state of each generator. Raises CheckpointError if one is missing, or is of another kind."""
    saved = contents.generators
    given = [n for n in generators if not (n == "default" or n.startswith("module:"))]
    if missing := [n for n in (generators if saved else given) if n not in saved]:
        raise CheckpointError(contents.path, f"it has no state of the generator {missing[0]!r}; it has {list(saved)}")
    first: dict[int, str] = {}
    for name, rng in generators.items() if saved else ():
        kind, was = type(rng.bit_generator).__name__, saved[name].get("bit_generator")
        if was != kind:
            raise CheckpointError(contents.path, f"the generator {name!r} was a {shown(was)}, and is a {kind} here")
        try:
            type(rng.bit_generator)().state = saved[name]
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise CheckpointError(
                contents.path, f"the state of the generator {name!r} does not fit: {error}"
            ) from error
        other = first.setdefault(id(rng.bit_generator), name)
        if repr(saved[other]) != repr(saved[name]):
            raise CheckpointError(contents.path, f"{other!r} and {name!r} are one generator here, but were two")
    return {name: saved[name] for name in first.values()}


def _expect_part(contents: Contents, part: str, given: object) -> None:
    """Raise CheckpointError if the file has no state for what is given, or that of another class."""
    if given is None:
        return
    if (saved := contents.metadata.get(part)) is None:
        raise CheckpointError(contents.path, f"it has no state of the {part}; load it without")
    if saved != type(given).__name__:
        raise CheckpointError(contents.path, f"its {part} is {saved}, and the one given is {type(given).__name__}")


def _conventions(model: Module) -> dict[str, dict[str, Any]]:
    """Options of each normalisation by its path: of each module with an `eps`."""
    named = ((path, vars(module)) for path, module in model.named_modules())
    return {
        path: {k: own[k] for k in CONVENTIONS if isinstance(own.get(k, ""), int | float | None)}
        for path, own in named
        if isinstance(own.get("eps", ""), int | float | None)
    }


def _compare_conventions(contents: Contents, model: Module, strict: bool) -> None:
    saved = contents.metadata.get("conventions", {})
    different = [
        f"{path or 'the model'}: {option} is {saved[path][option]} in the file, {value} in the model"
        for path, own in _conventions(model).items()
        for option, value in own.items()
        if option in saved.get(path, {}) and saved[path][option] != value
    ]
    if different and strict:
        advice = "build the model with the values of the file, or pass strict=False"
        raise CheckpointError(contents.path, f"options of normalisations differ: {'; '.join(different)}; {advice}")
    if different:
        warn_caller(f"{contents.path}: options of normalisations differ: {'; '.join(different)}")


def _with_aliases(saved: Mapping[str, Array], model: Module) -> tuple[dict[str, Array], tuple[str, ...]]:
    """The saved arrays, a shared tensor under each of its keys as files may have one only; and notes."""
    own = dict(model.named_tensors())
    by_tensor = {t: saved[k] for k, t in own.items() if k in saved}
    arrays = {**saved, **{k: by_tensor[t] for k, t in own.items() if k not in saved and t in by_tensor}}
    missing = [k for k in own if k not in arrays and k.endswith("num_batches_tracked")]
    return arrays, (f"not in the file, and left as it was: {', '.join(missing)}",) if missing else ()


def _undoing(
    model: Module,
    optimizer: Optimizer | None,
    schedule: Schedule | None,
    generators: Mapping[str, np.random.Generator],
) -> Callable[[], None]:
    """A function that takes back what loading changes: it replaces arrays, options and states, and overwrites none."""
    tensors = [(t, t._data) for _, t in model.named_tensors()]
    states = [(rng.bit_generator, rng.bit_generator.state) for rng in generators.values()]
    schedules = []
    inner: Any = schedule
    while isinstance(inner, Schedule):
        schedules.append((inner, dict(vars(inner))))
        inner = vars(inner).get("after")
    optimizers = [o for o in (optimizer, None if schedule is None else schedule.optimizer) if o is not None]
    kept = [(o, o.state, [(group, dict(group)) for group in o.param_groups]) for o in optimizers]

    def undo() -> None:
        for t, data in tensors:
            t._data = data
        for o, state, groups in kept:
            o.state = state
            for group, old in groups:
                group.clear()
                group.update(old)
        for s, attributes in schedules:
            vars(s).update(attributes)
        for bits, drawn in states:
            bits.state = drawn

    return undo
