"""Loss landscape: BatchNorm makes the loss smoother, which helps more than stable distributions do.

After Santurkar et al. 2018: 784-100-100-100-100-100-10, ReLU, gradient descent. At every fifth step, points along the
gradient are evaluated, from half a step to four steps ahead. The effective β is the largest change of the gradient
there, per length of step. In the third network, noise after each BatchNorm changes the mean and scale of each unit at
every step. The paper of 2015 explains BatchNorm by inputs that shift less; noise tells that from a smoother loss.
"""

from itertools import chain, pairwise

import numpy as np

from tinygrad_bn import Tensor, datasets, functional, grad, nn, no_grad, random, viz
from tinygrad_bn.tensor import Array
from tinygrad_bn.train.interval import number

from . import learning_rates
from .common import Run
from .output import start

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
        self.shift, self.scale = random.generator().uniform([[-0.9], [0.8]], [[0.9], [1.25]], (2, 100)).astype("f")

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


def build(name: str, seed: int) -> nn.Sequential:
    """The network of `learning_rates`, in the third variant with noise behind each BatchNorm."""
    model = learning_rates.build(name != "without BatchNorm", seed)
    noisy = nn.BatchNorm1d if name == "with noisy BatchNorm" else ()
    return nn.Sequential(*(m for layer in model for m in (layer, Noise())[: 1 + isinstance(layer, noisy)]))


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


def descend(run: Run, name: str, seed: int, training: datasets.Dataset, validation: datasets.Dataset) -> Array:
    """Train by gradient descent, and measure along the gradient: an array (MEASURES, measurements)."""
    model, lr, lengths = build(name, seed), run.args.lr, AHEAD * run.args.lr
    batches = datasets.Batches(training.x, training.y, run.args.batch_size, seed=seed)
    here = np.concatenate([np.asarray(p).ravel() for p in model.parameters()])
    losses, rows, values = [], [], np.full((1, 1), np.nan)  # the first measurement has no predecessor
    for x, y in chain.from_iterable([batches] * run.args.epochs):
        for noise in (layer for layer in model if isinstance(layer, Noise)):
            noise.draw()
        loss, g = gradient(model, here, x, y)
        losses.append(loss)
        if len(losses) % EVERY == 0:
            before, values = values, relu_inputs(model, validation.x[:500])
            shift = np.median(np.abs(values.mean(axis=0) - before.mean(axis=0)) / values.std(axis=0))
            ahead, gradients = zip(*(gradient(model, here - s * g, x, y) for s in lengths), strict=True)
            beta = (np.linalg.norm(np.array(gradients) - g, axis=1) / lengths).max() / np.linalg.norm(g)
            rows.append((np.mean(losses[-EVERY:]), np.ptp(ahead), beta, shift))
        here = here - lr * g
    return np.array(rows).T


def main(argv: list[str] | None = None) -> Run:
    """Train the three networks, and plot the measurements."""
    check, data = {"epochs": 3}, "mnist5k"
    run = Run("loss_landscape", __doc__, argv, check, data=data, epochs=5, batch_size=100, lr=0.3, seeds=10)
    training, validation = run.images()
    run.expect_batches(len(training), run.args.batch_size)

    def networks(seed: int) -> list[Array]:
        return [run.once(descend, run, name, seed, training, validation) for name in MODELS]

    measured = np.array(run.each(networks, run.seeds, "seeds"))  # by seed, network, measure, step
    figure, grid = viz.subplots(2, 2, 11, 8.4)
    for i, (axes, (measure, unit)) in enumerate(zip(grid.flat, MEASURES.items(), strict=True)):
        for j, name in enumerate(MODELS):
            viz.plot_seeds(axes, EVERY * np.arange(1, measured.shape[-1] + 1), measured[:, j, i], name, log=True)
        axes.set(xlabel="step", ylabel=unit, title=measure)
    viz.legend_below(grid[0, 0])
    figure.suptitle(f"784-100×5-10 on {run.args.data}, rate {run.args.lr:g}; {len(measured)} seeds, geometric mean")
    run.save(figure, "landscape")

    logs = np.nanmean(np.log10(measured), axis=-1)  # by seed, network, measure; a difference is the ratio of two means
    rows = [[measure, *map(number, 10 ** logs[:, :, i].mean(axis=0))] for i, measure in enumerate(MEASURES)]
    run.print(run.table(("", *MODELS), rows, caption="geometric mean over the training"))
    loss, variation, beta, _ = logs.transpose(2, 1, 0)
    late = np.log10(measured[:, :, -1, -(measured.shape[-1] // 3) :]).mean(axis=-1).T
    smoother, flatter = (of[0] - of[1:].max(axis=0) for of in (variation, beta))
    run.claim_mean("noise shifts inputs more than without BatchNorm, last third; log₁₀", late[2] - late[0], above=0)
    run.claim_mean("yet with noise the loss is lower than without BatchNorm; log₁₀", loss[0] - loss[2], above=0)
    run.claim_mean("the loss varies 3 times less with BatchNorm, noisy or not; log₁₀", smoother, above=np.log10(3))
    run.claim_mean("and β is smaller with BatchNorm, noisy or not; log₁₀ of the ratio", flatter, above=0)
    return run.finish(models=MODELS, measures=tuple(MEASURES), log10=logs.tolist())


if __name__ == "__main__":
    start(lambda: main().code)
