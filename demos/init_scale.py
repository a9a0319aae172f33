"""Initial weights: how a network trains from sixteen scales of initial weights, with and without BatchNorm.

The experiment of 'Deep Learning from Scratch', chapter 6: 784-100-100-100-100-100-10, ReLU, normal weights with a
standard deviation from 1 to 0.0001, the first 1,000 images, batches of 100, gradient descent, learning rate 0.01.
"""

from itertools import pairwise

import numpy as np

from demos.common import MODELS, Run
from tinygrad_bn import manual_seed, nn, viz

SCALES = np.logspace(0, -4, num=16)
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
    """Train 32 networks and plot their accuracy on the training images."""
    run = Run(
        "init_scale", __doc__, argv,
        data="mnist5k", epochs=20, batch_size=100, lr=0.01, optimizer="sgd", check={"epochs": 8},
    )  # fmt: skip
    images, _ = run.images()
    training = images.take(np.arange(min(1000, len(images))))

    curves: dict[str, list[list[float]]] = {name: [] for name in MODELS}
    with np.errstate(over="ignore", invalid="ignore"):  # the largest weights overflow
        for std in run.track(SCALES.tolist(), "panels"):
            for name, batch_norm in MODELS.items():
                model = build(batch_norm, std, run.args.seed)
                history = run.fit(model, training, None, name, progress=False, nonfinite="ignore")
                curves[name].append(history["accuracy"])

    figure, grid = viz.subplots(4, 4, 11, 10, sharex=True, sharey=True)
    for i, (axes, std) in enumerate(zip(grid.flat, SCALES, strict=True)):
        for name, lines in curves.items():
            axes.plot(range(1, len(lines[i]) + 1), lines[i], color=viz.colour(name), label=name)
        axes.set(title=f"std {std:.2g}", ylim=(0, 1.02))
    for axes in grid[-1]:
        axes.set_xlabel("epoch")  # not supxlabel, which the legend would cover
    figure.supylabel("accuracy on the training images, in training mode")
    viz.legend_below(grid[0, 0])
    run.save(figure, "panels")

    final = {name: [line[-1] for line in lines] for name, lines in curves.items()}
    run.console.print("std               " + " ".join(f"{std:6.2g}" for std in SCALES), soft_wrap=True)
    for name, values in final.items():
        print(f"{name:17} " + " ".join(f"{value:6.2f}" for value in values))
    learned = {name: sum(value > 0.5 for value in values) for name, values in final.items()}
    run.claim("without BatchNorm at most 4 of 16 networks exceed an accuracy of 0.5", learned["without BatchNorm"] <= 4)
    run.claim("with BatchNorm at least 8 do", learned["with BatchNorm"] >= 8)
    return run.finish(deviation=SCALES.tolist(), accuracy=final)


if __name__ == "__main__":
    main()
