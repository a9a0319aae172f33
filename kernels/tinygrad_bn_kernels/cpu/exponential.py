"""The exponential of compiled loops: LLVM does not vectorise calls of the C library's."""

import math

import numpy as np
from llvmlite import ir
from numba import config, types
from numba.extending import intrinsic

from tinygrad_bn_kernels.cpu.jit import inlined

if config.DISABLE_JIT:  # type: ignore[attr-defined]

    def _from_bits(bits):
        """The float64 that has these 64 bits."""
        return np.int64(bits).view(np.float64)

else:

    @intrinsic
    def _from_bits(typingctx, bits):
        """The float64 that has these 64 bits."""

        def codegen(context, builder, signature, args):
            return builder.bitcast(args[0], ir.DoubleType())

        return types.float64(types.int64), codegen


LOG2_E = 1 / math.log(2)
LN2_HIGH = 0.693147180369123816490  # its last 21 bits are 0, so that k · LN2_HIGH is exact (fdlibm's e_exp.c)
LN2_LOW = 1.90821492927058770002e-10


@inlined(fastmath={"contract"})
def exp(x):
    """eˣ in float64, to 2 units in the last place; 0 for x ≤ −707, NaN for NaN.

    eˣ = 2ᵏ eʳ with |r| ≤ log(2) / 2; eʳ is its Taylor polynomial of degree 13, with a remainder below 2⁻⁵³.
    """
    clipped = x if x > -707.0 else -707.0  # NaN too, so that 2ᵏ is a normal float64
    clipped = clipped if clipped < 709.782 else 709.782
    k = np.floor(clipped * LOG2_E + 0.5)
    r = (clipped - k * LN2_HIGH) - k * LN2_LOW
    p = 1 / 6227020800.0
    p = p * r + 1 / 479001600.0
    p = p * r + 1 / 39916800.0
    p = p * r + 1 / 3628800.0
    p = p * r + 1 / 362880.0
    p = p * r + 1 / 40320.0
    p = p * r + 1 / 5040.0
    p = p * r + 1 / 720.0
    p = p * r + 1 / 120.0
    p = p * r + 1 / 24.0
    p = p * r + 1 / 6.0
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    e = (p + p) * _from_bits((np.int64(k) + 1022) << 52)  # 2ᵏ alone overflows before eˣ does
    e = 0.0 if x <= -707.0 else np.inf if x > 709.782 else e
    return e if x == x else x
