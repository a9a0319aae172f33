"""Gradient flow: with BatchNorm the scale of the weights no longer matters, but gradients grow with depth.

784-100×19-10 with sigmoid, tanh or ReLU. Initial weights are normal with standard deviation gain/√fan_in, with a small
or a large gain. With BatchNorm, a gain of half the size doubles the gradient, at any depth: nothing vanishes. But
gradients grow on the way back, with ReLU by about 1.2 for each layer (Yang et al. 2019, arXiv:1902.08129). Twenty
layers still train; in a hundred, the gradient of the first layer is beyond a million.
"""

import math
from itertools import pairwise

import numpy as np

from tinygrad_bn import Tensor, datasets, functional, manual_seed, nn, optim, train, viz
from tinygrad_bn.tensor import Array
from tinygrad_bn.train.interval import interval, number

from .common import MODELS, Run, recalibrate
from .output import start

ACTIVATIONS: dict[str, type[nn.Module]] = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "ReLU": nn.ReLU}
GAINS = {"small": {"sigmoid": 1.0, "tanh": 0.5, "ReLU": 0.5}, "large": {"sigmoid": 20.0, "tanh": 2.0, "ReLU": 2.0}}
METHODS = ("without BatchNorm", "with clipping", "with BatchNorm")
CASES = [(activation, weights) for activation in ACTIVATIONS for weights in GAINS]
DEPTHS = (10, 20, 40, 70, 100)


def build(activation: str, weights: str, batch_norm: bool, seed: int, depth: int = 20) -> nn.Sequential:
    """`depth` layers with small or large weights; the last is the output layer."""
    manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise((784, *[100] * (depth - 1))):
        linear = nn.Linear(fan_in, fan_out, bias=False)
        nn.init.normal_(linear.weight, std=GAINS[weights][activation] / math.sqrt(fan_in))
        layers += [linear, *([nn.BatchNorm1d(fan_out)] if batch_norm else []), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers, nn.Linear(100, 10))


def norms(model: nn.Sequential, data: datasets.Dataset) -> Array:
    """The norm of the gradient of each layer's weights (depth,)."""
    functional.cross_entropy(model(Tensor(data.x)), data.y).backward()
    gradients = [layer.weight.grad for layer in model if isinstance(layer, nn.Linear)]
    return np.array([np.linalg.norm(np.asarray(g, np.float64)) for g in gradients])


