"""For extenders: declare your own op, check it, and train a network with it.

Squareplus (Barron 2021), y = (x + √(x² + 4)) / 2, is a smooth ReLU. One declaration gives it gradients of every
order and the tests of the built-in ops. Here it is the activation of a small network for handwritten digits.
"""

import numpy as np

from tinygrad_bn import functional, manual_seed, nn, primitive, testing
from tinygrad_bn.sample import REAL, elementwise
from tinygrad_bn.train.interval import interval

from .common import Run
from .output import start


@primitive(
    lambda g, y, x: g * y / functional.sqrt(x * x + 4),  # in Tensor arithmetic, so it can be differentiated again
    formula="y = (x + √(x² + 4)) / 2;  ∂x = g · y / √(x² + 4)",
    sample=elementwise(REAL),
)
def squareplus(x):  # type: ignore[no-untyped-def]
    """A smooth ReLU, elementwise."""
    return (x + np.sqrt(x * x + 4)) / 2


class Squareplus(nn.Module):
    """The op as a layer."""

    def forward(self, x):  # type: ignore[no-untyped-def]
        return squareplus(x)


def main(argv: list[str] | None = None) -> Run:
    """Check the op, then train with it."""
    run = Run("new_op", __doc__, argv, data="mnist5k", epochs=5, batch_size=100, lr=1e-3, optimizer="adam", seeds=10)
    result = testing.gradcheck(squareplus, np.linspace(-3, 3, 7))
    testing.gradgradcheck(squareplus, np.linspace(-3, 3, 7))
    testing.check_op(squareplus)  # raises AssertionError if a property does not hold
    run.print(squareplus.__doc__ or "", "\ngradcheck: " + " ".join(map(str, result)))
    run.print("second derivative and every property of the test-suite: ok\n")

    training, validation = run.images()

    def trained(seed: int) -> float:
        manual_seed(seed)
        model = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.BatchNorm1d(64), Squareplus(), nn.Linear(64, 10))
        return run.fit(model, training, validation, f"seed {seed}", seed=seed)["val_accuracy"][-1]

    accuracy = run.each(trained, run.seeds)
    run.print(f"validation accuracy on {len(validation):,} digits: {interval(accuracy)}")
    run.claim_mean("the network learns: its validation accuracy is above 0.85", accuracy, above=0.85)
    return run.finish(accuracy=accuracy)


if __name__ == "__main__":
    start(lambda: main().code)
