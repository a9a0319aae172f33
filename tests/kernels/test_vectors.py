"""Loops over vectors of the size that this processor does not have: LLVM splits or joins its registers."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import numpy as np
from tinygrad_bn_kernels.cpu import simd

simd.BITS = 768 - simd.BITS  # 512 or 256, before any loop uses it

from tests.tools.work import matrices
from tinygrad_bn import Tensor, functional as F
from tinygrad_bn.backend import kernels_disabled
from tinygrad_bn_kernels.cpu import products

rng = np.random.default_rng(0)
for dtype in (np.float32, np.float64):
    a, b, bias = matrices(0, 37, 300, 61, dtype)
    assert np.allclose(products.product(a, b, bias), a.astype(float) @ b + bias, rtol=1e-4, atol=1e-4)
    for n in (7, 8, 15, 16, 17, 31, 33, 64, 257):
        x = rng.normal(size=(90, n)).astype(dtype)
        for name in ("max", "min", "argmax", "argmin"):
            for axis in (0, 1):
                assert np.array_equal(getattr(F, name)(x, axis=axis), getattr(np, name)(x, axis=axis)), (name, axis, n)
    x, w = rng.normal(size=(2, 3, 19, 37)).astype(dtype), rng.normal(size=(5, 3, 3, 3)).astype(dtype)
    results = []
    for on in (True, False):
        t, weight = Tensor(x, requires_grad=True), Tensor(w, requires_grad=True)
        y = F.max_pool2d(F.conv2d(t, weight, padding=1), 2)
        if on:
            y.backward(g := np.cos(np.arange(y.size)).reshape(y.shape).astype(dtype))
        else:
            with kernels_disabled():
                y = F.max_pool2d(F.conv2d(t, weight, padding=1), 2)
                y.backward(g)
        results.append([y.numpy(), t.grad.numpy(), weight.grad.numpy()])
    for mine, reference in zip(*results):
        assert np.allclose(mine, reference, rtol=1e-3, atol=1e-4)
print("all right with", simd.BITS)
"""


@pytest.mark.compiled
def test_with_vectors_of_another_size(tmp_path):
    env = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}  # the cache's key does not hold the size
    run = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True)
    assert run.stdout.startswith("all right with"), run.stderr