def draw(run: Run, layers: Array, deep: Array, accuracy: Array) -> None:
    """Gradients by layer (above), accuracies (below), and the first layer's gradient by depth (below, right)."""
    figure, grid = viz.subplots(2, 3, 13, 8)
    for i, (activation, weights) in enumerate(CASES):
        for j, name in enumerate(MODELS):
            how = f"{name}, {weights} weights", ("--", "-")[i % 2]
            viz.plot_seeds(grid[0, i // 2], range(1, 21), layers[:, i, j], name, *how, log=True)
        grid[0, i // 2].set(title=activation, xlabel="layer", xticks=range(2, 21, 3), ylim=(1e-13, 1e4))
    grid[0, 0].set_ylabel("norm of the gradient before training")
    grid[0, 1].legend(frameon=False, loc="lower center")
    for i, weights in enumerate(GAINS):
        for j, method in enumerate(METHODS):
            at, heights = np.arange(3) + 0.27 * (j - 1), accuracy[:, i::2, j]
            grid[1, i].bar(at, heights.mean(axis=0), 0.25, color=viz.colour(method, 4), label=method)
            grid[1, i].plot(at, heights.T, ".", color="black", markersize=4)
        grid[1, i].set_xticks(range(3), list(ACTIVATIONS))
        grid[1, i].set(title=f"{weights} weights, after training", ylabel="validation accuracy", ylim=(0, 1))
    for i, activation in enumerate(ACTIVATIONS):
        grid[1, 2].plot(DEPTHS, deep[:, i].mean(axis=0), "o-", color=viz.COLOURS[3 + i], label=activation)
    grid[1, 2].set(title="with BatchNorm, before training", xlabel="layers", ylabel="first layer's norm", yscale="log")
    grid[1, 2].legend(frameon=False)
    viz.legend_below(grid[1, 0])
    figure.suptitle(f"Twenty layers on {run.args.data}, epochs: {run.args.epochs}, seeds: {len(layers)}")
    run.save(figure, "gradient_flow")


def main(argv: list[str] | None = None) -> Run:
    """Measure the gradients before training, then train without BatchNorm, with clipping and with BatchNorm."""
    check = {"epochs": 1, "batch_size": 50}
    run = Run("gradient_flow", __doc__, argv, data="mnist5k", epochs=5, batch_size=100, lr=0.03, seeds=10, check=check)
    training, validation = run.images(check=1000)
    sample = training.take(np.arange(min(200, len(training))))

    def trained(seed: int, activation: str, weights: str, method: str) -> float:
        model = build(activation, weights, method == "with BatchNorm", seed)
        optimizer = optim.SGD(model.parameters(), lr=run.args.lr, momentum=0.9)
        run.fit(model, training, seed=seed, optimizer=optimizer, clip_norm=1.0 if method == "with clipping" else None)
        recalibrate(model, training)  # running statistics lag behind after short training
        return train.evaluate(model, validation).accuracy

    def measure(seed: int) -> tuple[Array, Array, Array]:
        by_layer = [[norms(build(*case, bn, seed), sample) for bn in MODELS.values()] for case in CASES]
        by_depth = [[norms(build(a, "small", True, seed, d), sample)[0] for d in DEPTHS] for a in ACTIVATIONS]
        accuracy = [[trained(seed, *case, method) for method in METHODS] for case in CASES]
        return np.array(by_layer), np.array(by_depth), np.array(accuracy)

    layers, deep, accuracy = (np.array(part) for part in zip(*run.each(measure, run.seeds, "seeds"), strict=True))
    draw(run, layers, deep, accuracy)
    first, last = layers[..., 1], layers[..., -2]  # layers 2 and 19, of equal shape; by seed, case, model
    growth = (first / last)[:, ::2, 1] ** (1 / 17)  # by seed and activation
    head = ("", "gradient without", "gradient with", "accuracy without", "accuracy clipped", "accuracy with")
    values = np.concatenate([first.mean(axis=0), accuracy.mean(axis=0)], axis=1)
    rows = [[", ".join(case), *map(number, row)] for case, row in zip(CASES, values.tolist(), strict=True)]
    run.print(
        run.table(head, rows, caption="gradient of the second layer before training, and validation accuracy"),
        "Small weights: a sigmoid's gradients vanish on the way back. For tanh and ReLU they are tiny in all layers "
        "alike, as activations shrink forwards while gradients shrink backwards. Clipping multiplies all gradients by "
        "one factor, 1 or less: it shortens steps, and helps no gradient that is too small.",
        "With BatchNorm, gradients grow backwards by these factors per layer: "
        + ", ".join(f"{a} {interval(growth[:, i])}" for i, a in enumerate(ACTIVATIONS)),
    )
    gains = np.array([GAINS["large"][a] / GAINS["small"][a] for a in ACTIVATIONS])
    inverse = np.abs(first[:, ::2, 1] / first[:, 1::2, 1] / gains - 1).max(axis=1)
    lead = (accuracy[..., 2] - accuracy[..., :2].max(axis=-1)).mean(axis=1)
    vanished = np.log10(first[:, ::2, 0].max(axis=1))
    run.claim_mean("small weights, without BatchNorm: gradients are below 10⁻⁴; log₁₀", vanished, below=-4)
    run.claim_mean("with BatchNorm they are inverse to the weights, but for this fraction", inverse, below=0.1)
    run.claim_mean("and grow backwards through ReLU layers, by a factor of", growth[:, 2], 1.15, 1.25)
    run.claim_mean("so they explode: with 100 layers the first exceeds 10⁶; log₁₀", np.log10(deep[:, 2, -1]), above=6)
    run.claim_mean("twenty layers train best with BatchNorm; its lead, mean of six networks", lead, above=0.1)
    return run.finish(cases=CASES, gradient=layers.tolist(), first_by_depth=deep.tolist(), accuracy=accuracy.tolist())


if __name__ == "__main__":
    start(lambda: main().code)
