"""For learners: the backward pass of BatchNorm, step by step, with every value and gradient.

A batch passes through BatchNorm: five samples with two channels, or one channel of your own (`--x 1 2 3 4 6`). For each
step of the forward pass, the demo prints its formula and value, and the formula and value of its gradient. Then it
prints the gradients along the four paths from x to the output, their sum, and the closed form. The figures show the
steps and the paths for one channel. With `--eval` the running statistics normalise, and one path is left.
"""

from typing import Any

import numpy as np

from tinygrad_bn import Tensor, functional
from tinygrad_bn.explain import explain
from tinygrad_bn.tensor import Array

from .bn_figures import draw, name_of
from .common import Run
from .output import start

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
IN_EVAL = {
    "xmu": ("x − running_mean", "∂xmu = ∂xhat · ivar"),
    "ivar": ("1 / √(running_var + eps)", "a constant: it gets no gradient"),
}
MEAN, VAR = 3.0, 4.0  # the running statistics


def show(label: str, array: Array) -> str:
    """An array, indented under its label."""
    text = np.array2string(array, precision=4, suppress_small=True, sign=" ")
    return f"  {label:9}" + text.replace("\n", "\n" + " " * 11)


def main(argv: list[str] | None = None) -> Run:
    """Print the steps, the paths and the closed form."""
    own: dict[str, dict[str, Any]] = {
        "--x": {"type": float, "nargs": "+", "help": "the values of one channel, at least two"},
        "--eval": {"action": "store_true", "help": "evaluation mode: normalise by the running mean 3 and variance 4"},
    }
    run = Run("bn_backward", __doc__, argv, own=own)
    rng = np.random.default_rng(run.args.seed)
    given = run.args.x
    if given and not (len(given) > 1 and np.isfinite(given).all()):
        run.parser.error("--x takes two or more finite numbers, the samples of one channel")
    x = Tensor(np.reshape(given, (-1, 1)) if given else rng.normal(3.0, 2.0, (5, 2)), requires_grad=True)
    weight, bias = (Tensor(np.array(v[: x.shape[1]]), requires_grad=True) for v in ([1.5, -0.5], [0.1, 0.2]))
    running_mean, running_var = (Tensor(np.full(x.shape[1], v)) if run.args.eval else None for v in (MEAN, VAR))
    g = rng.normal(size=x.shape)
    with explain() as e:
        out = functional.batch_norm(x, running_mean, running_var, weight, bias, training=not run.args.eval, eps=1e-5)
        out.backward(g)
    paths = dict(e["x"].paths(via=["xhat"]) if run.args.eval else e["x"].paths)
    total = np.sum(list(paths.values()), axis=0)
    dx, dweight, dbias, dxhat = (np.asarray(of) for of in (x.grad, weight.grad, bias.grad, e["xhat"].grad))
    xhat, ivar = e["xhat"].value, e["ivar"].value
    lost = 0 if run.args.eval else dxhat.mean(0) + xhat * (dxhat * xhat).mean(0)
    closed = ivar * (dxhat - lost)
    draw(run, e, paths)
    difference = max(np.abs(total - dx).max(), np.abs(closed - dx).max())

    run.print(
        "The input, and the gradient g of the loss with respect to the output:", show("x", x.numpy()), show("g", g)
    )
    run.print("\nRead values from top to bottom, gradients from bottom to top. Σ sums over the batch.")
    for name, (formula, rule) in (STEPS | IN_EVAL if run.args.eval else STEPS).items():
        if name in e:
            run.print(f"\n{name} = {formula}", show("value", e[name].value), f"  {rule}")
            if (gradient := e[name].grad) is not None:
                run.print(show("gradient", gradient))
    along = "one path" if run.args.eval else "four paths"
    run.print(f"\nx reaches the output along {along}. Its gradient is the sum of their shares:")
    for path, share in paths.items():
        run.print(f"\n{name_of(path)}: {path}", show("gradient", share))
    run.print("\nThe sum of the paths, the result of autograd, and the closed form")
    run.print(
        "  ∂x = ivar · " + ("∂xhat:\n" if run.args.eval else "(∂xhat − mean(∂xhat) − xhat · mean(∂xhat · xhat)):\n")
    )
    run.print(show("sum", total), show("autograd", dx), show("closed", closed))
    run.print(f"\nlargest difference: {difference:.2g}", "∂weight = Σ g · xhat, ∂bias = Σ g:")
    run.print(show("∂weight", dweight), show("∂bias", dbias))
    exact = 1e-12 * max(1, np.abs(dx).max(), np.abs(ivar * dxhat).max())  # a batch of equal numbers has large gradients
    run.claim("the sum of the paths, autograd and the closed form agree to 1e-12", difference < exact)
    if not run.args.eval:
        off = np.abs(dx.sum(0)).max()
        run.print(f"∂x sums to 0 over the batch ({off:.1g}): adding a constant to x changes nothing.")
        fourth = np.abs({name_of(path): share for path, share in paths.items()}["through mu and var"]).max()
        run.claim("the gradient of x sums to 0 over the batch, to 1e-12", off < exact)
        run.claim(
            "four paths lead from x to the output, and through mu and var it is 0", len(paths) == 4 and fourth < exact
        )
    return run.finish(difference=float(difference))


if __name__ == "__main__":
    start(lambda: main().code)
