"""BatchNorm against LayerNorm: over what they average, what that couples in the backward pass, and small batches.

Both subtract a mean and divide by a deviation: BatchNorm those of a channel over the batch, LayerNorm those of a sample
over its channels. So the same backward pass runs along the other axis. With BatchNorm the gradient of x sums to 0 over
the batch, in each channel, and samples act on each other. With LayerNorm it sums to 0 over the channels, in each
sample, and no sample knows of another. LayerNorm is the same in evaluation, and does not mind a batch of two.
"""

from itertools import pairwise

import numpy as np

from tinygrad_bn import Tensor, functional, grad, manual_seed, nn, optim, train, viz
from tinygrad_bn.tensor import Array
from tinygrad_bn.train.interval import interval

from .common import Run, recalibrate
from .output import start

NORMS = {"BatchNorm": nn.BatchNorm1d, "LayerNorm": nn.LayerNorm, "none": None}


def normalised(name: str, x: Tensor) -> Tensor:
    """x (N, C), normalised without weight and bias."""
    return functional.batch_norm(x, training=True) if name == "BatchNorm" else functional.layer_norm(x, x.shape[1])


def jacobian(name: str, x: Tensor) -> Array:
    """∂out / ∂x for x (N, C), whose elements are taken sample by sample: (N · C, N · C)."""
    y = normalised(name, x)
    return np.array([grad(y, x, row.reshape(x.shape)).numpy().ravel() for row in np.eye(x.size)])


def sums(name: str, seed: int) -> tuple[float, float]:
    """The largest sum of a gradient of x, over the batch and over the channels."""
    rng = np.random.default_rng(seed)
    x = Tensor(rng.normal(3, 2, (4, 3)), requires_grad=True)
    g = grad(normalised(name, x), x, rng.normal(size=(4, 3))).numpy()
    return float(np.abs(g.sum(axis=0)).max()), float(np.abs(g.sum(axis=1)).max())


def build(name: str, seed: int) -> nn.Sequential:
    """784-100-100-100-10 with ReLU, and the normalisation before it."""
    manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise((784, 100, 100, 100)):
        norm = NORMS[name]
        layers += [nn.Linear(fan_in, fan_out), *([norm(fan_out)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(100, 10))


def main(argv: list[str] | None = None) -> Run:
    """Draw what depends on what, then train with each normalisation in batches of each size."""
    run = Run(
        "layer_norm", __doc__, argv,
        data="mnist5k", epochs=1, batch_size=128, lr=1e-3, seeds=10,
    )  # fmt: skip
    training, validation = run.images(check=1200)
    sizes = (2, 8, 32, run.args.batch_size)

    def trained(seed: int, name: str, size: int) -> float:
        model = build(name, seed)
        optimizer = optim.Adam(model.parameters(), lr=run.args.lr)
        run.fit(model, training, seed=seed, optimizer=optimizer, batch_size=size, drop_last=True)
        recalibrate(model, training)  # running statistics lag behind after few steps
        return train.evaluate(model, validation).accuracy

    def measure(seed: int) -> list[list[float]]:
        return [[trained(seed, name, size) for size in sizes] for name in NORMS]

    accuracy = np.array(run.each(measure, run.seeds, "seeds"))  # by seed, normalisation, size
    figure, grid = viz.subplots(1, 3, 14, 4.6)
    x = Tensor(np.random.default_rng(run.args.seed).normal(3, 2, (4, 3)), requires_grad=True)
    for axes, name in zip(grid[0], ("BatchNorm", "LayerNorm"), strict=False):
        image = axes.imshow(jacobian(name, x), cmap="RdBu", vmin=-0.5, vmax=0.5)
        axes.set(title=f"{name}: ∂out / ∂x", xlabel="x: 4 samples of 3 channels", ylabel="out")
        axes.set_xticks(np.arange(4) * 3 + 1, [f"sample {i + 1}" for i in range(4)])
        axes.set_yticks(np.arange(4) * 3 + 1, [f"sample {i + 1}" for i in range(4)], rotation=90, va="center")
        axes.grid(visible=False)
        for edge in (2.5, 5.5, 8.5):
            axes.axhline(edge, color="0.6", linewidth=0.5)
            axes.axvline(edge, color="0.6", linewidth=0.5)
    figure.colorbar(image, ax=grid[0, 1], shrink=0.7, extend="both")
    for i, name in enumerate(NORMS):
        viz.plot_seeds(grid[0, 2], sizes, accuracy[:, i], name, style="o-", hue=viz.COLOURS[(1, 2, 0)[i]])
    grid[0, 2].set_xscale("log", base=2)
    grid[0, 2].set(
        title=f"epochs: {run.args.epochs}, seeds: {len(accuracy)}",
        xlabel="samples in a batch",
        ylabel="validation accuracy",
    )
    grid[0, 2].set(ylim=(0, 1), xticks=sizes, xticklabels=sizes)
    grid[0, 2].legend(frameon=False, loc="lower right")
    run.save(figure, "layer_norm")

    rows = [[f"{n}", *(str(interval(accuracy[:, i, j])) for i in range(len(NORMS)))] for j, n in enumerate(sizes)]
    run.print(run.table(("batch", *NORMS), rows, caption="validation accuracy"))
    over = {name: np.array([sums(name, seed) for seed in run.seeds]) for name in ("BatchNorm", "LayerNorm")}
    (batch, layer, _), blocks = accuracy.swapaxes(0, 1), np.kron(np.eye(4), np.ones((3, 3))) > 0
    run.claim("BatchNorm: the gradient of x sums to 0 over the batch, not over channels", agrees(over["BatchNorm"], 0))
    run.claim("LayerNorm: it sums to 0 over the channels, not over the batch", agrees(over["LayerNorm"], 1))
    run.claim("LayerNorm couples no two samples", not jacobian("LayerNorm", x)[~blocks].any())
    run.claim_mean("in batches of 2 LayerNorm is ahead, by", layer[:, 0] - batch[:, 0], above=0.05)
    nearer = (layer[:, 0] - batch[:, 0]) - np.abs(layer[:, 2] - batch[:, 2])
    run.claim_mean(
        "in batches of 32 the two are nearer to each other, by", nearer, above=0.05, learned=(batch[:, 2], layer[:, 2])
    )
    return run.finish(norms=tuple(NORMS), sizes=sizes, accuracy=accuracy.tolist())


def agrees(over: Array, zero: int) -> bool:
    """Whether one of two columns is 0 but for rounding, and the other is not."""
    return bool((over[:, zero] < 1e-12).all() and (over[:, 1 - zero] > 1e-3).all())


if __name__ == "__main__":
    start(lambda: main().code)
