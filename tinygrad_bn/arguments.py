"""Checks of arguments, for public functions: made once, before anything is computed."""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, unwrap
from typing import Any

import numpy as np

from tinygrad_bn.keywords import unknown

REAL = "?bhilqBHILQefd"  # NumPy's characters of the dtypes to compute with: not of long doubles
LARGEST_FLOAT = np.finfo(np.float64).max.item()
INT64 = np.iinfo(np.int64)
LARGEST = 1 << 60  # of an option that is a size: sums of several stay below 2 ** 63
PACKAGE = os.path.dirname(__file__) + os.sep


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line outside of this package that called into it."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def bind(
    name: str, names: Sequence[str], given: Mapping[str, Any], options: Mapping[str, Any], operands: Any, params: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Operands and options of a call of the op `name`, where an operand came by name or an option by position.

    Args:
        names: of its operands; empty for any number of them.
        given: the defaults of operands and options.
        options: by name.
        operands, params: by position and by name, as in `sum(x, 0)` or `linear(x, weight=w)`.

    Raises TypeError for a wrong call.
    """
    twice = [n for n in names[: len(operands)] if n in params]
    if names and len(operands) > len(names):
        extra = dict(zip(options, operands[len(names) :], strict=False))
        twice += [n for n in extra if n in params]
        if len(operands) == len(names) + len(extra) and not twice:
            operands, params = operands[: len(names)], {**extra, **params}
    elif len(operands) < len(names):
        missing = names[len(operands) :]
        if all(n in params or n in given for n in missing):
            operands = (*operands, *(params[n] if n in params else given[n] for n in missing))
            params = {k: v for k, v in params.items() if k not in missing}
    wrong = [unknown(p, (*names, *options)) for p in params if p not in options and p not in names]
    absent = [n for n in (*names[len(operands) :], *options) if n not in params and n not in given]
    if (names and len(operands) != len(names)) or twice or wrong or absent:
        faults = {"given twice": twice, "unknown": wrong, "missing": absent}
        words = [f"{fault}: {', '.join(which)}" for fault, which in faults.items() if which]
        declared = [f"{n}={given[n]!r}" if n in given else n for n in (*names, *options)]
        raise TypeError(f"{name}({', '.join(declared)}): {'; '.join(words) or 'too many operands'}")
    return operands, params


# What an option may be without a further look, by its annotation.
FAST: dict[str, tuple[type, ...]] = {
    "float": (float, int), "float | None": (float, int), "int": (int,), "bool": (bool,), "Axis": (int,),
    "int | None": (int,), "Reduction": (),
}  # fmt: skip


def fast(
    function: Callable[..., Any], options: Mapping[str, Parameter]
) -> tuple[dict[str, tuple[type, ...]], dict[str, Any]]:
    """Of an op: the types of each option that need no `checked`, and the last right value of each that has a range.

    An op outside this package may mean something else by an option's name: there names have no ranges.
    """
    own = (function.__module__ or "").split(".")[0] == __name__.split(".")[0]
    last = dict.fromkeys(RANGED.keys() & options if own else (), object())  # no value is that object
    return {option: () if option in last else _types(p) for option, p in options.items()}, last


def _types(parameter: Parameter) -> tuple[type, ...]:
    """The types of an option that need no further look."""
    other: tuple[type, ...] = (int, float, tuple, type)  # such as shapes and dtypes, which the op looks at
    if parameter.name == "axis":
        other = (int,)
    elif isinstance(parameter.default, bool):
        other = (bool,)
    types = FAST.get(_annotation(parameter), other)
    return (*types, type(None)) if parameter.default is None else types


def _annotation(parameter: Parameter) -> str:
    return getattr(parameter.annotation, "__name__", str(parameter.annotation))


def checked(name: str, parameter: Parameter, value: Any, last: dict[str, Any], operands: Sequence[Any]) -> Any:
    """An option of the op `name` for these operands, NumPy's scalars as Python's.

    `last` gets a value that is right and cannot change, so that the same object need not be checked again.

    Raises TypeError for a tensor, for None and a text unless the default or the annotation is one, and for what is not
    of the annotated type, where this is bool, int, float or an axis; ValueError for one that is out of range.
    """
    option, default, kind = parameter.name, parameter.default, _annotation(parameter)
    if kind == "Axis" and type(value) is tuple and len(value) > 1 and {int}.issuperset(map(type, value)):
        last[option] = value
        return value  # the usual case, fast
    if value is None:
        if default is None or kind.endswith("| None"):
            return None
        raise TypeError(f"{name}(): {option} may not be None")
    if hasattr(value, "requires_grad") and not hasattr(value, "level"):  # an index may differ from sample to sample
        raise TypeError(f"{name}(): {option} is an option and gets no gradient; pass a number (.item())")
    if option == "axis":
        axis = checked_axis(name, value)
        if type(axis) is tuple and kind in ("int", "int | None"):
            raise TypeError(f"{name}(): axis is one axis, an integer{kind[3:] and ' or None'}; got {shown(value)}")
        only = type(axis) is tuple and len(axis) == 1 and not getattr(operands[0], "ndim", 0)
        return axis[0] if only else axis  # NumPy counts 0-d as one element for an integer, but not for a tuple
    if option in last:
        value = last[option] = RANGED[option](f"{name}(): {option}", value)
        return value
    if isinstance(default, bool) or kind == "bool":
        return flag(f"{name}(): {option}", value)
    if kind.startswith("int") and "tuple" not in kind:
        return expect_integer(f"{name}(): {option}", value)
    if kind.startswith("float"):
        if isinstance(value, bool | np.bool_) and kind == "float | bool":
            return bool(value)
        return python_number(f"{name}(): {option}", value)
    if isinstance(value, str) and kind not in ("str", "Any", "Any | None", "_empty") and not isinstance(default, str):
        raise TypeError(f"{name}(): {option} may not be a text; got {shown(value)}")
    return python_scalar(value)


def python_scalar(value: Any) -> Any:
    """A number of NumPy, or of a subclass such as an enumeration, as Python's own; anything else as it is."""
    if isinstance(value, np.generic):
        return value.item() if is_real(value.dtype) else value
    if type(value) in (int, float, bool) or not isinstance(value, int | float):
        return value
    return int(value) if isinstance(value, int) else float(value)


