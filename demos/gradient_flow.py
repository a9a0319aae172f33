"""Gradient flow: vanishing and exploding gradients in twenty layers; BatchNorm helps with both, clipping with one.

784-100×19-10 with sigmoid, tanh or ReLU. Initial weights are normal with standard deviation gain/√fan_in, with a small
or a large gain. First: the norm of each layer's weight gradient before training. Then: the accuracy after gradient
descent with momentum, without BatchNorm, with gradients clipped to a norm of 1, and with BatchNorm.
"""

import math
from itertools import pairwise

import numpy as np

from demos.common import MODELS, Run
from tinygrad_bn import Tensor, datasets, functional, manual_seed, nn, optim, train, viz
from tinygrad_bn.tensor import Array

ACTIVATIONS: dict[str, type[nn.Module]] = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "ReLU": nn.ReLU}
GAINS = {"small": {"sigmoid": 1.0, "tanh": 0.5, "ReLU": 0.5}, "large": {"sigmoid": 20.0, "tanh": 2.0, "ReLU": 2.0}}
METHODS = ("without BatchNorm", "with clipping", "with BatchNorm")


def build(activation: str, weights: str, batch_norm: bool, seed: int) -> nn.Sequential:
    """Nineteen hidden layers with small or large weights, and an output layer."""
    manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise((784, *[100] * 19)):
        linear = nn.Linear(fan_in, fan_out, bias=False)
        nn.init.normal_(linear.weight, std=GAINS[weights][activation] / math.sqrt(fan_in))
        layers += [linear, *([nn.BatchNorm1d(fan_out)] if batch_norm else []), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers, nn.Linear(100, 10))


def norms(model: nn.Sequential, data: datasets.Dataset) -> Array:
    """The norm of the gradient of each layer's weights (20,)."""
    functional.cross_entropy(model(Tensor(data.x)), data.y).backward()
    gradients = [layer.weight.grad for layer in model if isinstance(layer, nn.Linear)]
    return np.array([np.linalg.norm(np.asarray(g, np.float64)) for g in gradients])


def main(argv: list[str] | None = None) -> Run:
    """Measure the gradients of twelve networks, then train them, and six of them also with clipping."""
    run = Run(
        "gradient_flow", __doc__, argv,
        data="mnist5k", epochs=5, batch_size=100, lr=0.03, check={"epochs": 1, "batch_size": 50},
    )  # fmt: skip
    training, validation = run.images()
    training = training.take(np.arange(min(2000, len(training)))) if run.args.check else training
    cases = [(activation, weights) for activation in ACTIVATIONS for weights in GAINS]
    norm: dict[tuple[str, ...], Array] = {}
    loss: dict[tuple[str, ...], float] = {}
    accuracy: dict[tuple[str, ...], float] = {}
    with np.errstate(over="ignore", invalid="ignore"):  # exploding activations overflow
        for activation, weights in run.track(cases, "networks"):
            for method in METHODS:
                key = activation, weights, method
                model = build(activation, weights, method == "with BatchNorm", run.args.seed)
                norm[key] = norms(model, training.take(np.arange(min(200, len(training)))))
                history = run.fit(
                    model, training, None, method, progress=False, nonfinite="ignore",
                    optimizer=optim.SGD(model.parameters(), lr=run.args.lr, momentum=0.9),
                    clip_norm=1.0 if method == "with clipping" else None,
                    callbacks=lambda history, _: not math.isfinite(history["loss"][-1]),
                )  # fmt: skip
                train.recalibrate(model, training.x)  # running statistics lag behind after short training
                loss[key], accuracy[key] = history["loss"][-1], train.evaluate(model, validation).accuracy

    print("gradient norms, layers 1 → 19; accuracy without BatchNorm, with clipping, with BatchNorm")
    print(f"{'':16}{'without BatchNorm':>20}  {'with BatchNorm':>20}    accuracy")
    for case in cases:
        ends = [f"{norm[*case, name][0]:.1e} → {norm[*case, name][-2]:.1e}" for name in MODELS]
        reached = " ".join(f"{accuracy[*case, method]:.3f}" for method in METHODS)
        print(f"{', '.join(case):16}{ends[0]:>20}  {ends[1]:>20}    {reached}")

    figure, grid = viz.subplots(2, 3, 13, 7.6, sharey="row")
    for (above, below), activation in zip(grid.T, ACTIVATIONS, strict=True):
        for weights, style in zip(GAINS, ("--", "-"), strict=True):
            for name in MODELS:
                line, hue = norm[activation, weights, name], viz.colour(name)
                above.semilogy(range(1, 21), line, style, color=hue, label=f"{name}, {weights} weights")
        for i, method in enumerate(METHODS):
            heights = [accuracy[activation, weights, method] for weights in GAINS]
            below.bar(np.arange(2) + 0.27 * (i - 1), heights, 0.25, color=viz.colour(method, 4), label=method)
        below.set_axisbelow(True)
        above.set(title=activation, xlabel="layer", xticks=range(2, 21, 3))
        below.set_xticks(range(2), [f"{weights} weights" for weights in GAINS])
    grid[0, 0].set_ylabel("norm of the gradient before training")
    grid[1, 0].set(ylabel="validation accuracy", ylim=(0, 1))
    grid[0, 1].legend(frameon=False, loc="lower center")
    viz.legend_below(grid[1, 0])
    figure.suptitle(f"Twenty layers on {run.args.data}, epochs: {run.args.epochs}")
    run.save(figure, "gradient_flow")

    run.console.print(
        "Clipping multiplies all gradients by one factor, 1 or less. It shortens steps that would overshoot, but does "
        "not help vanished gradients, and does not change the ratios between layers."
    )
    first = [norm[activation, "small", "without BatchNorm"][0] for activation in ACTIVATIONS]
    whole = {name: np.array([np.linalg.norm(norm[a, "large", name]) for a in ACTIVATIONS]) for name in MODELS}
    best = [accuracy[*case, "with BatchNorm"] > max(accuracy[*case, m] for m in METHODS[:2]) for case in cases]
    run.claim("small weights: the gradient of the first layer vanishes, to less than 0.0001", max(first) < 1e-4)
    run.claim("large weights: gradients are larger without BatchNorm than with it", all(np.greater(*whole.values())))
    stuck = all(accuracy[activation, "small", "with clipping"] < 0.2 for activation in ACTIVATIONS)
    run.claim("clipping does not help vanished gradients: the accuracy is that of guessing", stuck)
    finite = [math.isfinite(loss["ReLU", "large", method]) for method in METHODS[:2]]
    run.claim("clipping prevents overflow in the ReLU network with large weights", finite == [False, True])
    run.claim("BatchNorm helps with both, and has the best accuracy in all six networks", all(best))
    return run.finish(
        gradient={", ".join(key): values.tolist() for key, values in norm.items()},
        accuracy={", ".join(key): value for key, value in accuracy.items()},
    )


if __name__ == "__main__":
    main()
