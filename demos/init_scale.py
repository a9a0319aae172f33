"""Initial weights: with BatchNorm a network trains from far more scales of initial weights, but not faster from each.

The experiment of 'Deep Learning from Scratch', chapter 6: 784-100-100-100-100-100-10, ReLU, normal weights with a
standard deviation from 1 to 0.0001, the first 1,000 images, batches of 100, gradient descent, learning rate 0.01.
Where the weights happen to suit the network, near 0.29, it trains faster without BatchNorm.
"""

from itertools import pairwise

import numpy as np

from tinygrad_bn import manual_seed, nn, viz
from tinygrad_bn.train.interval import interval

from .common import MODELS, Run
from .output import start

SCALES = np.logspace(0, -4, num=16)
SUITS = 2  # the index of the scale that suits the network without BatchNorm
LEARNED = 0.5  # a network has learned if its accuracy on the training images is above this
SIZES = (784, 100, 100, 100, 100, 100, 10)


def build(batch_norm: bool, std: float, seed: int) -> nn.Sequential:
    """The network with normal weights of standard deviation `std` and biases of 0, as in the book."""
    manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(SIZES[:-1]):
        layers += [nn.Linear(fan_in, fan_out), *([nn.BatchNorm1d(fan_out)] if batch_norm else []), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(SIZES[-2], SIZES[-1]))
    for layer in model:
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
    return model


def main(argv: list[str] | None = None) -> Run:
    """Train both networks from each scale, and plot their accuracy on the training images."""
    run = Run(
        "init_scale", __doc__, argv,
        data="mnist5k", epochs=20, batch_size=100, lr=0.01, optimizer="sgd", seeds=10, check={"epochs": 8},
    )  # fmt: skip
    images, _ = run.images()
    training = images.take(np.arange(min(1000, len(images))))
    scales = SCALES[SUITS::3] if run.args.check else SCALES

    def panels(seed: int) -> list[list[list[float]]]:
        return [
            [run.fit(build(bn, std, seed), training, None, name, seed=seed)["accuracy"] for std in scales.tolist()]
            for name, bn in MODELS.items()
        ]

    curves = np.array(run.each(panels, run.seeds, "seeds"))  # by seed, model, scale, epoch
    rows = -(-len(scales) // 4)
    figure, grid = viz.subplots(rows, 4, 11, 2.5 * rows + 0.7, sharex=True, sharey=True)
    for axes in grid.flat[len(scales) :]:
        axes.set_axis_off()
    for i, (axes, std) in enumerate(zip(grid.flat, scales, strict=False)):
        for name, lines in zip(MODELS, curves[:, :, i].swapaxes(0, 1), strict=True):
            viz.plot_seeds(axes, range(1, lines.shape[1] + 1), lines, name)
        axes.set(title=f"std {std:.2g}", ylim=(0, 1.02))
        axes.set_xlabel("epoch" if i + 4 >= len(scales) else "")
        axes.tick_params(labelbottom=i + 4 >= len(scales))
    figure.supylabel("accuracy on the training images, in training mode")
    viz.legend_below(grid[0, 0])
    run.save(figure, "panels")

    final = curves[..., -1]
    table = [
        [f"{std:.2g}", *(str(interval(final[:, j, i])) for j in range(len(MODELS)))] for i, std in enumerate(scales)
    ]
    run.print(run.table(("std", *MODELS), table, caption="accuracy of the last epoch, 95 % interval"))
    learned = (final > LEARNED).sum(axis=2)
    suits = final[:, :, list(scales).index(SCALES[SUITS])]
    run.claim_mean(
        f"of {len(scales)} scales, more exceed an accuracy of {LEARNED} with BatchNorm",
        learned[:, 1] - learned[:, 0], above=0,
    )  # fmt: skip
    run.claim_mean(
        f"BatchNorm loses where the weights suit the network: at {SCALES[SUITS]:.2f}, accuracy is higher without it",
        suits[:, 0] - suits[:, 1], above=0,
    )  # fmt: skip
    return run.finish(deviation=scales.tolist(), models=tuple(MODELS), accuracy=final.tolist())


if __name__ == "__main__":
    start(lambda: main().code)