def _scalar(value: Any) -> Any:
    """`python_scalar` of a number, which may stand in an array of no axes."""
    return python_scalar(value[()] if isinstance(value, np.ndarray) and not value.ndim else value)


def python_number(name: str, value: Any) -> Any:
    """A number as Python's. Raises TypeError for anything else; NaN and infinity are numbers."""
    number = _scalar(value)
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise TypeError(f"{name} has to be a number; got {shown(value)}")
    return number


def checked_axis(name: str, value: Any) -> Any:
    """An axis or a tuple of axes as Python's integers. Raises TypeError for anything else."""
    axes = tuple(map(_scalar, value if isinstance(value, tuple) else (value,)))
    if not all(type(a) is int for a in axes):
        raise TypeError(f"{name}(): axis is an integer, a tuple of integers, or None; got {shown(value)}")
    return axes if isinstance(value, tuple) else axes[0]


def expect_shape(value: Any) -> None:
    """Raise TypeError unless `value` is an integer or a sequence of them, ValueError for one below 0.

    One -1 may stand for the remaining elements.
    """
    several = isinstance(value, tuple | list) or (isinstance(value, np.ndarray) and value.ndim > 0)
    numbers = [_scalar(n) for n in (value if several else (value,))]
    if not all(type(n) is int for n in numbers):
        raise TypeError(f"shape is an integer, or a tuple of integers; got {shown(value)}")
    if min(numbers, default=0) < -1 or numbers.count(-1) > 1:
        raise ValueError(f"a shape has no numbers below 0, but for one -1 at most; got {shown(value)}")


def reshaped(y: Any, shape: Any) -> Any:
    """The result of NumPy's `reshape` to `shape`. Raises ValueError if that has another number below 0 than one -1."""
    if type(shape) is not tuple or y.shape != shape:
        expect_shape(shape)
    return y


