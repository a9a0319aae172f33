"""Derivatives of BatchNorm with as many digits as wanted, without this package's engine: power series in decimals.

A series is the list of its coefficients: of t⁰, t¹, … up to an order. Sums, products and one recurrence are enough.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal, localcontext
from typing import TypeAlias

import numpy as np

from tinygrad_bn.sample import Array

Series: TypeAlias = list[Decimal]

DIGITS = 60


def times(a: Series, b: Series) -> Series:
    """The product, to the same order."""
    return [sum((a[i] * b[k - i] for i in range(k + 1)), Decimal(0)) for k in range(len(a))]


def plus(*series: Series) -> Series:
    """The sum."""
    return [sum(parts, Decimal(0)) for parts in zip(*series, strict=True)]


def scaled(a: Series, by: Decimal) -> Series:
    """The series times a number."""
    return [c * by for c in a]


def power(a: Series, r: Decimal) -> Series:
    """aʳ, for a positive first coefficient, from a · (aʳ)' = r · a' · aʳ (Knuth, Seminumerical Algorithms, 4.7)."""
    out = [a[0] ** r]
    for k in range(1, len(a)):
        terms = ((r * j - (k - j)) * a[j] * out[k - j] for j in range(1, k + 1))
        out.append(sum(terms, Decimal(0)) / (k * a[0]))
    return out


def _line(at: float, along: float, order: int) -> Series:
    """at + t · along: exactly the numbers of float64."""
    return [Decimal(float(at)), Decimal(float(along)), *[Decimal(0)] * order][: order + 1]


def batch_norm_derivatives(
    points: Sequence[Array], directions: Sequence[Array], cotangent: Array, eps: float, order: int
) -> list[float]:
    """The derivatives of orders 0 to `order` at t = 0 of Σ BN(x + t·dx; weight + t·dw, bias + t·db) · cotangent.

    Args:
        points: x (N, C), weight (C,) and bias (C,), float64; or x alone, for a weight of 1 and a bias of 0.
        directions: dx, dw and db, of the same shapes.
        cotangent: (N, C).
    """
    x, dx = points[0], directions[0]
    n, channels = x.shape
    weight, bias = points[1:] or (np.ones(channels), np.zeros(channels))
    dw, db = directions[1:] or (np.zeros(channels), np.zeros(channels))
    with localcontext() as context:
        context.prec = DIGITS
        total = _line(0, 0, order)
        for c in range(channels):
            column = [_line(x[i, c], dx[i, c], order) for i in range(n)]
            mean = scaled(plus(*column), Decimal(1) / n)
            centred = [plus(series, scaled(mean, Decimal(-1))) for series in column]
            variance = scaled(plus(*(times(s, s) for s in centred)), Decimal(1) / n)
            ivar = power(plus(variance, _line(eps, 0, order)), Decimal("-0.5"))
            scale, shift = times(_line(weight[c], dw[c], order), ivar), _line(bias[c], db[c], order)
            for i in range(n):
                y = plus(times(centred[i], scale), shift)
                total = plus(total, scaled(y, Decimal(float(cotangent[i, c]))))
        return [float(c * math.factorial(k)) for k, c in enumerate(total)]
