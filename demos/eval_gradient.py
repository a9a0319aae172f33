"""The gradient of BatchNorm in evaluation mode: each sample by itself, along one path instead of four.

In training, mean and deviation depend on each sample. The gradient of x is that of the direct path, weight / √(var +
eps) · g, minus its mean over the batch (the path through mu), minus its projection on xhat (through var). The fourth
path is 0. In evaluation the running statistics are constants, and only the direct path is left. That is right there:
a change of one sample changes no other output. But a training with frozen statistics loses what the other paths do:
with them no step can shift or stretch the output of BatchNorm. So it diverges at learning rates that suit the
statistics of each batch. At small rates it is as fast, or faster.
"""

from itertools import pairwise

import numpy as np

from tinygrad_bn import Tensor, functional, grad, manual_seed, nn, optim, train, viz
from tinygrad_bn.tensor import Array
from tinygrad_bn.train.interval import interval

from .common import Run
from .output import start

WAYS = ("statistics of each batch", "frozen statistics")
RATES = (0.01, 0.1, 1.0, 10.0)
DIRECT, MEAN, PROJECTION, WHOLE = PARTS = (
    "direct: the gradient in evaluation", "through mu: minus its mean", "through var: minus its projection on xhat",
    "their sum: the gradient in training",
)  # fmt: skip


def layer(seed: int, n: int = 8) -> tuple[nn.BatchNorm1d, Tensor, Array]:
    """A BatchNorm of one channel whose running statistics are those of the batch x (n, 1), and a cotangent."""
    rng = np.random.default_rng(seed)
    x, g = Tensor(rng.normal(3, 2, (n, 1)), requires_grad=True), rng.normal(size=(n, 1))
    bn = nn.BatchNorm1d(1, momentum=1.0, running_var_correction=0).astype(np.float64)
    bn(x)
    return bn, x, g


def gradient(bn: nn.BatchNorm1d, x: Tensor, g: Array, training: bool) -> Array:
    """The gradient of x (n, 1) in training or in evaluation mode."""
    return grad(bn.train(training)(x), x, g).numpy()


def jacobian(bn: nn.BatchNorm1d, x: Tensor, training: bool) -> Array:
    """∂out[i] / ∂x[j], (n, n)."""
    return np.array([gradient(bn, x, row[:, None], training)[:, 0] for row in np.eye(len(x))])


def parts(bn: nn.BatchNorm1d, x: Tensor, g: Array) -> dict[str, Array]:
    """The gradient in evaluation, the parts that it lacks, and the gradient in training, (n, 1) each."""
    direct, xhat = gradient(bn, x, g, False), functional.batch_norm_steps(x, eps=bn.eps).xhat.numpy()
    mean, projection = np.full(x.shape, -direct.mean()), -xhat * (direct * xhat).mean()
    return dict(zip(PARTS, (direct, mean, projection, gradient(bn, x, g, True)), strict=True))


def build(seed: int) -> nn.Sequential:
    """784-100-100-10 with BatchNorm and ReLU."""
    manual_seed(seed)
    hidden = [[nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()] for a, b in pairwise((784, 100, 100))]
    return nn.Sequential(nn.Flatten(), *(module for block in hidden for module in block), nn.Linear(100, 10))


def main(argv: list[str] | None = None) -> Run:
    """Compare the gradients of one layer, then trainings by the statistics of each batch and by frozen ones."""
    run = Run("eval_gradient", __doc__, argv, data="mnist5k", epochs=3, batch_size=100, seeds=10, check={"epochs": 1})
    training, validation = run.images(check=1500)

    def trained(seed: int, lr: float, way: str) -> float:
        model = build(seed)
        train.recalibrate(model, training)  # so that frozen statistics fit at the start
        for norm in model:
            if isinstance(norm, nn.BatchNorm1d) and way == WAYS[1]:
                norm.freeze(affine=False)
        run.fit(model, training, seed=seed, optimizer=optim.SGD(model.parameters(), lr=lr), drop_last=True)
        return train.evaluate(model, validation).accuracy

    def measure(seed: int) -> tuple[list[float], list[list[float]]]:
        bn, x, g = layer(seed)
        part = parts(bn, x, g)
        missing = np.abs(part[WHOLE] - part[DIRECT] - part[MEAN] - part[PROJECTION]).max()
        coupling = [float(np.abs(j - np.diag(np.diag(j))).max()) for j in (jacobian(bn, x, t) for t in (True, False))]
        return [float(missing), *coupling], [[trained(seed, lr, way) for way in WAYS] for lr in RATES]

    facts, accuracy = (np.array(part) for part in zip(*run.each(measure, run.seeds, "seeds"), strict=True))
    bn, x, g = layer(run.args.seed)
    matrices = jacobian(bn, x, True), jacobian(bn, x, False)
    figure, grid = viz.subplots(1, 4, 17, 4.6)
    for axes, j, title in zip(grid[0], matrices, ("training", "evaluation"), strict=False):
        image = axes.imshow(j, cmap="RdBu", vmin=-1, vmax=1)
        axes.set(title=f"{title}: ∂out[i] / ∂x[j]", xlabel="j", ylabel="i")
        axes.grid(visible=False)
    figure.colorbar(image, ax=grid[0, 1], shrink=0.7)
    for i, (name, values) in enumerate(parts(bn, x, g).items()):
        hue = [*viz.COLOURS[:3], "0.3"][i]
        grid[0, 2].bar(np.arange(len(x)) + 0.2 * (i - 1.5), values[:, 0], 0.2, label=name, color=hue)
    grid[0, 2].axhline(0, color="0.3", linewidth=1)
    grid[0, 2].set(title="the gradient of x for one g", xlabel="sample")
    for i, way in enumerate(WAYS):
        viz.plot_seeds(grid[0, 3], RATES, accuracy[..., i], way, style="o-", hue=viz.COLOURS[4 + i])
    grid[0, 3].set(title="validation accuracy", xlabel="learning rate", xscale="log", ylim=(0, 1))
    grid[0, 3].legend(frameon=False, loc="lower left")
    figure.legend(*grid[0, 2].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=4)
    run.save(figure, "eval_gradient")

    rows = [[f"{lr:g}", *(str(interval(accuracy[:, i, j])) for j in range(2))] for i, lr in enumerate(RATES)]
    run.print(run.table(("learning rate", *WAYS), rows, caption="validation accuracy"))
    run.claim_mean("the three paths add up to the gradient in training, to", facts[:, 0], below=1e-12)
    run.claim("in training an output depends on other samples too", (facts[:, 1] > 0.01).all())
    run.claim("in evaluation it depends on its own sample alone", (facts[:, 2] == 0).all())
    lead = accuracy[..., 0] - accuracy[..., 1]
    run.claim_mean(
        f"at a rate of {RATES[0]:g} frozen statistics are not behind; lead of batch statistics", lead[:, 0], below=0.05
    )
    run.claim_mean(f"at a rate of {RATES[-2]:g} they are; lead of batch statistics", lead[:, -2], above=0.1)
    return run.finish(rates=RATES, ways=WAYS, facts=facts.tolist(), accuracy=accuracy.tolist())


if __name__ == "__main__":
    start(lambda: main().code)