def fitting(name: str, value: Any, dtype: np.dtype[Any]) -> Any:
    """`value` as an array, where all its numbers fit `dtype`, or are of another kind.

    Raises ValueError if a finite number overflows in a floating-point dtype, OverflowError if an integer does not fit.
    """
    array = value if hasattr(value, "dtype") else np.asarray(value)
    own = array.dtype if isinstance(array, np.ndarray | np.generic) else dtype
    if np.can_cast(own, dtype) or not (is_real(own) and np.can_cast(own, dtype, "same_kind")):
        return array
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    if dtype.kind == "f" and (np.isfinite(array) & ~np.isfinite(cast)).any():
        raise ValueError(f"{name} ({own} {array.shape}): a number overflows in {dtype}")
    if dtype.kind in "iu" and (cast != array).any():
        raise OverflowError(f"{name} ({own} {array.shape}): {dtype} cannot hold a number")
    return array


def expect_axis(name: str, x: Any, axis: Any) -> None:
    """Raise TypeError unless `axis` is an integer, a tuple of them, or None; IndexError unless x has these axes."""
    axes = () if axis is None else checked_axis(name, axis)
    ndim = max(x.ndim, 1)  # 0-d counts as one element
    if any(not -ndim <= a < ndim for a in (axes if isinstance(axes, tuple) else (axes,))):
        raise IndexError(f"{name}(): x {x.shape} has no axis {shown(axis)}")


def expect_declaration(
    function: Callable[..., Any], operands: int, rules: int, declared: Callable[..., Any] | None
) -> None:
    """Raise ValueError unless `function` can be an op: its name an identifier, its rules one for each operand, or none.

    `declared` is the function of an earlier op of that name. It is replaced if `function` is the same code, run again.
    """
    name = function.__name__
    if declared and not _runs_again(function, earlier := unwrap(declared)):
        file, line = _place(earlier)
        raise ValueError(f"an op named {name!r} already exists: {file}, line {line}, declares it; choose another name")
    if not name.isidentifier():
        raise ValueError(f"the name of an op has to be an identifier; {name!r} is not")
    if rules and rules != operands:
        raise ValueError(f"{name!r} has {operands} operands and {rules} rules; give None for no gradient")


def _place(function: Any) -> tuple[str, int]:
    """The file and line that define a function; its module and 0 if it was not written in Python."""
    code = getattr(function, "__code__", None)
    return (code.co_filename, code.co_firstlineno) if code else (function.__module__, 0)


def _runs_again(function: Any, earlier: Any) -> bool:
    """Whether the code of `earlier` ran again and made `function`: an edited notebook cell, or a reloaded module."""
    name, module = function.__qualname__, function.__module__
    if function is earlier or name != earlier.__qualname__:
        return False
    if module == earlier.__module__ and (module == "__main__" or _place(function)[0].startswith("<")):
        return True
    # The module may have two names, as a script that is imported too. One function may make several ops.
    return _place(function) == _place(earlier) and "<locals>" not in name


def holds_numbers(x: object) -> bool:
    """Whether x may be an operand: a number, or a tensor, an array or a list of them."""
    return hasattr(x, "dtype") or isinstance(x, int | float | list | tuple)


def is_array(x: object) -> bool:
    """Whether x is a tensor of ours, or an array or a scalar with a dtype of NumPy."""
    return isinstance(getattr(x, "dtype", None), np.dtype)


def is_real(dtype: Any) -> bool:
    """Whether numbers of this dtype may be computed with: not complex ones, objects, texts, dates or long doubles."""
    return dtype.char in REAL


def is_floating(x: Any) -> bool:
    """Whether x is a tensor or an array of floating-point numbers."""
    return is_array(x) and x.dtype.kind == "f"


def expect_leaf(x: Any) -> None:
    """Raise RuntimeError if an op computed the tensor x: a copy of its graph would lead to other leaves."""
    if not x.is_leaf:
        raise RuntimeError(
            f"only leaf tensors can be copied or pickled; this result of {x.node.op.name!r} has a graph behind it: "
            "copy its detach()"
        )


def expect_array(x: Any, caller: str) -> None:
    """Raise TypeError unless x is a tensor or an array of real numbers or booleans."""
    dtype = getattr(x, "dtype", None)
    if not isinstance(dtype, np.dtype):
        cure = ": make a Tensor of it" if isinstance(x, list | tuple | int | float) else ""
        raise TypeError(f"{caller} takes a tensor or an array; got {full_name(x)}{cure}")
    if dtype.char not in REAL:
        raise TypeError(f"{caller} takes real numbers; got an array of dtype {dtype}")


