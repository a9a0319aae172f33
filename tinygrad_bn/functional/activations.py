"""Activations beyond those that have kernels: compositions, with PyTorch's names and defaults."""

from __future__ import annotations

import math

from tinygrad_bn.arguments import expect_floats, expect_number
from tinygrad_bn.functional.basics import elu, gated
from tinygrad_bn.functional.half import rounded_once
from tinygrad_bn.more_ops import abs, softplus, tanh
from tinygrad_bn.ops import where
from tinygrad_bn.tensor import Operand, Tensor

# Of SELU (Klambauer et al. 2017): they keep mean 0 and variance 1 from layer to layer.
SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805


def hardtanh(x: Operand, min_value: float = -1.0, max_value: float = 1.0) -> Tensor:
    """x within [min_value, max_value]; the gradient is 0 at both, and g at NaN, as of `relu`.

    Raises ValueError unless min_value is less than max_value.
    """
    expect_floats(x, "hardtanh")
    low, high = expect_number("min_value", min_value), expect_number("max_value", max_value)
    if not low < high:
        raise ValueError(f"min_value has to be less than max_value; got {min_value} and {max_value}")
    return where(x <= low, low, where(x >= high, high, x))


def relu6(x: Operand) -> Tensor:
    """min(max(x, 0), 6)."""
    return hardtanh(x, 0.0, 6.0)


@rounded_once
def hardsigmoid(x: Operand) -> Tensor:
    """min(max(x + 3, 0), 6) / 6 (Courbariaux et al. 2015)."""
    return relu6(x + 3) / 6


@rounded_once
def hardswish(x: Operand) -> Tensor:
    """x · hardsigmoid(x) (Howard et al. 2019)."""
    return x * hardsigmoid(x)


@rounded_once
def mish(x: Operand) -> Tensor:
    """x · tanh(log(1 + eˣ)) (Misra 2019)."""
    expect_floats(x, "mish")
    return x * tanh(softplus(x))


@rounded_once
def selu(x: Operand) -> Tensor:
    """scale · elu(x, alpha), with the constants of Klambauer et al. 2017."""
    return elu(x, SELU_ALPHA) * SELU_SCALE


@rounded_once
def celu(x: Operand, alpha: float = 1.0) -> Tensor:
    """x where x > 0, alpha · (e^(x / alpha) − 1) elsewhere (Barron 2017). Raises ValueError if alpha is 0."""
    alpha = expect_number("alpha", alpha)
    if alpha == 0:
        raise ValueError("alpha of celu is a divisor; it cannot be 0")
    return elu(x / alpha, 1.0) * alpha


@rounded_once
def softsign(x: Operand) -> Tensor:
    """x / (1 + |x|)."""
    expect_floats(x, "softsign")
    return x / (abs(x) + 1)


def logsigmoid(x: Operand) -> Tensor:
    """log σ(x) = −log(1 + e⁻ˣ), with all digits on both sides of 0."""
    expect_floats(x, "logsigmoid")
    return -softplus(-x)


@rounded_once
def gelu_tanh(x: Operand) -> Tensor:
    """The approximation of `gelu` by tanh: 0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))) (Hendrycks & Gimpel 2016)."""
    expect_floats(x, "gelu_tanh")
    return gated(x, lambda v: (tanh((v + v * v * v * 0.044715) * math.sqrt(2 / math.pi)) + 1) * 0.5, 40.0)
