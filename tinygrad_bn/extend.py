"""What a file of your own needs to add an op: declarations, kernels, samples, and what gradient rules use.

One declaration gives an op broadcasting, dtypes, errors in words, gradients of every order, its documentation and a
formula in `explain`. Its tests are one line, `check_op(my_op)`, or `pytest -p tinygrad_bn.testing.plugin --tinygrad-ops
FILE`. `python -m tinygrad_bn ops FILE` shows it; `python -m tinygrad_bn new-op NAME` writes a file to start from.

    @primitive(lambda g, y, x: g * 3 * x * x, formula="y = x³;  ∂x = 3 g · x²", sample=elementwise(REAL))
    def cube(x):
        return x * x * x
"""

from __future__ import annotations

from tinygrad_bn_kernels import kernel

from tinygrad_bn.backend import expect_broadcast
from tinygrad_bn.ops import broadcast_to, kept, sum_to
from tinygrad_bn.sample import (
    NONZERO,
    POSITIVE,
    REAL,
    Domain,
    Draw,
    Drawn,
    Sample,
    broadcasting,
    elementwise,
    reducing,
)  # fmt: skip
from tinygrad_bn.tensor import Axis, Operand, fused, held_constant, primitive
from tinygrad_bn.testing import OpReport, check_op

__all__ = [
    "NONZERO", "POSITIVE", "REAL", "Axis", "Domain", "Draw", "Drawn", "OpReport", "Operand", "Sample", "broadcast_to",
    "broadcasting", "check_op", "elementwise", "fused", "held_constant", "kept", "kernel", "primitive", "reducing",
    "sum_to", "unbroadcast",
]  # fmt: skip


def unbroadcast(g: Operand, x: Operand) -> Operand:
    """`g` summed over the axes along which broadcasting repeated `x`, to the shape of `x`.

    The engine does this for every rule. A rule needs it where an operand is repeated in another way, or inside a sum.

    Raises ValueError if `x` does not broadcast to the shape of `g`.

    >>> import numpy as np
    >>> unbroadcast(np.ones((4, 3)), np.zeros((1, 3)))
    array([[4., 4., 4.]])
    """
    expect_broadcast(x.shape, g.shape)
    return sum_to(g, shape=x.shape)
