"""For learners: the backward pass of BatchNorm, step by step, with every value and gradient.

A batch of five samples with two channels passes through BatchNorm. For each step of the forward pass, the demo prints
its formula and value, and the formula and value of its gradient. Then it prints the gradients along the three paths
from x to the output, their sum, and the closed form. The figure shows the steps, and the three paths for one channel.
"""

import numpy as np

from tinygrad_bn import Tensor, functional, viz
from tinygrad_bn.tensor import Array

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
DIRECT, VARIANCE, MEAN = PATHS = ("x → xmu → xhat → out", "x → xmu → sq → var → … → out", "x → mu → xmu → … → out")
PLACES = {  # of the steps in the figure
    "x": (0, 1), "mu": (0.5, 2), "xmu": (1, 1), "sq": (1, 0), "var": (2, 0), "sqrtvar": (3, 0), "ivar": (3, 1),
    "xhat": (2, 1), "gammax": (2, 2), "out": (3, 2),
}  # fmt: skip
ARROWS = (
    ("x", "xmu", DIRECT), ("xmu", "xhat", DIRECT), ("xhat", "gammax", DIRECT), ("gammax", "out", DIRECT),
    ("xmu", "sq", VARIANCE), ("sq", "var", VARIANCE), ("var", "sqrtvar", VARIANCE), ("sqrtvar", "ivar", VARIANCE),
    ("ivar", "xhat", VARIANCE), ("x", "mu", MEAN), ("mu", "xmu", MEAN),
)  # fmt: skip


def show(label: str, array: Array) -> str:
    """An array, indented under its label."""
    text = np.array2string(array, precision=4, suppress_small=True, sign=" ")
    return f"  {label:9}" + text.replace("\n", "\n" + " " * 11)


def draw(run: Run, value: dict[str, Array], grad: dict[str, Array], paths: dict[str, Array]) -> None:
    """Left the steps of one sample and channel, with value and gradient; right the paths of each sample."""
    figure, ((steps, bars),) = viz.subplots(1, 2, 14, 5.6)
    colours = dict(zip(PATHS, viz.COLOURS, strict=False))
    for name, place in PLACES.items():
        numbers = (np.broadcast_to(of[name], (5, 2))[0, 0] for of in (value, grad))
        steps.annotate(
            "{}\n{:.3f}\n∂ {:.3f}".format(name, *numbers), place, ha="center", va="center", fontsize=10,
            bbox={"boxstyle": "round", "facecolor": "white", "edgecolor": "0.6"},
        )  # fmt: skip
    for tail, head, path in ARROWS:
        arrow = {"arrowstyle": "-|>", "color": colours[path], "linewidth": 2, "shrinkA": 30, "shrinkB": 30}
        steps.annotate("", PLACES[head], PLACES[tail], arrowprops=arrow)
    steps.set(xlim=(-0.4, 3.4), ylim=(-0.4, 2.4), title="the steps for sample 1, channel 1: value and gradient ∂")
    steps.set_axis_off()
    samples = np.arange(1, 6)
    for i, (path, gradient) in enumerate(paths.items()):
        bars.bar(samples + 0.2 * (i - 1.5), gradient[:, 0], 0.2, color=colours[path], label=path)
    bars.bar(samples + 0.3, grad["x"][:, 0], 0.2, color="0.3", label="their sum: ∂x")
    bars.axhline(0, color="0.3", linewidth=1)
    bars.set(xlabel="sample", ylabel="gradient", title="the gradient of x in channel 1, along three paths")
    viz.legend_below(bars)
    run.save(figure, "steps")


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

    tensors = {"x": x, **steps._asdict()}
    value = {name: t.numpy() for name, t in tensors.items()}
    grad = {name: np.asarray(t.grad) for name, t in tensors.items()}
    n, xhat, ivar, dxhat = len(x), value["xhat"], value["ivar"], grad["xhat"]
    along = (dxhat * ivar, grad["sq"] * 2 * value["xmu"], np.broadcast_to(grad["mu"] / n, x.shape))
    paths = dict(zip(PATHS, along, strict=True))
    total = np.sum(along, axis=0)
    closed = ivar / n * (n * dxhat - dxhat.sum(0) - xhat * (dxhat * xhat).sum(0))
    difference = max(np.abs(total - grad["x"]).max(), np.abs(closed - grad["x"]).max())
    draw(run, value, grad, paths)

    run.print(
        "The input, and the gradient g of the loss with respect to the output:", show("x", value["x"]), show("g", g)
    )
    run.print("\nRead values from top to bottom, gradients from bottom to top. Σ sums over the batch.")
    for name, (formula, gradient) in STEPS.items():
        run.print(f"\n{name} = {formula}", show("value", value[name]), f"  {gradient}", show("gradient", grad[name]))
    run.print("\nx reaches the output along three paths. Its gradient is the sum of the gradients along them:")
    for path, gradient in paths.items():
        run.print(f"\n{path}", show("gradient", gradient))
    run.print("\nThe sum of the paths, the result of autograd, and the closed form")
    run.print("  ∂x = ivar / N · (N ∂xhat − Σ ∂xhat − xhat · Σ (∂xhat · xhat)):\n")
    run.print(show("sum", total), show("autograd", grad["x"]), show("closed", closed))
    run.print(f"\nlargest difference: {difference:.2g}", "∂weight = Σ g · xhat, ∂bias = Σ g:")
    run.print(show("∂weight", np.asarray(weight.grad)), show("∂bias", np.asarray(bias.grad)))
    off = np.abs(grad["x"].sum(0)).max()
    run.print(f"∂x sums to 0 over the batch ({off:.1g}): adding a constant to x changes nothing.")
    run.claim("the sum of the paths, autograd and the closed form agree to 1e-12", difference < 1e-12)
    run.claim("the gradient of x sums to 0 over the batch, to 1e-12", off < 1e-12)
    return run.finish(difference=float(difference))


if __name__ == "__main__":
    start(lambda: main().code)
