"""The seam below the chain rule: every array operation of the framework goes through this module.

`forward` runs an op and `vjp` its gradients: by the kernel of the arrays' device if there is one, by NumPy otherwise.
Call them as `backend.forward(…)`, so that an observer can replace them here.

On "cpu" an array is NumPy's. On "cuda" it is a `DeviceArray` of `tinygrad_bn_kernels.cuda`, with the same arithmetic.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Collection, Sequence
from functools import wraps
from threading import RLock
from typing import Any, NoReturn, ParamSpec, TypeAlias, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray
from tinygrad_bn_kernels import ENABLED, RENEWED_IN_CHILDREN, note_declaration
from tinygrad_bn_kernels import lookup as find_kernel
from tinygrad_bn_kernels.cpu.memory import cache as memory
from tinygrad_bn_kernels.cpu.memory import empty, is_owner

from tinygrad_bn.arguments import (
    LARGEST,
    LARGEST_FLOAT,
    REAL,
    as_dtype,
    full_name,
    is_array,
    is_real,
    python_scalar,
    shown,
)
from tinygrad_bn.errors import in_words, misfit
from tinygrad_bn.modes import Mode

__all__ = [
    "Array", "as_array", "atomic", "device_of", "empty_cache", "expect_broadcast", "expect_one_place",
    "find_kernel", "forward", "full", "join", "kernels_disabled", "move", "note_declaration", "python_scalar",
    "to_numpy", "updating", "vjp",
]  # fmt: skip

Array: TypeAlias = NDArray[Any]
P = ParamSpec("P")
R = TypeVar("R")
Op: TypeAlias = Any  # a `tensor.Op`; this file imports nothing from above it
DEVICES = ("cpu", "cuda")
LARGEST_HALF = float(np.finfo(np.float16).max)
# Errors that `forward` explains with the op's operands.
REPORTED = (IndexError, ValueError, TypeError, AttributeError, OverflowError, MemoryError)


# ---- memory --------------------------------------------------------------------------------------------


def empty_cache() -> int:
    """Give memory of freed results, which is kept for later results, back to the system. Returns its bytes.

    That of a GPU stays in the pool of its driver.
    """
    return memory.release()


def _gave_memory(error: MemoryError) -> bool:
    """Whether the system got memory back, so that what failed may be tried again."""
    traceback.clear_frames(error.__traceback__)  # they hold arrays
    return empty_cache() > 0


def _again_with_freed_memory(function: Callable[P, R]) -> Callable[P, R]:
    """The function, called again after a MemoryError if memory was kept here."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except MemoryError as error:
            if not _gave_memory(error):
                raise
        return function(*args, **kwargs)

    return call


# ---- threads that share a model -------------------------------------------------------------------------

updating = RLock()  # held while a gradient or running statistics are read, changed and stored