def full_name(x: object) -> str:
    """What x is, for an error: "a list", "a torch.Tensor"."""
    kind = type(x)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def expect_floats(x: Any, caller: str) -> None:
    """Raise TypeError unless x is a tensor or an array of floating-point numbers."""
    expect_array(x, caller)
    if x.dtype.kind != "f":
        raise TypeError(f"{caller} takes floating-point input; got {x.dtype}")


def at_least_single(dtype: Any) -> np.dtype[Any]:
    """The dtype to compute in where float64 is not needed: half precision could hold neither sums nor small factors."""
    return np.result_type(dtype, np.float32)


def each_axis(value: Any, ndim: int, name: str, least: int) -> tuple[int, ...]:
    """One number for each axis. Raises ValueError unless `value` is one number, or one for each axis."""
    if type(value) is int and least <= value <= LARGEST:
        return (value,) * ndim  # the usual case, fast
    several = isinstance(value, tuple | list) or (isinstance(value, np.ndarray) and value.ndim > 0)
    each = tuple(map(_scalar, value if several else (value,) * ndim))
    whole = all(type(v) is int for v in each)
    if len(each) != ndim or not whole or min(each, default=least) < least:
        others = f", or {ndim} of them" if ndim > 1 else ""
        raise ValueError(f"{name} has to be an integer of at least {least}{others}; got {shown(value)}")
    if max(each, default=0) > LARGEST:
        raise ValueError(f"{name} may be at most 2**60; got {shown(value)}")
    return each


def expect_fits_memory(name: str, shape: Sequence[int]) -> None:
    """Raise MemoryError if an array of this shape has so many elements that its bytes cannot be numbered."""
    if math.prod(shape) > LARGEST // 2:  # of up to 8 bytes, in an int64
        raise MemoryError(f"{name} would have the shape {tuple(shape)}, which is more than any memory holds")


def expect_flags(**flags: Any) -> None:
    """Raise TypeError unless each is True or False."""
    for name, value in flags.items():
        flag(name, value)


def flag(name: str, value: Any) -> bool:
    """`value` as a bool. Raises TypeError unless it is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} has to be True or False; got {shown(value)}")
    return bool(value)


def expect_text(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is a str."""
    if not isinstance(value, str):
        raise TypeError(f"{name} has to be a text; got {shown(value)}")


def as_dtype(name: str, dtype: Any) -> np.dtype[Any]:
    """NumPy's dtype of what may name one, such as "float32". Raises TypeError for what does not."""
    try:
        if dtype is not None and not hasattr(dtype, "_data"):
            return np.dtype(dtype)
    except (TypeError, ValueError):
        pass
    raise TypeError(f"{name} has to be a dtype, such as numpy.float32 or 'float32'; got {shown(dtype)}")


def floating_dtype(name: str, dtype: Any) -> np.dtype[Any]:
    """The dtype. Raises TypeError unless it is one of floating-point numbers of at most 64 bits."""
    found = as_dtype(name, dtype)
    if found.kind != "f" or not is_real(found):
        raise TypeError(f"{name} has to be floating-point, of at most 64 bits; got {found}")
    return found


def shown(value: Any) -> str:
    """`value` for an error, shortened."""
    try:
        text = repr(value)
    except Exception:  # integers of more than 4,300 digits have no text
        text = full_name(value)
    return text if len(text) <= 200 else f"{text[:150]} … {text[-20:]}"


def all_or_none(names: str, *values: Any) -> None:
    """Raise ValueError if some of the values are None and others are not."""
    if len({v is None for v in values}) > 1:
        raise ValueError(f"{names} go together: give all of them, or none")


def expect_several(x: Any, parts: int, what: str) -> None:
    """Raise ValueError if x has one value for each of its parts, such as channels: it would become 0."""
    if x.size and x.size == parts:
        raise ValueError(f"normalisation needs more than one value per {what}; got shape {x.shape}")


def expect_channels(x: Any, **vectors: Any) -> None:
    """Raise TypeError unless x is floating-point; ValueError unless it is (N, C, ...), and each vector (C,) or None."""
    expect_floats(x, "normalisation")
    expect_vectors(x, **vectors)


