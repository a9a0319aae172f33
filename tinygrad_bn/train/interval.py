"""What several seeds show together: a mean and its 95 % interval."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# 97.5 % quantiles of Student's t distribution with 1 to 10 degrees of freedom; beyond, a series for them.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t distribution."""
    return T[freedom - 1] if freedom <= len(T) else 1.95996 + 2.37227 / freedom + 2.8225 / freedom**2


class Interval(NamedTuple):
    """A mean, and half the width of its 95 % interval: NaN for one value, which has no interval."""

    mean: float
    half: float

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def __str__(self) -> str:
        return number(self.mean) + ("" if np.isnan(self.half) else f" ± {number(self.half)}")


def interval(values: Sequence[float] | np.ndarray) -> Interval:
    """The t interval of the mean of `values`, one per seed; of differences, it is the paired one."""
    n = len(values)
    half = quantile(n - 1) * float(np.std(values, ddof=1)) / n**0.5 if n > 1 else float("nan")
    return Interval(float(np.mean(values)), half)


def number(value: float, digits: int = 3) -> str:
    """A number as short text: three decimals, or an exponent where they would not do."""
    return f"{value:.1e}" if abs(value) >= 1000 or 0 < abs(value) < 0.5 * 10**-digits else f"{value:.{digits}f}"