def atomic(function: Callable[P, R]) -> Callable[P, R]:
    """The function, run by one thread at a time."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with updating:
            return function(*args, **kwargs)

    return call


def _renew_lock() -> None:
    """For a forked child."""
    global updating
    updating = RLock()


RENEWED_IN_CHILDREN.append(_renew_lock)


# ---- running an op --------------------------------------------------------------------------------------


def forward(op: Op, arrays: Sequence[Any], params: dict[str, Any], again: bool = False) -> tuple[Any, Sequence[Any]]:
    """The result of `op` and its by-products: from its kernel, or from the reference without one or if it declines."""
    kernel = _kernel(op.name, arrays)
    try:
        if op.saves and (kernel is None or not op.differentiable):  # the result would not show all wrong operands
            expect_numbers(op.name, arrays)
        result = NotImplemented if kernel is None else kernel(*arrays, **params)
        if result is NotImplemented:
            result = (_in_single(op.forward) if _rounds_half(op, arrays) else op.forward)(*arrays, **params)
    except Exception as error:
        if isinstance(error, MemoryError) and not again and not op.updates and _gave_memory(error):
            return forward(op, arrays, params, again=True)
        _explain(error, op, arrays, params)
    if type(result) is not np.ndarray and isinstance(result, np.generic):
        result = np.asarray(result)
    if type(result) is np.ndarray and not op.saves:
        return _promoted(op, result, arrays, params), ()
    y, saved = op.split(result)
    for a in (y, *saved):
        if type(a) is not np.ndarray and hasattr(a, "requires_grad"):  # `type` first, as it is faster
            expect_numbers(op.name, arrays)
            raise TypeError(f"{op.name} used a tensor that is not one of its operands: pass it as one")
    return _promoted(op, as_array(y), arrays, params), saved


def composition(op: Op, operands: Sequence[Any], params: dict[str, Any]) -> Any:
    """What the composition of a fused op gives; its errors are those of `forward`."""
    try:
        expect_numbers(op.name, operands)
        return op.forward(*operands, **params)
    except Exception as error:
        _explain(error, op, operands, params)


def _explain(error: Exception, op: Op, operands: Sequence[Any], params: dict[str, Any]) -> NoReturn:
    """Raise the error with the call in words, or a plainer one if an operand is wrong; any other kind as it is."""
    try:
        expect_one_place(operands)
        expect_numbers(op.name, operands)
    except (TypeError, ValueError) as plainer:
        raise plainer from error
    kind: Any = next((k for k in REPORTED if isinstance(error, k)), None)
    if kind is None:  # such as Numba's, for operands that are all right
        raise error
    kind, reason = in_words(error, kind, op.name, operands, params)
    described = kind(f"{describe(op, operands, params)}: {reason}")
    described.reason = reason
    raise described from error


def _promoted(op: Op, y: Any, arrays: Sequence[Any], params: dict[str, Any]) -> Any:
    """A floating-point result in the dtype of the widest floating-point operand; in float32 if there is none.

    NumPy's integers would make it wider. Numbers alone still give float64, and an op with the option `dtype` chooses.
    """
    own = y.dtype
    if arrays and getattr(arrays[0], "dtype", None) is own and not isinstance(arrays[0], np.generic):
        return y  # the usual case: `_kernel` looked at this dtype
    expect_numbers(op.name, arrays)
    plain = [python_scalar(a) for a in arrays]  # NumPy's scalars, and subclasses of int and float, as numbers
    dtypes = [a.dtype for a in plain if hasattr(a, "dtype")]
    if dtypes and not op.updates and any(p is not a for p, a in zip(plain, arrays, strict=True)):
        return forward(op, plain, params)[0]
    if own.char not in REAL:  # of integers beyond int64, or of None
        raise TypeError(f"{describe(op, arrays, params)}: the result would be of dtype {own}")
    if own.kind in "iu" and (words := misfit(own, arrays)):  # NumPy's `where` would wrap it
        raise OverflowError(f"{describe(op, arrays, params)}: {words}")
    if own.kind != "f":
        return y
    dtypes = dtypes or [a.dtype for a in arrays if hasattr(a, "dtype")]
    floating = [d for d in dtypes if d.kind == "f"]
    numbers = dtypes and any(isinstance(a, int | float) for a in plain)  # as of `where`: its condition is an array
    if (len(floating) == len(dtypes) and not numbers) or own in dtypes or "dtype" in params:
        return y
    widest = max(floating, key=lambda d: d.itemsize, default=np.dtype(np.float32))
    if own.itemsize < widest.itemsize and not op.fused:  # NumPy takes int8 to float16
        return forward(op, [a.astype(widest) if hasattr(a, "dtype") else a for a in arrays], params)[0]
    return y.astype(widest) if own.itemsize > widest.itemsize else y


@_again_with_freed_memory
def vjp(
    op: Op,
    g: Any,
    y: Any,
    arrays: Sequence[Any],
    params: dict[str, Any],
    needs: Sequence[bool],
    saved: Sequence[Any],
) -> Any:
    """The gradient of each operand as an array, None where `needs` is False.

    NotImplemented for a fused op without a kernel: the engine then differentiates its composition.
    """
    kernel = _kernel(op.vjp, arrays)
    if kernel is not None:
        by_products = dict(zip(op.saves, saved, strict=True)) if saved else {}
        gxs = kernel(g, y, *arrays, needs=needs, **params, **by_products)
        if gxs is not NotImplemented:
            if not isinstance(gxs, tuple | list) or len(gxs) != len(needs):
                got = f"{len(gxs)} gradients" if isinstance(gxs, tuple | list) else f"a {type(gxs).__name__}"
                raise TypeError(f"the kernel {op.vjp!r} returned {got}; its op has {len(needs)} operands")
            return [gx if need else None for gx, need in zip(gxs, needs, strict=True)]
    return NotImplemented if op.fused else pull(op, g, y, arrays, needs, params)


def pull(op: Op, g: Any, y: Any, xs: Sequence[Any], needs: Sequence[bool], params: dict[str, Any]) -> list[Any]:
    """The gradients by the op's rules, of arrays or tensors. Half precision in float32: the engine rounds them."""
    if g.dtype.char == "e" and not op.exact:
        g, y, *xs = (_single(x) for x in (g, y, *xs))
    gxs: list[Any] = op.pull(g, y, xs, needs, params)
    return gxs


