"""Initialisers, with PyTorch's names and formulas. Each fills a tensor in place and returns it.

Weights have the layout (out, in, ...). Random numbers come from `rng`, by default from `random.generator()`. All raise
TypeError unless they get a floating-point tensor and options of the right type, ValueError for options out of range.
"""

import math
from typing import Literal

import numpy as np

from tinygrad_bn.arguments import expect_number, full_name, shown
from tinygrad_bn.random import generator
from tinygrad_bn.tensor import Tensor

Rng = np.random.Generator | None


def _expect_weight(t: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"an initialiser fills a Tensor; got {full_name(t)}")
    if t.dtype.kind != "f":
        raise TypeError(f"an initialiser fills a floating-point tensor; this one is {t.dtype}")


def constant_(t: Tensor, value: float) -> Tensor:
    """Set every element to `value`."""
    _expect_weight(t)
    value = expect_number("value", value, finite=False)
    t.data = np.full(t.shape, value)
    return t


def zeros_(t: Tensor) -> Tensor:
    """Set every element to 0."""
    return constant_(t, 0.0)


def ones_(t: Tensor) -> Tensor:
    """Set every element to 1."""
    return constant_(t, 1.0)


def normal_(t: Tensor, mean: float = 0.0, std: float = 1.0, rng: Rng = None) -> Tensor:
    """Normal distribution with this mean and standard deviation."""
    _expect_weight(t)
    mean = expect_number("mean", mean)
    std = expect_number("std", std, 0)
    t.data = generator(rng).normal(mean, std, t.shape)
    return t


def uniform_(t: Tensor, low: float = 0.0, high: float = 1.0, rng: Rng = None) -> Tensor:
    """Uniform distribution on [low, high)."""
    _expect_weight(t)
    low = expect_number("low", low)
    high = expect_number("high", high)
    if low > high:
        raise ValueError(f"low may not be above high; got low={low}, high={high}")
    t.data = generator(rng).uniform(low, high, t.shape)
    return t


def fans(t: Tensor) -> tuple[int, int]:
    """Fan-in and fan-out of a weight (out, in, ...): the inputs of one output unit, the outputs of one input unit.

    Raises ValueError for fewer than two axes.
    """
    _expect_weight(t)
    if t.ndim < 2:
        raise ValueError(
            f"fan-in and fan-out need a weight of two axes or more; got shape {t.shape}: set a bias by "
            "constant_ or zeros_"
        )
    field = math.prod(t.shape[2:])
    return t.shape[1] * field, t.shape[0] * field


def gain(nonlinearity: str, slope: float = 0.01) -> float:
    """Factor for the standard deviation of weights that keeps the variance; `slope` is leaky_relu's negative slope."""
    slope = expect_number("slope", slope)
    gains = {
        "linear": 1.0,
        "sigmoid": 1.0,
        "tanh": 5 / 3,
        "relu": math.sqrt(2),
        "leaky_relu": math.sqrt(2 / (1 + slope**2)),
    }
    if not isinstance(nonlinearity, str) or nonlinearity not in gains:
        raise ValueError(f"no gain is known for {shown(nonlinearity)}; known are {', '.join(gains)}")
    return gains[nonlinearity]


def _xavier_std(t: Tensor, gain: float) -> float:
    gain = expect_number("gain", gain, 0)
    return gain * math.sqrt(2 / max(sum(fans(t)), 1))  # 1 for an empty weight


def xavier_normal_(t: Tensor, gain: float = 1.0, rng: Rng = None) -> Tensor:
    """Normal with standard deviation gain · √(2 / (fan_in + fan_out)) (Glorot & Bengio 2010)."""
    return normal_(t, 0.0, _xavier_std(t, gain), rng)


def xavier_uniform_(t: Tensor, gain: float = 1.0, rng: Rng = None) -> Tensor:
    """Uniform with the standard deviation of `xavier_normal_`; the default of Keras' Dense."""
    bound = math.sqrt(3) * _xavier_std(t, gain)
    return uniform_(t, -bound, bound, rng)


def _kaiming_std(t: Tensor, a: float, mode: str, nonlinearity: str) -> float:
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(f"mode is 'fan_in' or 'fan_out'; got {shown(mode)}")
    return gain(nonlinearity, a) / math.sqrt(max(fans(t)[mode == "fan_out"], 1))


def kaiming_normal_(
    t: Tensor,
    a: float = 0.0,
    mode: Literal["fan_in", "fan_out"] = "fan_in",
    nonlinearity: str = "leaky_relu",
    rng: Rng = None,
) -> Tensor:
    """Normal with standard deviation gain / √fan (He et al. 2015); `a` is the negative slope of leaky_relu."""
    return normal_(t, 0.0, _kaiming_std(t, a, mode, nonlinearity), rng)


def kaiming_uniform_(
    t: Tensor,
    a: float = 0.0,
    mode: Literal["fan_in", "fan_out"] = "fan_in",
    nonlinearity: str = "leaky_relu",
    rng: Rng = None,
) -> Tensor:
    """Uniform with the standard deviation of `kaiming_normal_`."""
    bound = math.sqrt(3) * _kaiming_std(t, a, mode, nonlinearity)
    return uniform_(t, -bound, bound, rng)


def orthogonal_(t: Tensor, gain: float = 1.0, rng: Rng = None) -> Tensor:
    """`gain` times a matrix (out, fan_in) whose rows, or columns if fewer, are orthonormal (Saxe et al. 2013)."""
    gain = expect_number("gain", gain)
    columns, rows = fans(t)[0], t.shape[0]
    flat = generator(rng).normal(size=(max(rows, columns), min(rows, columns)))
    q, r = np.linalg.qr(flat)
    q *= np.sign(np.diag(r))  # QR prefers some signs; this makes all orthogonal matrices equally likely
    t.data = gain * (q if rows >= columns else q.T).reshape(t.shape)
    return t
