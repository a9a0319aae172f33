"""Activations as layers: see the functions of the same names in `functional`."""

from __future__ import annotations

from tinygrad_bn import functional as F
from tinygrad_bn.arguments import expect_integer, expect_number, shown
from tinygrad_bn.nn.module import Module
from tinygrad_bn.tensor import Tensor


class ReLU(Module):
    """max(x, 0)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


class LeakyReLU(Module):
    """x where x > 0, negative_slope · x elsewhere."""

    def __init__(self, negative_slope: float = 0.01) -> None:
        self.negative_slope = expect_number("negative_slope", negative_slope)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, self.negative_slope)

    def extra_repr(self) -> str:
        return f"negative_slope={self.negative_slope}"


class ELU(Module):
    """x where x > 0, alpha · (eˣ − 1) elsewhere."""

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = expect_number("alpha", alpha)

    def forward(self, x: Tensor) -> Tensor:
        return F.elu(x, self.alpha)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"


class Sigmoid(Module):
    """1 / (1 + e⁻ˣ)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.sigmoid(x)


class Tanh(Module):
    """Hyperbolic tangent."""

    def forward(self, x: Tensor) -> Tensor:
        return F.tanh(x)


class Softplus(Module):
    """log(1 + eˣ)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(x)


class SiLU(Module):
    """x · sigmoid(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x)


class GELU(Module):
    """x · Φ(x), where Φ is the standard normal distribution function; or, with "tanh", its approximation by tanh."""

    def __init__(self, approximate: str = "none") -> None:
        if approximate not in ("none", "tanh"):
            raise ValueError(f"approximate is 'none' or 'tanh'; got {shown(approximate)}")
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu_tanh(x) if self.approximate == "tanh" else F.gelu(x)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}" if self.approximate != "none" else ""


class Softmax(Module):
    """eˣ / Σ eˣ over `axis`. `cross_entropy` takes logits: use no Softmax before it."""

    def __init__(self, axis: int = -1) -> None:
        self.axis = expect_integer("axis", axis)

    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(x, self.axis)

    def extra_repr(self) -> str:
        return f"axis={self.axis}"


class ReLU6(Module):
    """min(max(x, 0), 6)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(x)


class Hardtanh(Module):
    """x within [min_val, max_val]."""

    def __init__(self, min_val: float = -1.0, max_val: float = 1.0) -> None:
        self.min_val, self.max_val = expect_number("min_val", min_val), expect_number("max_val", max_val)
        if not self.min_val < self.max_val:
            raise ValueError(f"min_val has to be less than max_val; got {min_val} and {max_val}")

    def forward(self, x: Tensor) -> Tensor:
        return F.hardtanh(x, self.min_val, self.max_val)

    def extra_repr(self) -> str:
        return f"min_val={self.min_val}, max_val={self.max_val}"


class Hardsigmoid(Module):
    """min(max(x + 3, 0), 6) / 6."""

    def forward(self, x: Tensor) -> Tensor:
        return F.hardsigmoid(x)


class Hardswish(Module):
    """x · hardsigmoid(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.hardswish(x)


class Mish(Module):
    """x · tanh(log(1 + eˣ))."""

    def forward(self, x: Tensor) -> Tensor:
        return F.mish(x)


class SELU(Module):
    """scale · elu(x, alpha), which keeps mean 0 and variance 1 from layer to layer."""

    def forward(self, x: Tensor) -> Tensor:
        return F.selu(x)


class CELU(Module):
    """x where x > 0, alpha · (e^(x / alpha) − 1) elsewhere."""

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = expect_number("alpha", alpha)
        if self.alpha == 0:
            raise ValueError("alpha of CELU is a divisor; it cannot be 0")

    def forward(self, x: Tensor) -> Tensor:
        return F.celu(x, self.alpha)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"


class Softsign(Module):
    """x / (1 + |x|)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.softsign(x)


class LogSigmoid(Module):
    """log σ(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.logsigmoid(x)