def _single(x: Any) -> Any:
    """A tensor or an array of half precision in float32, anything else as it is."""
    return x.astype(np.float32) if hasattr(x, "dtype") and x.dtype.char == "e" else x


def _in_single(reference: Callable[..., Any]) -> Callable[..., Any]:
    """The reference of an op, computed in float32 and rounded to half precision once."""

    def compute(*arrays: Any, **params: Any) -> Any:
        y = np.asarray(reference(*map(_single, arrays), **params))
        return y.astype(np.float16) if y.dtype.char == "f" else y

    return compute


def _rounds_half(op: Op, arrays: Sequence[Any]) -> bool:
    """Whether the reference of `op` would round half precision on the way: a number, or between steps.

    A comparison rounds the number, so that a half 0.1 equals 0.1, unless it would become infinite.
    """
    floating = {a.dtype.char for a in arrays if hasattr(a, "dtype") and a.dtype.kind == "f"}
    if op.fused or floating != {"e"}:
        return False
    numbers = [a for a in arrays if type(a) in (int, float)]
    if not op.differentiable:
        return any(abs(n) > LARGEST_HALF for n in numbers)
    return bool(numbers) or not op.exact


def kernels_disabled() -> Mode:
    """In this block and thread, ops on the CPU run their NumPy reference and differentiate their composition."""
    return Mode(ENABLED, False)


def _kernel(name: str, arrays: Sequence[Any]) -> Any:
    """The kernel for these operands, or None. Numbers and foreign byte orders are left to NumPy."""
    first = arrays[0] if arrays else None
    if isinstance(first, np.ndarray):
        if first.dtype.char not in REAL:
            expect_numbers(name, arrays)
        return find_kernel(name, "cpu") if first.dtype.isnative else None
    for other in arrays:
        if type(other) is not np.ndarray and (device := device_of(other)) != "cpu":
            return find_kernel(name, device)
    if isinstance(first, np.generic):  # its dtype may be that of the result
        expect_numbers(name, arrays)
    return None


def describe(op: Op, operands: Sequence[Any], params: dict[str, Any]) -> str:
    """A call in words: `sum(float32 (3, 4), axis=5)`."""
    words = [*map(described, operands), *(f"{k}={shown(v)}" for k, v in params.items())]
    return f"{op.name}({', '.join(words)})"


def described(operand: Any) -> str:
    """An operand in words: `float32 (3, 4)`."""
    if not hasattr(operand, "dtype"):
        return shown(operand)
    return f"{place(operand)} {operand.dtype} {operand.shape}".lstrip()


# ---- arrays ---------------------------------------------------------------------------------------------


