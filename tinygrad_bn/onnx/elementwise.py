"""The operators of ONNX that work element by element."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygrad_bn import functional as F
from tinygrad_bn.more_ops import erf
from tinygrad_bn.onnx.errors import OnnxError
from tinygrad_bn.onnx.operators import OPERATORS, Value, number, of_arrays, of_several, operator
from tinygrad_bn.onnx.reading import DTYPES
from tinygrad_bn.tensor import Tensor


def _quotient(a: Value, b: Value) -> Value:
    """The quotient; of integers it is cut towards 0, as in C."""
    if any(np.issubdtype(x.dtype, np.floating) for x in (a, b)):
        return F.div(a, b)

    def cut(a: Any, b: Any) -> Any:
        q = a // b
        return q + ((q < 0) & (q * b != a)).astype(q.dtype)

    return of_arrays(cut)(a, b)


def _mod(a: Value, b: Value, *, fmod: int = 0) -> Value:
    """The rest of a / b. With a gradient it is a − b · q, whose quotient q is a constant."""
    if not any(getattr(x, "requires_grad", False) for x in (a, b)):
        return of_arrays(np.fmod if fmod else np.mod)(a, b)
    return a - b * of_arrays(lambda a, b: np.trunc(a / b) if fmod else np.floor(a / b))(a, b)


def _pow(a: Value, b: Value) -> Value:
    y = F.pow(a, b if b.ndim or getattr(b, "requires_grad", False) else b.item())
    return y if y.dtype == a.dtype else F.astype(y, dtype=a.dtype)


OPERATORS |= {
    "Abs": F.abs, "Add": F.add, "And": of_arrays(np.logical_and), "BitwiseAnd": of_arrays(np.bitwise_and),
    "BitwiseNot": of_arrays(np.bitwise_not), "BitwiseOr": of_arrays(np.bitwise_or),
    "BitwiseXor": of_arrays(np.bitwise_xor), "Ceil": of_arrays(np.ceil), "Div": _quotient, "Equal": F.equal,
    "Erf": erf, "Exp": F.exp, "Floor": of_arrays(np.floor), "Greater": F.greater, "GreaterOrEqual": F.greater_equal,
    "HardSwish": F.hardswish, "Identity": lambda x: x, "IsNaN": of_arrays(np.isnan), "Less": F.less,
    "LessOrEqual": F.less_equal, "Log": F.log, "Max": of_several(F.maximum), "Min": of_several(F.minimum),
    "Mish": F.mish, "Mod": _mod, "Mul": F.mul, "Neg": F.neg, "Not": of_arrays(np.logical_not),
    "Or": of_arrays(np.logical_or), "Pow": _pow, "Reciprocal": lambda x: F.div(1, x), "Relu": F.relu,
    "Round": of_arrays(np.round), "Sigmoid": F.sigmoid, "Sign": F.sign, "Softplus": F.softplus,
    "Softsign": F.softsign, "Sqrt": F.sqrt, "Sub": F.sub, "Sum": of_several(F.add), "Tanh": F.tanh, "Where": F.where,
    "Xor": of_arrays(np.logical_xor),
}  # fmt: skip


@operator
def Mean(*xs: Value) -> Value:
    return F.div(of_several(F.add)(*xs), len(xs))


@operator
def IsInf(x: Value, *, detect_negative: int = 1, detect_positive: int = 1) -> Value:
    return of_arrays(lambda x: np.isinf(x) & (((x < 0) & bool(detect_negative)) | ((x > 0) & bool(detect_positive))))(x)


@operator
def Clip(x: Value, min: Value = None, max: Value = None) -> Value:
    limits = [v for v in (min, max) if v is not None]
    if not limits:
        return x
    if np.issubdtype(x.dtype, np.floating) and not any(getattr(v, "requires_grad", False) for v in limits):
        return F.clip(x, **{name: number(v) for name, v in (("min", min), ("max", max)) if v is not None})
    for limit, choose in ((min, F.maximum), (max, F.minimum)):  # a maximum below the minimum wins
        if limit is not None:
            x = choose(x, limit if isinstance(limit, Tensor) else np.asarray(limit, x.dtype))
    return x


@operator
def Cast(x: Value, *, to: int, saturate: int = 1, round_mode: str = "") -> Value:
    if to not in DTYPES:
        raise OnnxError(f"Cast to the type {to} is not computed")
    return F.astype(x, dtype=np.dtype(DTYPES[to][0]))


@operator
def CastLike(x: Value, like: Value, *, saturate: int = 1, round_mode: str = "") -> Value:
    return F.astype(x, dtype=like.dtype)


@operator
def LeakyRelu(x: Value, *, alpha: float = 0.01) -> Value:
    return F.leaky_relu(x, alpha)


@operator
def PRelu(x: Value, slope: Value) -> Value:
    return F.where(x < 0, F.mul(slope, x), x)


@operator
def Celu(x: Value, *, alpha: float = 1.0) -> Value:
    return F.celu(x, alpha)


@operator
def Elu(x: Value, *, alpha: float = 1.0) -> Value:
    return F.elu(x, alpha)


@operator
def Selu(x: Value, *, alpha: float = 1.6732632423543772, gamma: float = 1.0507009873554805) -> Value:
    return F.elu(x, alpha) * gamma


@operator
def ThresholdedRelu(x: Value, *, alpha: float = 1.0) -> Value:
    return F.where(x > alpha, x, 0.0)


@operator
def HardSigmoid(x: Value, *, alpha: float = 0.2, beta: float = 0.5) -> Value:
    return F.clip(x * alpha + beta, min=0.0, max=1.0)


@operator
def Swish(x: Value, *, alpha: float = 1.0) -> Value:
    return x * F.sigmoid(x * alpha)


@operator
def Gelu(x: Value, *, approximate: str = "none") -> Value:
    return F.gelu(x) if approximate == "none" else F.gelu_tanh(x)


@operator
def Shrink(x: Value, *, bias: float = 0.0, lambd: float = 0.5) -> Value:
    y = F.where(x < -lambd, x + bias, F.where(x > lambd, x - bias, x * 0))
    return y if y.dtype == x.dtype else F.astype(y, dtype=x.dtype)
