"""For learners: the backward pass of BatchNorm, step by step, with every value and gradient.

A batch of five samples with two channels passes through BatchNorm. For each step of the forward pass, the demo prints
its formula and value, and the formula and value of its gradient. Then it prints the gradients along the three paths
from x to the output, their sum, and the closed form.
"""

import numpy as np

from demos.common import Run
from tinygrad_bn import Tensor, functional

# Step: its formula, and the formula of its gradient. ∂mu means ∂loss/∂mu.
STEPS = {
    "mu": ("mean of x over the batch", "∂mu = −Σ ∂xmu"),
    "xmu": ("x − mu", "∂xmu = ∂xhat · ivar + ∂sq · 2 xmu"),
    "sq": ("xmu²", "∂sq = ∂var / N, for every sample"),
    "var": ("mean of sq over the batch", "∂var = ∂sqrtvar / (2 sqrtvar)"),
    "sqrtvar": ("√(var + eps)", "∂sqrtvar = −∂ivar / sqrtvar²"),
    "ivar": ("1 / sqrtvar", "∂ivar = Σ ∂xhat · xmu"),
    "xhat": ("xmu · ivar", "∂xhat = ∂gammax · weight"),
    "gammax": ("weight · xhat", "∂gammax = ∂out"),
    "out": ("gammax + bias", "∂out = g, the gradient of the loss"),
}


def show(label: str, array: np.ndarray) -> None:
    """Print an array, indented under its label."""
    text = np.array2string(array, precision=4, suppress_small=True, sign=" ")
    print(f"  {label:9}" + text.replace("\n", "\n" + " " * 11))


def main(argv: list[str] | None = None) -> Run:
    """Print the steps, the paths and the closed form."""
    run = Run("bn_backward", __doc__, argv)
    rng = np.random.default_rng(run.args.seed)
    x = Tensor(rng.normal(3.0, 2.0, (5, 2)), requires_grad=True)
    weight = Tensor(np.array([1.5, -0.5]), requires_grad=True)
    bias = Tensor(np.array([0.1, 0.2]), requires_grad=True)
    g = rng.normal(size=(5, 2))

    steps = functional.batch_norm_steps(x, weight, bias, eps=1e-5)
    for step in steps:
        step.retain_grad()
    steps.out.backward(g)

    print("The input, and the gradient g of the loss with respect to the output:")
    show("x", x.numpy())
    show("g", g)
    print("\nRead values from top to bottom, gradients from bottom to top. ∂mu means ∂loss/∂mu, Σ sums over the batch.")
    value = {name: step.numpy() for name, step in steps._asdict().items()}
    grad = {name: np.asarray(step.grad) for name, step in steps._asdict().items()}
    for name, (formula, gradient) in STEPS.items():
        print(f"\n{name} = {formula}{' ' * max(2, 36 - len(name) - len(formula))}{gradient}")
        show("value", value[name])
        show("gradient", grad[name])

    n = len(x)
    paths = {
        "x → xmu → xhat → out": grad["xhat"] * value["ivar"],
        "x → xmu → sq → var → … → out": grad["sq"] * 2 * value["xmu"],
        "x → mu → xmu → … → out": np.broadcast_to(grad["mu"] / n, x.shape),
    }
    print("\nx reaches the output along three paths. Its gradient is the sum of the gradients along them:")
    for path, gradient in paths.items():
        print(f"\n{path}")
        show("gradient", gradient)
    total = sum(paths.values())

    xhat, ivar, dxhat = value["xhat"], value["ivar"], grad["xhat"]
    closed = ivar / n * (n * dxhat - dxhat.sum(0) - xhat * (dxhat * xhat).sum(0))
    print("\nThe sum of the paths, the result of autograd, and the closed form")
    print("  ∂x = ivar / N · (N ∂xhat − Σ ∂xhat − xhat · Σ (∂xhat · xhat)):\n")
    show("sum", total)
    result = np.asarray(x.grad)
    show("autograd", result)
    show("closed", closed)
    difference = max(np.abs(total - result).max(), np.abs(closed - result).max())
    print(f"\nlargest difference: {difference:.2g}")
    print("∂weight = Σ g · xhat, ∂bias = Σ g:")
    show("∂weight", np.asarray(weight.grad))
    show("∂bias", np.asarray(bias.grad))
    print(f"∂x sums to 0 over the batch ({np.abs(result.sum(0)).max():.1g}): adding a constant to x changes nothing.")
    run.claim("the sum of the paths, autograd and the closed form agree to 1e-12", difference < 1e-12)
    return run.finish(difference=float(difference))


if __name__ == "__main__":
    main()