@_again_with_freed_memory
def new_array(data: Any, dtype: DTypeLike | None = None) -> Any:
    """A copy of `data` as an array: NumPy's dtype for typed data; float32 for Python floats, int64 for integers.

    Raises TypeError unless the data are real numbers.
    """
    if device_of(data) != "cpu":
        return data.astype(dtype or data.dtype)
    if isinstance(data, np.ma.MaskedArray):
        raise TypeError("a tensor has no mask; give masked.filled(value)")
    typed = isinstance(data, np.ndarray | np.generic) or hasattr(data, "__array__")
    try:
        array = np.asarray(data)
    except (ValueError, TypeError) as error:
        raise type(error)(f"a Tensor is made of real numbers, in lists of equal lengths; got {shown(data)}") from error
    large = array.dtype == object and all(type(v) in (int, float) for v in array.flat)  # integers beyond 64 bits
    if array.dtype.kind not in "fiub" and not (large and dtype is not None):
        raise TypeError(_no_numbers(data, array))
    dtype = None if dtype is None else as_dtype("dtype", dtype)
    try:
        array = np.array(array if typed else data, dtype)  # not `astype`, which would wrap integers that do not fit
    except (OverflowError, ValueError) as error:
        raise type(error)(f"the dtype {dtype} of a Tensor cannot hold all of {shown(data)}") from error
    if array.dtype.char not in REAL:
        raise TypeError(_no_numbers(data, array))
    if not typed and dtype is None and array.dtype == np.float64:
        return array.astype(np.float32)
    return array


def _no_numbers(data: Any, array: Array) -> str:
    got = f"an array of dtype {array.dtype}" if hasattr(data, "dtype") else shown(data)
    return f"a Tensor is made of real numbers of at most 64 bits; got {got}"


@_again_with_freed_memory
def new_values(value: Any, old: Any) -> Any:
    """A copy of `value` to replace the array `old`: on its device, in its dtype; the shape has to be the same."""
    given = as_array(value)
    if not is_real(given.dtype):
        raise TypeError(f"{given.dtype} data do not fit a tensor of dtype {old.dtype}")
    if device_of(given) != "cpu":
        expect_one_place((old, given))
    if not np.can_cast(given.dtype, old.dtype, "same_kind"):
        raise TypeError(f"{given.dtype} data do not fit a tensor of dtype {old.dtype}")
    new = move(given, device_of(old)).astype(old.dtype)  # a copy in any case
    if new.shape != old.shape:
        raise ValueError(f"data of shape {new.shape} do not fit a tensor of shape {old.shape}")
    return new


def as_array(value: Any) -> Any:
    """An array of any device as it is; anything else as a NumPy array."""
    return value if type(value) is np.ndarray or device_of(value) != "cpu" else np.asarray(value)


@_again_with_freed_memory
def full(like: Any, value: float, dtype: DTypeLike | None = None) -> Any:
    """An array full of one value, with the shape, device and, by default, dtype of the array `like`."""
    dtype = like.dtype if dtype is None else dtype
    if device_of(like) == "cpu":
        return np.full(like.shape, value, dtype)
    return device_arrays().full(like.shape, value, dtype)


@_again_with_freed_memory
def join(arrays: Sequence[Any]) -> Any:
    """The elements of arrays of one device, one after the other, on one axis."""
    if device_of(arrays[0]) == "cpu":
        out = empty((arrays[0].size,), arrays[0].dtype) if len(arrays) == 1 else None  # from memory that was freed
        return np.concatenate(arrays, axis=None, out=out)
    return find_kernel("concatenate", "cuda")(*[a.reshape(-1) for a in arrays], axis=0)  # type: ignore[misc]


def read_only(array: Any) -> Any:
    """A read-only view of a NumPy array; an array of another device as it is."""
    if device_of(array) != "cpu":
        return array
    view = array.view()
    view.flags.writeable = False
    return view


def numpy_view(array: Any) -> Array:
    """The values as a NumPy array: a read-only view, or a copy of an array of another device."""
    return read_only(array) if device_of(array) == "cpu" else array.numpy()


def converted(array: Any, dtype: DTypeLike | None, copy: bool | None) -> Array:
    """The values as NumPy's `__array__` gives them. TypeError on another device, ValueError if a copy is forbidden."""
    if device := place(array):
        raise TypeError(f"this tensor lives on {device}: copy it with .numpy(), or move it with .to('cpu')")
    converts = dtype is not None and np.dtype(dtype) != array.dtype
    if converts and copy is False:
        raise ValueError(f"{array.dtype} cannot be given as {np.dtype(dtype)} without a copy")
    return np.array(array, dtype=dtype) if copy or converts else read_only(array)


