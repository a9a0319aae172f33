"""For extenders: declare your own op with its own kernels, check it, and train a network with it.

Swish (Ramachandran 2017), y = x · σ(x), is a smooth ReLU. One declaration gives it gradients of every order and the
tests of the built-in ops; Numba makes it fast. Here it is the activation of a small network for handwritten digits.
"""

import math
from typing import Any

import numba
import numpy as np

from tinygrad_bn import functional, manual_seed, nn
from tinygrad_bn.extend import REAL, check_op, elementwise, fused, kernel
from tinygrad_bn.train.interval import interval

from .common import Run
from .output import start

LOOPS = np.float32, np.float64  # other dtypes are left to the definition


@fused(formula="y = x · σ(x);  ∂x = g · σ(x) · (1 + x · σ(−x))", sample=elementwise(REAL))
def swish(x):  # type: ignore[no-untyped-def]
    """A smooth ReLU, elementwise."""
    return x * functional.sigmoid(x)  # the definition; gradients of every order follow from it


vectorize: Any = numba.vectorize  # makes a NumPy function of a loop's body, for arrays of any shape
forward = vectorize(lambda x: 0.0 if x < -700 else x / (1 + math.exp(-x)))
slope = vectorize(lambda x: x > 0 if abs(x) > 700 else (1 + x / (1 + math.exp(x))) / (1 + math.exp(-x)))
kernel("swish", "cpu")(lambda x: np.asarray(forward(x), x.dtype) if x.dtype in LOOPS else NotImplemented)
kernel("swish.vjp", "cpu")(lambda g, y, x, *, needs: (g * slope(x),) if x.dtype in LOOPS else NotImplemented)


class Swish(nn.Module):
    forward = staticmethod(swish)


def main(argv: list[str] | None = None) -> Run:
    """Check the op, then train with it."""
    run = Run("new_op", __doc__, argv, data="mnist5k", epochs=5, batch_size=100, lr=1e-3, optimizer="adam", seeds=10)
    run.print(f"{swish.__doc__}\n\n{check_op(swish)}\nevery property of the test-suite: ok\n")  # else AssertionError
    training, validation = run.images()

    def trained(seed: int) -> float:
        manual_seed(seed)
        model = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.BatchNorm1d(64), Swish(), nn.Linear(64, 10))
        return run.fit(model, training, validation, f"seed {seed}", seed=seed)["val_accuracy"][-1]

    accuracy = run.each(trained, run.seeds)
    run.print(f"validation accuracy on {len(validation):,} digits: {interval(accuracy)}")
    run.claim_mean("the network learns: its validation accuracy is above 0.85", accuracy, above=0.85)
    return run.finish(accuracy=accuracy)


if __name__ == "__main__":
    start(lambda: main().code)
