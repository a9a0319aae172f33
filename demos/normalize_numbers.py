"""For learners: the numbers 1 to 20, normalised to mean 0 and variance 1, and restored.

First as in the fourth article, then with BatchNorm. With weight = standard deviation and bias = mean, BatchNorm returns
its input, so a network with BatchNorm can still learn the identity.
"""

import numpy as np

from demos.common import Run
from tinygrad_bn import Tensor, functional, nn


def main(argv: list[str] | None = None) -> Run:
    """Print each step."""
    run = Run("normalize_numbers", __doc__, argv)

    X = np.arange(1, 21, 1)
    print("X :", X)
    avg = np.mean(X)
    xhat = (X - avg) / np.std(X)
    print("Normalized data")
    print(xhat)
    print("Mean of the normalized data :", np.mean(xhat))
    print("Variance of the normalized data :", np.var(xhat))

    print("\nThe same with functional.batch_norm: twenty samples of one channel, eps = 0")
    x = Tensor(X.reshape(20, 1), dtype=np.float64)
    y = functional.batch_norm(x, training=True, eps=0.0)
    difference = np.abs(y.numpy().ravel() - xhat).max()
    print("largest difference :", difference)

    print("\nnn.BatchNorm1d with weight = standard deviation and bias = mean")
    layer = nn.BatchNorm1d(1).astype(np.float64)
    layer.load_state_dict({**layer.state_dict(), "weight": x.std(axis=0), "bias": x.mean(axis=0)})
    restored = layer(x)
    print(restored.numpy().ravel())
    print(f"largest difference from X : {np.abs(restored.numpy().ravel() - X).max():.2g}, because eps is {layer.eps:g}")
    print(f"running mean {layer.running_mean}\nrunning variance {layer.running_var}")
    run.claim("BatchNorm equals NumPy's result to 1e-12", difference < 1e-12)
    run.claim("with that weight and bias, it returns 1 to 20", np.abs(restored.numpy().ravel() - X).max() < 1e-4)
    return run.finish(difference=float(difference))


if __name__ == "__main__":
    main()