def index_copy(part: Any, indexed: Any) -> Any:
    """Part of an index of `indexed`: lists and NumPy's arrays copied, as they may change before the backward pass."""
    if not isinstance(part, np.ndarray | list | tuple):
        if device_of(part) != "cpu":
            expect_one_place((indexed, part))
        return part
    array = np.array(part)
    return array if array.size or isinstance(part, np.ndarray) else array.astype(np.intp)  # NumPy makes [] a float


@_again_with_freed_memory
def to_numpy(array: Any) -> Any:
    """A copy as a NumPy array, from any device; of a tensor too."""
    return np.array(np.asarray(array)) if device_of(array) == "cpu" else array.numpy()


def owns_memory(array: Any) -> bool:
    """Whether no other array shares the memory of `array`."""
    return is_owner(array) if type(array) is np.ndarray else array.base is None


# ---- devices --------------------------------------------------------------------------------------------


def device_of(array: object) -> str:
    """The name of the device that holds `array`; NumPy's arrays and Python's numbers live on "cpu"."""
    if type(array) is np.ndarray:
        return "cpu"  # the usual case: twice as fast as the attribute
    device = getattr(array, "device", "cpu")
    return device if type(device) is str else "cpu"  # arrays of other libraries have objects there


def place(array: object) -> str:
    """The device of `array` for a text: "" for "cpu"."""
    device = device_of(array)
    return "" if device == "cpu" else device


def expect_broadcast(shape: Sequence[int], wide: Sequence[int]) -> None:
    """Raise ValueError unless `wide`, a gradient's shape, can be summed down to the `shape` of its operand."""
    lead = len(wide) - len(shape)
    if lead < 0 or any(n not in (1, m) for n, m in zip(shape, wide[lead:], strict=True)):
        raise ValueError(f"the gradient of an operand of shape {tuple(shape)} came out as {tuple(wide)}")


def expect_one_place(operands: Collection[object]) -> None:
    """Raise TypeError if arrays live on different devices: nothing is copied between devices without being asked."""
    for o in operands:
        if type(o) is not np.ndarray:
            break
    else:
        return  # the usual case
    devices = {device_of(o) for o in operands if hasattr(o, "dtype")}
    if len(devices) > 1:
        raise TypeError(f"operands live on different devices, {' and '.join(sorted(devices))}; move one with .to()")


def expect_numbers(name: str, operands: Sequence[Any]) -> None:
    """Raise TypeError unless the operands of the op `name` are real numbers, booleans or arrays of them.

    All but the first may be None. An integer that a float64 cannot hold is a ValueError.
    """
    for o in operands:
        kind = type(o)
        if kind is np.ndarray and o.dtype.char in REAL:
            continue  # the usual case, fast
        if o is None or kind is float or (kind is int and -LARGEST < o < LARGEST):
            continue
        if is_array(o):
            if not is_real(o.dtype):
                raise TypeError(f"{name} takes real numbers; got an array of dtype {o.dtype}")
        elif not isinstance(o, int | float):
            cure = ": make a Tensor of it" if hasattr(o, "__array__") else ""
            raise TypeError(f"{name} takes tensors, arrays or numbers; got {full_name(o)}{cure}")
        elif isinstance(o, int) and abs(o) > LARGEST_FLOAT:
            raise ValueError(f"{name} takes numbers that fit a float64; got {shown(o)}")
    if operands and operands[0] is None:
        raise TypeError(f"{name}(None{', …' * (len(operands) > 1)}): an operand is None")


def move(array: Any, device: str) -> Any:
    """The array on `device`: itself if it is there, else a copy.

    Raises ValueError for an unknown name, TypeError for a dtype that the device does not take, and RuntimeError if
    there is no such device, naming the missing package or driver.
    """
    if not isinstance(device, str) or device not in DEVICES:
        one = '; "cuda" is one GPU, the first' if shown(device).startswith("'cuda") else ""
        raise ValueError(f"there is no device {shown(device)}; there are {' and '.join(map(repr, DEVICES))}{one}")
    if device_of(array) == device:
        return array
    return array.numpy() if device == "cpu" else device_arrays().DeviceArray.from_numpy(np.asarray(array))


def device_arrays() -> Any:
    """The module of arrays on cuda, imported when first needed. Raises RuntimeError if there is no such device."""
    from tinygrad_bn_kernels.cuda import available

    return available.device_arrays()
