"""Loss landscape: BatchNorm makes the loss smoother, which helps more than stable distributions do.

After Santurkar et al. 2018: 784-100-100-100-100-100-10, ReLU, gradient descent. At every fifth step, points along the
gradient are evaluated, from half a step to four steps ahead: how much the loss varies there, and the effective β, the
largest change of the gradient per length of step, relative to the gradient. In the third network, noise after each
BatchNorm changes the mean and scale of each unit at every step.
"""

from itertools import pairwise

import numpy as np

from demos.common import Run
from demos.interval import number
from demos.output import start
from tinygrad_bn import Tensor, datasets, functional, grad, manual_seed, nn, no_grad, viz
from tinygrad_bn.random import generator
from tinygrad_bn.tensor import Array

MODELS = ("without BatchNorm", "with BatchNorm", "with noisy BatchNorm")
MEASURES = {  # name: unit
    "training loss": "cross-entropy, mean of 5 steps",
    "variation of the loss": "largest − smallest loss ahead",
    "effective β": "‖change of gradient‖ / (‖step‖ · ‖gradient‖)",
    "shift of ReLU inputs": "in 5 steps, in standard deviations",
}
EVERY, AHEAD = 5, np.array([0.5, 1, 2, 4])  # steps between measurements; steps ahead at each


class Noise(nn.Module):
    """A random shift and scale for each of 100 units, the same for all images, until the next `draw`."""

    def draw(self) -> None:
        self.shift = generator().uniform(-0.9, 0.9, 100).astype(np.float32)
        self.scale = generator().uniform(0.8, 1.25, 100).astype(np.float32)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


def build(name: str, seed: int) -> nn.Sequential:
    """The network, initialised as in He et al. 2015."""
    manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise((784, 100, 100, 100, 100, 100)):
        linear = nn.Linear(fan_in, fan_out)
        nn.init.kaiming_normal_(linear.weight)
        norm = [] if name == "without BatchNorm" else [nn.BatchNorm1d(fan_out)]
        layers += [linear, *norm, *([Noise()] if name == "with noisy BatchNorm" else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(100, 10))


def gradient(model: nn.Module, at: Array, x: Array, y: Array) -> tuple[float, Array]:
    """Set all parameters to the flat vector `at`; return the loss of a batch and its gradient, a flat vector."""
    parameters = list(model.parameters())
    for p, part in zip(parameters, np.split(at, np.cumsum([p.size for p in parameters])[:-1]), strict=True):
        p.data = part.reshape(p.shape)
    loss = functional.cross_entropy(model(Tensor(x)), y)
    return loss.item(), np.concatenate([np.asarray(g).ravel() for g in grad(loss, parameters)])


def relu_inputs(model: nn.Module, x: Array) -> Array:
    """The input of each hidden unit's ReLU for each image (N, units)."""
    outputs: list[tuple[nn.Module, Tensor]] = []
    with no_grad(), nn.observe(lambda module, y: outputs.append((module, y))):
        model(Tensor(x))
    return np.concatenate([np.asarray(y) for (_, y), (m, _) in pairwise(outputs) if isinstance(m, nn.ReLU)], axis=1)


def descend(run: Run, name: str, seed: int, training: datasets.Dataset, images: Array) -> Array:
    """Train by gradient descent, and measure along the gradient: an array (MEASURES, measurements)."""
    model, lr, lengths = build(name, seed), run.args.lr, AHEAD * run.args.lr
    batches = datasets.Batches(training.x, training.y, run.args.batch_size, seed=seed)
    here = np.concatenate([np.asarray(p).ravel() for p in model.parameters()])
    losses, rows, values = [], [], np.full((1, 1), np.nan)  # the first measurement has no predecessor
    for _ in range(run.args.epochs):
        for x, y in batches:
            for noise in (layer for layer in model if isinstance(layer, Noise)):
                noise.draw()
            loss, g = gradient(model, here, x, y)
            losses.append(loss)
            if len(losses) % EVERY == 0:
                before, values = values, relu_inputs(model, images)
                shift = np.median(np.abs(values.mean(axis=0) - before.mean(axis=0)) / values.std(axis=0))
                ahead, gradients = zip(*(gradient(model, here - s * g, x, y) for s in lengths), strict=True)
                distances = np.linalg.norm(np.array(gradients) - g, axis=1)
                beta = (distances / lengths).max() / np.linalg.norm(g)
                rows.append((np.mean(losses[-EVERY:]), np.ptp(ahead), beta, shift))
            here = here - lr * g
    return np.array(rows).T


def main(argv: list[str] | None = None) -> Run:
    """Train the three networks, and plot the measurements."""
    run = Run(
        "loss_landscape", __doc__, argv,
        data="mnist5k", epochs=5, batch_size=100, lr=0.3, seeds=3, check={"epochs": 3},
    )  # fmt: skip
    training, validation = run.images()

    def networks(seed: int) -> list[Array]:
        return [descend(run, name, seed, training, validation.x[:500]) for name in MODELS]

    measured = np.array(run.each(networks, run.seeds, "seeds"))  # by seed, network, measure, step
    figure, grid = viz.subplots(2, 2, 11, 8.4)
    for i, (axes, (measure, unit)) in enumerate(zip(grid.flat, MEASURES.items(), strict=True)):
        for j, name in enumerate(MODELS):
            viz.plot_seeds(axes, EVERY * np.arange(1, measured.shape[-1] + 1), measured[:, j, i], name)
        axes.set(xlabel="step", ylabel=unit, title=measure, yscale="log")
    viz.legend_below(grid[0, 0])
    figure.suptitle(f"784-100×5-10 on {run.args.data}, rate {run.args.lr:g}; {len(measured)} seeds and their mean")
    run.save(figure, "landscape")

    logs = np.nanmean(np.log10(measured), axis=-1)  # by seed, network, measure; a difference is the ratio of two means
    rows = [[measure, *map(number, 10 ** logs[:, :, i].mean(axis=0))] for i, measure in enumerate(MEASURES)]
    run.print(
        run.table(("", *MODELS), rows, caption="geometric mean over the training"),
        "The paper of 2015 explains BatchNorm by a smaller shift of layer inputs, the one of 2018 by a smoother loss. "
        "The noisy network separates the two: its inputs shift, and its loss is smooth.",
    )
    loss, variation, beta, _ = logs.transpose(2, 1, 0)
    late = np.log10(measured[:, :, -1, -(measured.shape[-1] // 3) :]).mean(axis=-1).T
    for statement, ratio, above in (
        ("noise shifts the inputs more than training does without BatchNorm, last third", late[2] - late[0], 0),
        ("yet with noise the mean loss is lower than without BatchNorm", loss[0] - loss[2], 0),
        (
            "with BatchNorm, noisy or not, the loss varies 3 times less",
            variation[0] - variation[1:].max(0),
            np.log10(3),
        ),
        ("and β is smaller", beta[0] - beta[1:].max(axis=0), 0),
    ):
        run.claim_mean(f"{statement}; log₁₀ of the ratio", ratio, above=above)
    return run.finish(models=MODELS, measures=tuple(MEASURES), log10=logs.tolist())


if __name__ == "__main__":
    start(lambda: main().code)
