"""Figure 1 of the paper: a sigmoid network learns much later without BatchNorm; and the inputs of one of its units.

Ioffe and Szegedy 2015, section 4.1: three layers of 100 sigmoids, batches of 60, small normal weights, gradient
descent. Left: accuracy. Right: the 15th, 50th and 85th percentile of the input of one sigmoid in the last hidden layer,
over the validation images.
"""

from itertools import pairwise

import numpy as np

from demos.common import MODELS, Run
from tinygrad_bn import Tensor, manual_seed, nn, no_grad, train, viz
from tinygrad_bn.tensor import Array

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


def sigmoid_input(model: nn.Sequential, images: Array) -> Array:
    """The input of one sigmoid in the last hidden layer for each image (N,), in evaluation mode."""
    with nn.evaluating(model), no_grad():
        return np.asarray(model[:-2](Tensor(images)).numpy()[:, UNIT])


def main(argv: list[str] | None = None) -> Run:
    """Train both networks, measure after every epoch, and plot the figure."""
    run = Run(
        "paper_figure1", __doc__, argv,
        data="mnist5k", epochs=45, batch_size=60, lr=0.1, optimizer="sgd", check={"epochs": 10},
    )  # fmt: skip
    training, validation = run.images()
    steps = np.arange(run.args.epochs + 1) * -(-len(training) // run.args.batch_size)
    accuracy: dict[str, list[float]] = {}
    inputs: dict[str, list[Array]] = {}
    for name, batch_norm in MODELS.items():
        model = build(batch_norm, run.args.seed)
        accuracy[name] = [train.evaluate(model, validation).accuracy]
        inputs[name] = []
        save = inputs[name].append
        history = run.fit(
            model, training, validation, name, callbacks=lambda _, m, save=save: save(sigmoid_input(m, validation.x))
        )
        accuracy[name] += history["val_accuracy"]

    figure, grid = viz.subplots(1, 3, 14, 4.4)
    for axes, (name, values) in zip(grid[0, 1:], inputs.items(), strict=True):
        grid[0, 0].plot(steps, accuracy[name], color=viz.colour(name), label=name)
        viz.percentile_bands(axes, steps[1:], np.array(values), name)
        axes.set(xlabel="step", title=f"input of one sigmoid, {name}")
    grid[0, 1].sharey(grid[0, 2])
    grid[0, 0].set(xlabel="step", ylabel="validation accuracy", ylim=(0, 1))
    viz.legend_below(grid[0, 0])
    figure.suptitle("784-100-100-100-10, sigmoid: accuracy, and percentiles 15, 50, 85 of a unit's input")
    run.save(figure, "figure1")

    drift = {}
    for name, values in inputs.items():
        medians = np.array([np.median(v) for v in values])
        drift[name] = float(np.ptp(medians) / np.std(values[-1]))
        print(
            f"{name:17} accuracy {accuracy[name][-1]:.3f}; the sigmoid's median input drifts by "
            f"{np.ptp(medians):.2f}, that is {drift[name]:.2f} of its final standard deviation"
        )
    third = len(steps) // 3
    ahead = accuracy["with BatchNorm"][third] - accuracy["without BatchNorm"][third]
    run.claim(f"after {steps[third]:,} steps, accuracy is 0.2 higher with BatchNorm", ahead > 0.2)
    run.claim("with BatchNorm, it reaches 0.85", accuracy["with BatchNorm"][-1] >= 0.85)
    return run.finish(step=steps.tolist(), accuracy=accuracy, drift_of_the_median=drift)


if __name__ == "__main__":
    main()
