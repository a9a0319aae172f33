"""For learners: the backward pass of BatchNorm, step by step, with every value and gradient.

A batch of five samples of two channels goes through BatchNorm. Each step of the forward pass is printed with its
value, the formula of its gradient and the gradient itself; then the three paths by which x reaches the output, and
the closed form beside their sum.
"""

import numpy as np

from demos.common import Run
from tinygrad_bn import Tensor, functional

# Step: how it is computed, and its gradient from those of the steps that use it (∂ stands for ∂loss/∂).
STEPS = {
    "mu": ("mean of x over the batch", "∂mu = −Σ ∂xmu"),
    "xmu": ("x − mu", "∂xmu = ∂xhat · ivar + ∂sq · 2 xmu"),
    "sq": ("xmu²", "∂sq = ∂var / N, for every sample"),
    "var": ("mean of sq over the batch", "∂var = ∂sqrtvar / (2 sqrtvar)"),
    "sqrtvar": ("√(var + eps)", "∂sqrtvar = −∂ivar / sqrtvar²"),
    "ivar": ("1 / sqrtvar", "∂ivar = Σ ∂xhat · xmu"),
    "xhat": ("xmu · ivar", "∂xhat = ∂gammax · weight"),
    "gammax": ("weight · xhat", "∂gammax = ∂out"),
    "out": ("gammax + bias", "∂out = g, which comes from the loss"),
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
    print("\nForward from top to bottom; the gradients come from bottom to top:")
    value = {name: step.numpy() for name, step in steps._asdict().items()}
    grad = {name: np.asarray(step.grad) for name, step in steps._asdict().items()}
    for name, (how, gradient) in STEPS.items():
        print(f"\n{name} = {how}{' ' * max(2, 36 - len(name) - len(how))}{gradient}")
        show("value", value[name])
        show("gradient", grad[name])

    n = len(x)
    paths = {
        "x → xmu → xhat → out": grad["xhat"] * value["ivar"],
        "x → xmu → sq → var → … → out": grad["sq"] * 2 * value["xmu"],
        "x → mu → xmu → … → out": np.broadcast_to(grad["mu"] / n, x.shape),
    }
    print("\nx reaches the output by three paths, and its gradient is their sum:")
    for path, gradient in paths.items():
        print(f"\n{path}")
        show("gradient", gradient)
    total = sum(paths.values())

    xhat, ivar, dxhat = value["xhat"], value["ivar"], grad["xhat"]
    closed = ivar / n * (n * dxhat - dxhat.sum(0) - xhat * (dxhat * xhat).sum(0))
    print("\nThe sum of the paths, what autograd found, and the closed form")
    print("  ∂x = ivar / N · (N ∂xhat − Σ ∂xhat − xhat · Σ (∂xhat · xhat)):\n")
    show("sum", total)
    found = np.asarray(x.grad)
    show("autograd", found)
    show("closed", closed)
    difference = max(np.abs(total - found).max(), np.abs(closed - found).max())
    print(f"\nlargest difference: {difference:.2g}")
    print("∂weight = Σ g · xhat, ∂bias = Σ g:")
    show("∂weight", np.asarray(weight.grad))
    show("∂bias", np.asarray(bias.grad))
    print(f"The sum of ∂x over the batch is 0 ({np.abs(found.sum(0)).max():.1g}): shifting x changes nothing.")
    run.claim("the sum of the paths, autograd and the closed form agree to 1e-12", difference < 1e-12)
    return run.finish(difference=float(difference))


if __name__ == "__main__":
    main()
