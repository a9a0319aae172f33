"""Figure 1 of the paper: a sigmoid network learns much later without BatchNorm; and the inputs of one of its units.

Ioffe and Szegedy 2015, section 4.1: three layers of 100 sigmoids, batches of 60, small normal weights, gradient
descent. Left: accuracy, all seeds. Right: the 15th, 50th and 85th percentile of the input of one sigmoid in the last
hidden layer, over the validation images, for the first seed.
"""

from itertools import pairwise
from typing import Any

import numpy as np

from tinygrad_bn import Tensor, manual_seed, nn, no_grad, train, viz
from tinygrad_bn.tensor import Array
from tinygrad_bn.train.interval import interval

from .common import MODELS, Run
from .output import start

SIZES = (784, 100, 100, 100)
UNIT = 0


def build(batch_norm: bool, seed: int) -> nn.Sequential:
    """784-100-100-100-10, sigmoid, weights with a standard deviation of 0.1."""
    manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(SIZES):
        layers += [nn.Linear(fan_in, fan_out), *([nn.BatchNorm1d(fan_out)] if batch_norm else []), nn.Sigmoid()]
    model = nn.Sequential(*layers, nn.Linear(100, 10))
    for layer in model:
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            nn.init.normal_(layer.weight, std=0.1)
            nn.init.zeros_(layer.bias)
    return model


def sigmoid_input(model: Any, images: Array) -> Array:
    """The input of one sigmoid in the last hidden layer for each image (N,), in evaluation mode."""
    with nn.evaluating(model), no_grad():
        return np.asarray(model[:-2](Tensor(images)).numpy()[:, UNIT])


def main(argv: list[str] | None = None) -> Run:
    """Train both networks for each seed, measure after every epoch, and plot the figure."""
    run = Run(
        "paper_figure1", __doc__, argv,
        data="mnist5k", epochs=45, batch_size=60, lr=0.1, optimizer="sgd", seeds=10, check={"epochs": 10},
    )  # fmt: skip
    training, validation = run.images()
    steps = np.arange(run.args.epochs + 1) * -(-len(training) // run.args.batch_size)

    def measure(seed: int) -> tuple[list[list[float]], list[list[Array]]]:
        accuracy: list[list[float]] = []
        inputs: list[list[Array]] = []
        for name, batch_norm in MODELS.items():
            model = build(batch_norm, seed)
            untrained = train.evaluate(model, validation).accuracy
            measured = train.Measure(lambda training: sigmoid_input(training.model, validation.x))
            history = run.fit(model, training, validation, f"{name}, seed {seed}", seed=seed, callbacks=measured)
            inputs.append(measured.values)
            accuracy.append([untrained, *history["val_accuracy"]])
        return accuracy, inputs

    accuracy, inputs = (np.array(part) for part in zip(*run.each(measure, run.seeds), strict=True))  # by seed, model

    figure, grid = viz.subplots(1, 3, 14, 4.4)
    for j, name in enumerate(MODELS):
        viz.plot_seeds(grid[0, 0], steps, accuracy[:, j], name)
        viz.percentile_bands(grid[0, 1 + j], steps, inputs[0, j], name)
        grid[0, 1 + j].set(xlabel="step", ylabel="input of one sigmoid", title=name)
    grid[0, 1].sharey(grid[0, 2])
    grid[0, 0].set(xlabel="step", ylabel="validation accuracy", ylim=(0, 1), title=f"accuracy, {len(accuracy)} seeds")
    viz.legend_below(grid[0, 0])
    figure.suptitle("784-100-100-100-10, sigmoid: accuracy, and percentiles 15, 50, 85 of a unit's input")
    run.save(figure, "figure1")

    medians = np.median(inputs, axis=-1)
    drift = np.ptp(medians, axis=-1) / inputs[:, :, -1].std(axis=-1)  # by seed, model
    for j, name in enumerate(MODELS):
        run.print(
            f"{name:17} accuracy {interval(accuracy[:, j, -1])}; the sigmoid's median input drifts by "
            f"{interval(drift[:, j])} of its final standard deviation"
        )
    third = max(1, len(steps) // 3)
    ahead = accuracy[:, 1, third] - accuracy[:, 0, third]
    run.claim_mean(f"after {steps[third]:,} steps, accuracy is 0.2 higher with BatchNorm", ahead, above=0.2)
    run.claim_mean("with BatchNorm, the accuracy after training is above 0.85", accuracy[:, 1, -1], above=0.85)
    return run.finish(step=steps.tolist(), models=tuple(MODELS), accuracy=accuracy.tolist(), drift=drift.tolist())


if __name__ == "__main__":
    start(lambda: main().code)