def expect_vectors(x: Any, **vectors: Any) -> None:
    """Raise ValueError unless x is (N, C, ...), and each vector (C,) or None."""
    if x.ndim < 2:
        raise ValueError(f"x to normalise has to be of shape (N, C, ...); got {x.shape}")
    for name, v in vectors.items():
        if hasattr(v, "dtype"):
            expect_array(v, name)
        shape = v.shape if hasattr(v, "shape") else np.shape(v)
        if v is not None and shape != x.shape[1:2]:
            raise ValueError(
                f"{name} has to be one number for each of {x.shape[1]} channels of x {x.shape}; got shape {shape}"
            )


def expect_eps(eps: float, zero: bool = True) -> float:
    """`eps`. Raise TypeError unless eps is a number, ValueError if it is negative, not finite, or 0 without `zero`."""
    eps = expect_number("eps", eps, 0)
    if not (eps or zero):
        raise ValueError("eps has to be greater than 0")
    return eps


def expect_integer(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> int:
    """`value` as an int. Raises TypeError unless it is an integer, ValueError if it is not in [least, most]."""
    if type(value) is int and least <= value <= most:
        return value  # the usual case, fast
    number = _scalar(value)
    if type(number) is not int:
        raise TypeError(f"{name} has to be an integer; got {shown(value)}")
    if number < least:
        raise ValueError(f"{name} has to be at least {least}; got {shown(value)}")
    if number > most:
        raise ValueError(f"{name} may be at most {most}; got {shown(value)}")
    return number


def expect_size(name: str, value: Any) -> int:
    """`value`, a number of channels or features, as an int. Raises TypeError or ValueError unless it is 1 … 2**60."""
    return expect_integer(name, value, 1, LARGEST)


def expect_number(
    name: str, value: Any, least: float = -math.inf, most: float = math.inf, *, finite: bool = True
) -> Any:
    """`value` as a number of Python.

    Raises TypeError unless it is a number, ValueError if it is NaN, infinite, not in [least, most], or an integer that
    a float64 cannot hold.
    """
    if type(value) is float and least <= value <= most and -math.inf < value < math.inf:
        return value  # the usual case, fast
    number = python_number(name, value)
    within = least <= number <= most  # NaN is not
    if not within and least > -math.inf:
        wanted = f"{least:g} or more" if most == math.inf else f"in [{least:g}, {most:g}]"
        raise ValueError(f"{name} has to be {wanted}; got {shown(value)}")
    if isinstance(number, int) and abs(number) > LARGEST_FLOAT:
        raise ValueError(f"{name} is an integer too large for a float: {shown(value)}")
    if not within or (finite and not math.isfinite(number)):
        raise ValueError(f"{name} has to be {'finite' if finite else 'a number'}; got {value}")
    return number


def _ranged(least: float, most: float) -> Callable[[str, Any], Any]:
    return lambda name, value: expect_number(name, value, least, most)


def expect_reduction(name: str, value: Any) -> Any:
    """`value`. Raises ValueError unless it is a reduction of losses."""
    if not isinstance(value, str) or value not in ("mean", "sum", "none"):
        raise ValueError(f"{name} is one of 'mean', 'sum' and 'none'; got {shown(value)}")
    return value


def expect_int64(name: str, value: Any) -> int:
    """`value` as an int. Raises TypeError unless it is an integer, ValueError unless it is an int64."""
    return expect_integer(name, value, INT64.min, INT64.max)


# Options of ops that have a range, by name. A kernel would not ask.
RANGED: dict[str, Callable[[str, Any], Any]] = {
    "eps": _ranged(0, math.inf), "p": _ranged(0, 1), "smoothing": _ranged(0, 1),
    "correction": _ranged(-math.inf, math.inf), "ignore_index": expect_int64, "reduction": expect_reduction,
}  # fmt: skip

# The options of BatchNorm, each with its check.
BATCH_NORM: Mapping[str, Callable[[str, Any], Any]] = {
    "num_features": expect_size,
    "eps": lambda _, value: expect_eps(value, zero=False),
    "momentum": lambda name, value: None if value is None else expect_number(name, value, 0, 1),
    "virtual_batch_size": lambda name, value: None if value is None else expect_integer(name, value, 1),
    "running_var_correction": lambda name, value: expect_integer(name, value, 0, 1),
    "stats_frozen": flag,
    "training": flag,
}
