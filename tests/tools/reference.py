"""The definition of an op, beside its kernels."""

import numpy as np

from tinygrad_bn.backend import kernels_disabled
from tinygrad_bn.tensor import OPS


def reference(name, *arrays, **params):
    """The op's result on arrays, in float64 and without kernels; of a fused op, its composition's."""
    wide = [a.astype(np.float64) if a.dtype.kind == "f" else a for a in arrays]
    with kernels_disabled():
        return np.asarray(OPS[name].forward(*wide, **params))
