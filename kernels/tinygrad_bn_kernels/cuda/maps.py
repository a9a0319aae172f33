"""Elementwise functions: the programs for all layouts, each made from a function of `scalars`.

Arrays of one shape are flat loops, with 128-bit accesses for floats; Python numbers are arguments of the program.
Broadcast operands are loops over rows. Types are promoted as in NumPy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from tinygrad_bn_kernels import kernel
from tinygrad_bn_kernels.cuda.array import DeviceArray, vectorizable
from tinygrad_bn_kernels.cuda.launch import PROGRAMS, blocks, launch, program, u4
from tinygrad_bn_kernels.cuda.scalars import FLOAT, SAME, TRUTH, Scalar
from tinygrad_bn_kernels.cuda.shim import cuda, device, load4, store4, uint32
from tinygrad_bn_kernels.cuda.strides import broadcast, contiguous, row_block, walks

# ---- programs --------------------------------------------------------------------------------------------
# A layout has a letter for each operand: a for an array, n for a number.


def _flat_a(f: Scalar) -> Scalar:
    def flat(a, out, n):
        i = uint32(cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x)
        while i < n:
            out[i] = f(a[i])
            i = uint32(i + cuda.gridDim.x * cuda.blockDim.x)

    return flat


def _flat_aa(f: Scalar) -> Scalar:
    def flat(a, b, out, n):
        i = uint32(cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x)
        while i < n:
            out[i] = f(a[i], b[i])
            i = uint32(i + cuda.gridDim.x * cuda.blockDim.x)

    return flat


def _flat_an(f: Scalar) -> Scalar:
    def flat(a, b, out, n):
        i = uint32(cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x)
        while i < n:
            out[i] = f(a[i], b)
            i = uint32(i + cuda.gridDim.x * cuda.blockDim.x)

    return flat


def _flat_ann(f: Scalar) -> Scalar:
    def flat(a, b, c, out, n):
        i = uint32(cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x)
        while i < n:
            out[i] = f(a[i], b, c)
            i = uint32(i + cuda.gridDim.x * cuda.blockDim.x)

    return flat


# The vector programs end with the last n % 4 elements, one for each of the first threads.


def _vector_a(f: Scalar) -> Scalar:
    def flat(a, out, n):
        first = uint32(cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x)
        whole = uint32(n & uint32(0xFFFFFFFC))
        i = uint32(first << uint32(2))
        while i < whole:
            a0, a1, a2, a3 = load4(a, i)
            store4(out, i, (f(a0), f(a1), f(a2), f(a3)))
            i = uint32(i + ((cuda.gridDim.x * cuda.blockDim.x) << uint32(2)))
        i = uint32(whole + first)
        if i < n:
            out[i] = f(a[i])

    return flat


def _vector_aa(f: Scalar) -> Scalar:
    def flat(a, b, out, n):
        first = uint32(cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x)
        whole = uint32(n & uint32(0xFFFFFFFC))
        i = uint32(first << uint32(2))
        while i < whole:
            a0, a1, a2, a3 = load4(a, i)
            b0, b1, b2, b3 = load4(b, i)
            store4(out, i, (f(a0, b0), f(a1, b1), f(a2, b2), f(a3, b3)))
            i = uint32(i + ((cuda.gridDim.x * cuda.blockDim.x) << uint32(2)))
        i = uint32(whole + first)
        if i < n:
            out[i] = f(a[i], b[i])

    return flat


def _vector_an(f: Scalar) -> Scalar:
    def flat(a, b, out, n):
        first = uint32(cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x)
        whole = uint32(n & uint32(0xFFFFFFFC))
        i = uint32(first << uint32(2))
        while i < whole:
            a0, a1, a2, a3 = load4(a, i)
            store4(out, i, (f(a0, b), f(a1, b), f(a2, b), f(a3, b)))
            i = uint32(i + ((cuda.gridDim.x * cuda.blockDim.x) << uint32(2)))
        i = uint32(whole + first)
        if i < n:
            out[i] = f(a[i], b)

    return flat


def _rows_aa(f: Scalar) -> Scalar:
    def rows(a, b, out, count, n1, n2, n3, a0, a1, a2, a3, b0, b1, b2, b3):
        row = uint32(cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y)
        while row < count:
            outer = uint32(row // n2)
            i2 = uint32(row - outer * n2)
            i0 = uint32(outer // n1)
            i1 = uint32(outer - i0 * n1)
            i = uint32(i0 * a0 + i1 * a1 + i2 * a2)
            j = uint32(i0 * b0 + i1 * b1 + i2 * b2)
            k = uint32(cuda.threadIdx.x)
            while k < n3:
                out[uint32(row * n3 + k)] = f(a[uint32(i + k * a3)], b[uint32(j + k * b3)])
                k = uint32(k + cuda.blockDim.x)
            row = uint32(row + cuda.gridDim.x * cuda.blockDim.y)

    return rows


def _flat_where(layout: str) -> Callable[[Any], Scalar]:
    def build(T: Any) -> Scalar:
        def both(condition, a, b, out, n):
            i = uint32(cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x)
            while i < n:
                out[i] = a[i] if condition[i] else b[i]
                i = uint32(i + cuda.gridDim.x * cuda.blockDim.x)

        def first(condition, a, b, out, n):
            i = uint32(cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x)
            while i < n:
                out[i] = a[i] if condition[i] else b
                i = uint32(i + cuda.gridDim.x * cuda.blockDim.x)

        def second(condition, a, b, out, n):
            i = uint32(cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x)
            while i < n:
                out[i] = a if condition[i] else b[i]
                i = uint32(i + cuda.gridDim.x * cuda.blockDim.x)

        return {"aa": both, "an": first, "na": second}[layout]

    return build


def _where(kind: Any) -> Scalar:
    def rows(condition, a, b, out, count, n1, n2, n3, c0, c1, c2, c3, a0, a1, a2, a3, b0, b1, b2, b3):
        row = uint32(cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y)
        while row < count:
            outer = uint32(row // n2)
            i2 = uint32(row - outer * n2)
            i0 = uint32(outer // n1)
            i1 = uint32(outer - i0 * n1)
            h = uint32(i0 * c0 + i1 * c1 + i2 * c2)
            i = uint32(i0 * a0 + i1 * a1 + i2 * a2)
            j = uint32(i0 * b0 + i1 * b1 + i2 * b2)
            k = uint32(cuda.threadIdx.x)
            while k < n3:
                chosen = condition[uint32(h + k * c3)]
                out[uint32(row * n3 + k)] = a[uint32(i + k * a3)] if chosen else b[uint32(j + k * b3)]
                k = uint32(k + cuda.blockDim.x)
            row = uint32(row + cuda.gridDim.x * cuda.blockDim.y)

    return rows


_FLAT = {"a": _flat_a, "aa": _flat_aa, "an": _flat_an, "ann": _flat_ann}
_VECTOR = {"a": _vector_a, "aa": _vector_aa, "an": _vector_an}
_SIGNATURES = {"a": "{0}* {1}* u4", "aa": "{0}* {0}* {1}* u4", "an": "{0}* {0} {1}* u4", "ann": "{0}* {0} {0} {1}* u4"}
_STEPS = "u4 u4 u4 u4"


def _swapped(define: Callable[[Any], Scalar]) -> Callable[[Any], Scalar]:
    """The function with its operands exchanged, for a number as the first operand."""

    def swapped(T: Any) -> Scalar:
        f = device(define(T))
        return lambda b, a: f(a, b)

    return swapped


REGISTERS = {"gelu_vjp": 48}  # for erfc in float64


def _declare(name: str, define: Callable[[Any], Scalar], layout: str, result: str) -> None:
    """Register the programs of one function and layout: `add.aa`, `add.aa4` and `add.rows`, for example."""
    signature, registers = _SIGNATURES[layout].format("f4", result), REGISTERS.get(name, 40)
    program(f"{name}.{layout}", signature, registers=registers)(lambda T: _FLAT[layout](device(define(T))))
    if result == "f4" and layout in _VECTOR:
        program(f"{name}.{layout}4", signature, vector=True, registers=registers)(
            lambda T: _VECTOR[layout](device(define(T)))
        )
    if layout == "aa":
        steps = f"f4* f4* {result}* {_STEPS} {_STEPS} {_STEPS}"
        program(f"{name}.rows", steps, block=(32, 8), registers=registers)(lambda T: _rows_aa(device(define(T))))


for _name, _define in {**SAME, **FLOAT, **TRUTH}.items():
    _count = len(_define(np.float32).__code__.co_varnames[: _define(np.float32).__code__.co_argcount])
    for _layout in {1: ("a",), 2: ("aa", "an"), 3: ("ann",)}[_count]:
        _declare(_name, _define, _layout, "b1" if _name in TRUTH else "f4")
for _name in ("sub", "div", "pow", "less", "less_equal"):
    _declare(f"r{_name}", _swapped({**SAME, **FLOAT, **TRUTH}[_name]), "an", "b1" if _name in TRUTH else "f4")

for _layout, _operands in (("aa", "f4* f4*"), ("an", "f4* f4"), ("na", "f4 f4*")):
    program(f"where.{_layout}", f"b1* {_operands} f4* u4")(_flat_where(_layout))
WHERE = program("where.rows", f"b1* f4* f4* f4* {_STEPS} {_STEPS} {_STEPS} {_STEPS}", block=(32, 8))(_where)


@program("fill", "f4* f4 u4")
def FILL(T: Any) -> Scalar:
    """Set every element to one value."""

    def fill(out, value, n):
        i = uint32(cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x)
        while i < n:
            out[i] = value
            i = uint32(i + cuda.gridDim.x * cuda.blockDim.x)

    return fill


# ---- running them ----------------------------------------------------------------------------------------


def _common_dtype(*operands: Any) -> np.dtype[Any]:
    """The common dtype of arrays and Python numbers, by NumPy's rules."""
    known = {o.dtype for o in operands if hasattr(o, "dtype")}
    if len(known) == 1 and (dtype := known.pop()).kind == "f":
        return dtype
    return np.result_type(*(o.dtype if hasattr(o, "dtype") else o for o in operands))


