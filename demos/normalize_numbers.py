"""The numbers 1 to 20, normalised to mean 0 and variance 1, and back again.

The fourth article, then the same through BatchNorm: with weight = standard deviation and bias = mean, BatchNorm gives
back what went in, so a network that has it can still learn to do without.
"""

import numpy as np

from demos.common import options
from tinygrad_bn import Tensor, functional, nn


def main(argv: list[str] | None = None) -> None:
    """Print each step."""
    options("normalize_numbers", __doc__).parse_args(argv)

    X = np.arange(1, 21, 1)
    print("X :", X)
    avg = np.mean(X)
    xhat = (X - avg) / np.std(X)
    print("Normalized data")
    print(xhat)
    print("Mean of the normalized data :", np.mean(xhat))
    print("Variance of the normalized data :", np.var(xhat))

    print("\nThe same by functional.batch_norm: twenty samples of one channel, eps = 0")
    x = Tensor(X.reshape(20, 1), dtype=np.float64)
    y = functional.batch_norm(x, training=True, eps=0.0)
    print("largest difference :", np.abs(y.numpy().ravel() - xhat).max())

    print("\nnn.BatchNorm1d with weight = standard deviation and bias = mean")
    layer = nn.BatchNorm1d(1).astype(np.float64)
    layer.load_state_dict({**layer.state_dict(), "weight": x.std(axis=0), "bias": x.mean(axis=0)})
    restored = layer(x)
    print(restored.numpy().ravel())
    print(f"largest difference from X : {np.abs(restored.numpy().ravel() - X).max():.2g}, as eps is {layer.eps:g}")
    print(f"running mean {layer.running_mean}\nrunning variance {layer.running_var}")


if __name__ == "__main__":
    main()
