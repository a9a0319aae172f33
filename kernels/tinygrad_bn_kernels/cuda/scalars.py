"""Functions of scalars, one definition each, for all programs that apply them.

Each maps the type T to a function of scalars of that type; constants are written T(…). All propagate NaN.
"""

import math
from collections.abc import Callable
from typing import Any

Scalar = Callable[..., Any]


def _sigmoid(T: Any) -> Scalar:
    def sigmoid(x):
        e = math.exp(-abs(x))
        return (T(1) if x >= T(0) else e) / (T(1) + e)

    return sigmoid


def _sech_squared(T: Any) -> Scalar:
    def sech_squared(x):
        e = math.exp(T(-2) * abs(x))
        return T(4) * e / ((T(1) + e) * (T(1) + e))

    return sech_squared


def _silu(T: Any) -> Scalar:
    def silu(x):
        e = math.exp(-abs(x))
        return T(0) if x < T(-750) else x * ((T(1) if x >= T(0) else e) / (T(1) + e))

    return silu


def _silu_vjp(T: Any) -> Scalar:
    def silu_vjp(g, x):
        v = T(750) if x > T(750) else T(-750) if x < T(-750) else x  # ∞ · 0 would be NaN
        e = math.exp(-abs(v))
        s, r = (T(1) if v >= T(0) else e) / (T(1) + e), (e if v >= T(0) else T(1)) / (T(1) + e)
        return g * (s * (T(1) + v * r))

    return silu_vjp


def _gelu(T: Any) -> Scalar:
    return lambda x: T(0) if x < T(-40) else x * math.erfc(x * T(-math.sqrt(0.5))) * T(0.5)


def _gelu_vjp(T: Any) -> Scalar:
    def gelu_vjp(g, x):
        v = T(40) if x > T(40) else T(-40) if x < T(-40) else x  # ∞ · 0 would be NaN
        cdf = math.erfc(v * T(-math.sqrt(0.5))) * T(0.5)
        return g * (cdf + v * (T(1 / math.sqrt(2 * math.pi)) * math.exp(T(-0.5) * v * v)))

    return gelu_vjp


def _softplus(T: Any) -> Scalar:
    return lambda x: (x if x > T(0) else T(0)) + math.log1p(math.exp(-abs(x)))


def _clip(T: Any) -> Scalar:
    def clip(x, low, high):
        raised = x if x >= low or x != x else low  # low may be greater than high, and both may be NaN
        return raised if raised <= high or raised != raised else high

    return clip


def _sign(T: Any) -> Scalar:
    return lambda x: T(1) if x > T(0) else T(-1) if x < T(0) else x


# Functions whose result has the operands' type, functions computed in floating point, and functions that return bool.
SAME: dict[str, Callable[[Any], Scalar]] = {
    "add": lambda T: lambda a, b: a + b,
    "sub": lambda T: lambda a, b: a - b,
    "mul": lambda T: lambda a, b: a * b,
    "neg": lambda T: lambda x: -x,
    "abs": lambda T: lambda x: abs(x),
    "sign": _sign,
    "pow": lambda T: lambda a, b: a**b,
    "relu": lambda T: lambda x: T(0) if x <= T(0) else x,
    "maximum": lambda T: lambda a, b: a if a > b or a != a else b,
    "minimum": lambda T: lambda a, b: a if a < b or a != a else b,
    "clip": _clip,
    "relu_vjp": lambda T: lambda g, y: T(0) if y <= T(0) else g,
    "silu_vjp": _silu_vjp,
    "gelu_vjp": _gelu_vjp,
    "identity": lambda T: lambda x: x,
}
FLOAT: dict[str, Callable[[Any], Scalar]] = {
    "div": lambda T: lambda a, b: a / b,
    "exp": lambda T: lambda x: math.exp(x),
    "expm1": lambda T: lambda x: math.expm1(x),
    "log": lambda T: lambda x: math.log(x),
    "log1p": lambda T: lambda x: math.log1p(x),
    "sqrt": lambda T: lambda x: math.sqrt(x),
    "rsqrt": lambda T: lambda x: T(1) / math.sqrt(x),
    "tanh": lambda T: lambda x: math.tanh(x),
    "erf": lambda T: lambda x: math.erf(x),
    "erfc": lambda T: lambda x: math.erfc(x),
    "silu": _silu,
    "gelu": _gelu,
    "sech_squared": _sech_squared,
    "sigmoid": _sigmoid,
    "softplus": _softplus,
}
TRUTH: dict[str, Callable[[Any], Scalar]] = {
    "equal": lambda T: lambda a, b: a == b,
    "not_equal": lambda T: lambda a, b: a != b,
    "less": lambda T: lambda a, b: a < b,
    "less_equal": lambda T: lambda a, b: a <= b,
}