def _float_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return dtype if dtype.kind == "f" else np.dtype(np.float64)


def check(*operands: Any) -> None:
    """Raise TypeError unless every operand is an array on cuda or a number."""
    for o in operands:
        if not isinstance(o, DeviceArray | bool | int | float | np.generic):
            where = getattr(o, "device", type(o).__name__)
            raise TypeError(f"operands live on different devices, cuda and {where}; move one with .to()")


def same_dtype(*arrays: DeviceArray) -> list[DeviceArray]:
    """Arrays converted to their common dtype."""
    check(*arrays)
    dtype = np.result_type(*(a.dtype for a in arrays))
    return [a.astype(dtype, copy=False) for a in arrays]


def _as_operand(o: Any, dtype: np.dtype[Any]) -> Any:
    return o.astype(dtype, copy=False) if isinstance(o, DeviceArray) else dtype.type(o)


def run(name: str, *operands: Any, dtype: np.dtype[Any], result: DTypeLike) -> DeviceArray:
    """Apply the function `name` elementwise with broadcasting to arrays and numbers, computed in `dtype`."""
    check(*operands)
    args = [_as_operand(o, dtype) for o in operands]
    if len(args) == 2 and not isinstance(args[0], DeviceArray):  # the number is first
        name, args = f"r{name}" if f"r{name}.an" in PROGRAMS else name, args[::-1]
    layout = "".join("a" if isinstance(o, DeviceArray) else "n" for o in args)
    shapes = [o.shape for o in args if isinstance(o, DeviceArray)]
    out = DeviceArray(shapes[0] if len(set(shapes)) == 1 else np.broadcast_shapes(*shapes), result)
    if not out.size:
        return out
    if len(set(shapes)) == 1:
        arrays = [o for o in (*args, out) if isinstance(o, DeviceArray)]
        vector = f"{name}.{layout}4" in PROGRAMS and vectorizable(*arrays)
        which = PROGRAMS[f"{name}.{layout}{'4' * vector}"]
        launch(which, blocks(-(-out.size // 4) if vector else out.size), *args, out, *u4(out.size))
    else:
        steps = [broadcast(shape, out.shape) for shape in shapes]
        _by_rows(PROGRAMS[f"{name}.rows"], args, steps, out)
    return out


def _by_rows(which: Any, args: Sequence[DeviceArray], steps: Sequence[tuple[int, ...]], out: DeviceArray) -> None:
    all_steps = [*steps, contiguous(out.shape)]
    for walk in walks(out.shape, [0] * len(all_steps), all_steps):
        arrays = [a.view((a.size - s,), s) for a, s in zip((*args, out), walk.starts, strict=True)]
        flat = [s for step in walk.steps[:-1] for s in step]
        block = row_block(walk.shape[-1])
        launch(which, blocks(walk.rows, block[1]), *arrays, *u4(walk.rows, *walk.shape[1:], *flat), block=block)


def _same(name: str) -> Callable[..., DeviceArray]:
    def function(*operands: Any) -> DeviceArray:
        dtype = _common_dtype(*operands)
        return run(name, *operands, dtype=dtype, result=dtype)

    return function


def _float(name: str) -> Callable[..., DeviceArray]:
    def function(*operands: Any) -> DeviceArray:
        dtype = _float_dtype(_common_dtype(*operands))
        return run(name, *operands, dtype=dtype, result=dtype)

    return function


def _truth(name: str) -> Callable[..., DeviceArray]:
    def function(*operands: Any) -> DeviceArray:
        return run(name, *operands, dtype=_common_dtype(*operands), result=bool)

    return function


add, sub, mul, neg = (kernel(name, "cuda")(_same(name)) for name in ("add", "sub", "mul", "neg"))
for _name in ("abs", "sign", "relu", "maximum", "minimum"):
    kernel(_name, "cuda")(_same(_name))
div = kernel("div", "cuda")(_float("div"))
for _name in FLOAT.keys() - {"div"}:
    kernel(_name, "cuda")(_float(_name))
for _name in TRUTH:
    kernel(f"array.{_name}", "cuda")(_truth(_name))


@kernel("pow", "cuda")
def pow(a: Any, b: Any) -> DeviceArray:
    """aᵇ; for b = 2 a product, for b = 0.5 a square root."""
    if isinstance(a, DeviceArray) and isinstance(b, int | float):
        if b == 2:
            return mul(a, a)
        if b == 0.5:
            return _float("sqrt")(a)
    dtype = _common_dtype(a, b)
    return run("pow", a, b, dtype=dtype, result=dtype)


@kernel("clip", "cuda")
def clip(x: DeviceArray, *, min: float | None = None, max: float | None = None) -> Any:
    """x limited to [min, max]; None is no limit."""
    if min is None and max is None:
        raise ValueError("clip needs min, max, or both")
    dtype = _common_dtype(*(o for o in (x, min, max) if o is not None))
    least, most = (-np.inf, np.inf) if dtype.kind == "f" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    return run("clip", x, least if min is None else min, most if max is None else max, dtype=dtype, result=dtype)


@kernel("where", "cuda")
def where(condition: Any, a: Any, b: Any) -> DeviceArray:
    """a where the condition is true, b elsewhere, with broadcasting."""
    check(condition, a, b)
    dtype = _common_dtype(a, b)
    shapes = {o.shape for o in (condition, a, b) if isinstance(o, DeviceArray)}
    layout = "".join("a" if isinstance(o, DeviceArray) else "n" for o in (a, b))
    if isinstance(condition, DeviceArray) and len(shapes) == 1 and layout != "nn":
        out = DeviceArray(condition.shape, dtype)
        if out.size:
            args = condition.astype(bool, copy=False), _as_operand(a, dtype), _as_operand(b, dtype)
            launch(PROGRAMS[f"where.{layout}"], blocks(out.size), *args, out, *u4(out.size))
        return out
    arrays = [condition if isinstance(condition, DeviceArray) else _one(condition, bool)]
    arrays = [arrays[0].astype(bool, copy=False)]
    arrays += [_as_operand(o, dtype) if isinstance(o, DeviceArray) else _one(o, dtype) for o in (a, b)]
    out = DeviceArray(np.broadcast_shapes(*(o.shape for o in arrays)), dtype)
    if out.size:
        _by_rows(WHERE, arrays, [broadcast(o.shape, out.shape) for o in arrays], out)
    return out


def _one(value: Any, dtype: DTypeLike) -> DeviceArray:
    return fill(DeviceArray((), dtype), value)


@kernel("array.fill", "cuda")
def fill(out: DeviceArray, value: Any) -> DeviceArray:
    """Set every element of `out` to `value`, and return it."""
    if out.size:
        launch(FILL, blocks(out.size), out, out.number(value), *u4(out.size))
    return out


def vector_or(value: float, vector: DeviceArray | None, length: int, dtype: np.dtype[Any]) -> DeviceArray:
    """`vector` as `dtype`, or, if it is None, `length` elements of `value`."""
    return fill(DeviceArray((length,), dtype), value) if vector is None else vector.astype(dtype, copy=False)


@kernel("relu.vjp", "cuda")
def relu_vjp(g: DeviceArray, y: DeviceArray, x: DeviceArray, *, needs: list[bool]) -> tuple[DeviceArray]:
    """0 where the output is 0, g elsewhere."""
    return (run("relu_vjp", g, y, dtype=g.dtype, result=g.dtype),)


def _by_operand(name: str) -> Callable[..., tuple[DeviceArray]]:
    def vjp(g: DeviceArray, y: DeviceArray, x: DeviceArray, *, needs: list[bool]) -> tuple[DeviceArray]:
        return (run(name, g, x, dtype=x.dtype, result=x.dtype),)

    return vjp


for _name in ("silu", "gelu"):
    kernel(f"{_name}.vjp", "cuda")(_by_operand(f"{_name}_vjp"))


@kernel("astype", "cuda")
def astype(x: DeviceArray, *, dtype: DTypeLike) -> DeviceArray:
    """A copy, converted to `dtype`."""
    if np.dtype(dtype) == x.dtype:
        return x.copy()
    return run("identity", x, dtype=x.dtype, result=dtype)
