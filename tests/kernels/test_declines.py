"""What kernels on the CPU leave to the reference or the composition: the same numbers as without kernels."""

from functools import partial

import numpy as np
import pytest
import tinygrad_bn_kernels as kernels
from tinygrad_bn_kernels import lookup

from tinygrad_bn import Tensor, optim
from tinygrad_bn import functional as F
from tinygrad_bn.backend import kernels_disabled

RNG = np.random.default_rng(0)


def given(*shape, dtype=np.float64):
    return np.abs(RNG.normal(size=shape)).astype(dtype)


def gradients(function, *arrays):
    """The output and the gradients of all operands."""
    ts = [Tensor(a, requires_grad=True) for a in arrays]
    y = function(*ts)
    y.backward(np.cos(np.arange(y.size, dtype=float)).reshape(y.shape))
    return [y, *(t.grad for t in ts)]


def updates(function, *arrays, **options):
    """What an op returns, and the operands that it overwrites."""
    own = [a.copy() for a in arrays]
    y, saved = function.run(*own, **options)
    return [y, *saved, *own]


HALF = partial(given, 3, dtype=np.float16)
ADAM = {"beta1": 0.9, "beta2": 0.99, "step_size": 0.1, "root_scale": 1.0, "eps": 1e-3, "shrink": 1.0, "decay": 0.0}
SGD = {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "decay": 0.0, "nesterov": False}
DECLINED = {
    "conv_with_bias.vjp": lambda: gradients(F.conv3d, given(2, 3, 4, 4, 4), given(2, 3, 2, 2, 2), given(2)),
    "max_pool": lambda: gradients(partial(F.max_pool3d, kernel_size=2), given(1, 2, 4, 4, 4)),
    "max_pool.vjp": lambda: gradients(partial(F.max_pool3d, kernel_size=2), given(1, 2, 4, 4, 4)),
    "running_statistics": lambda: updates(
        F.running_statistics, HALF(), HALF(), np.array(3), given(3), given(3), momentum=0.1, unbias=1.5
    ),
    "adam": lambda: updates(optim.algorithms.adam, *(HALF() for _ in range(4)), **ADAM),
    "sgd": lambda: updates(optim.algorithms.sgd, *(HALF() for _ in range(3)), **SGD),
}


@pytest.mark.parametrize("name", DECLINED)
def test_a_call_that_a_kernel_declines_gives_what_the_reference_gives(name, monkeypatch):
    results = []
    kernel = lookup(name, "cpu")

    def watched(*args, **options):
        results.append(kernel(*args, **options))
        return results[-1]

    monkeypatch.setitem(kernels._kernels, (name, "cpu"), watched)
    state = RNG.bit_generator.state
    found = DECLINED[name]()
    assert any(r is NotImplemented for r in results)
    RNG.bit_generator.state = state
    with kernels_disabled():
        expected = DECLINED[name]()
    for one, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(want), rtol=1e-12)
