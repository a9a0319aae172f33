"""For learners: the numbers 1 to 20, normalised to mean 0 and variance 1, and restored.

First as in the fourth article, then with BatchNorm. With weight = standard deviation and bias = mean, BatchNorm returns
its input, so a network with BatchNorm can still learn the identity.
"""

import numpy as np

from tinygrad_bn import Tensor, functional, nn

from .common import Run
from .output import start


def main(argv: list[str] | None = None) -> Run:
    """Print each step."""
    run = Run("normalize_numbers", __doc__, argv)

    X = np.arange(1, 21, 1)
    avg = np.mean(X)
    xhat = (X - avg) / np.std(X)
    run.print(f"X : {X}", f"Normalized data\n{xhat}")
    run.print(f"Mean of the normalized data : {np.mean(xhat)}", f"Variance of the normalized data : {np.var(xhat)}")

    x = Tensor(X.reshape(20, 1), dtype=np.float64)
    y = functional.batch_norm(x, training=True, eps=0.0)
    difference = np.abs(y.numpy().ravel() - xhat).max()
    run.print("\nThe same with functional.batch_norm: twenty samples of one channel, eps = 0")
    run.print(f"largest difference : {difference}")

    layer = nn.BatchNorm1d(1).astype(np.float64)
    layer.load_state_dict({**layer.state_dict(), "weight": x.std(axis=0), "bias": x.mean(axis=0)})
    restored = layer(x).numpy().ravel()
    off = np.abs(restored - X).max()
    run.print(f"\nnn.BatchNorm1d with weight = standard deviation and bias = mean\n{restored}")
    run.print(f"largest difference from X : {off:.2g}, because eps is {layer.eps:g}")
    run.print(f"running mean {layer.running_mean}\nrunning variance {layer.running_var}")
    run.claim("BatchNorm equals NumPy's result to 1e-12", difference < 1e-12)
    run.claim("with that weight and bias, it returns 1 to 20 to 1e-4", off < 1e-4)
    return run.finish(difference=float(difference))


if __name__ == "__main__":
    start(lambda: main().code)
