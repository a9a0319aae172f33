"""Loss landscape: BatchNorm makes the loss smoother, which helps more than stable distributions do.

After Santurkar et al. 2018: 784-100-100-100-100-100-10, ReLU, gradient descent. At every fifth step, points along the
gradient are evaluated, from half a step to four steps ahead: the variation of the loss, the distance of the gradient
from the present one, and this distance per step length (effective β-smoothness). In the third network, noise after each
BatchNorm changes the mean and scale of each unit at every step: ReLU inputs shift more than without BatchNorm.
"""

from itertools import pairwise

import numpy as np

from demos.common import Run
from tinygrad_bn import Tensor, datasets, functional, grad, manual_seed, nn, no_grad, viz
from tinygrad_bn.random import generator
from tinygrad_bn.tensor import Array

MODELS = ("without BatchNorm", "with BatchNorm", "with noisy BatchNorm")
MEASURES = ("training loss", "variation of the loss", "distance of gradients", "effective β", "shift in 5 steps")
EVERY, AHEAD = 5, np.linspace(0.5, 4, 8)  # steps between measurements; steps ahead at each


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


def descend(run: Run, name: str, training: datasets.Dataset, images: Array) -> dict[str, Array]:
    """Train by gradient descent, and measure along the gradient: an array per name in MEASURES."""
    model, lr, lengths = build(name, run.args.seed), run.args.lr, AHEAD * run.args.lr
    batches = datasets.Batches(training.x, training.y, run.args.batch_size, seed=run.args.seed)
    here = np.concatenate([np.asarray(p).ravel() for p in model.parameters()])
    losses, rows, values = [], [], np.full((1, 1), np.nan)  # the first measurement has no predecessor
    for _ in run.track(range(run.args.epochs), name):
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
                rows.append((np.mean(losses[-EVERY:]), np.ptp(ahead), distances.max(), beta, shift))
            here = here - lr * g
    return dict(zip(MEASURES, np.array(rows).T, strict=True))


def main(argv: list[str] | None = None) -> Run:
    """Train the three networks, and plot the measurements."""
    run = Run("loss_landscape", __doc__, argv, data="mnist5k", epochs=5, batch_size=100, lr=0.3, check={"epochs": 3})
    training, validation = run.images()
    measured = {name: descend(run, name, training, validation.x[:500]) for name in MODELS}
    mean = {measure: [float(np.nanmean(measured[name][measure])) for name in MODELS] for measure in MEASURES}
    print(f"{'mean over the training':23}", *(f"{name:>20}" for name in MODELS))
    figure, grid = viz.subplots(2, 3, 14, 7.6)
    for axes, (measure, values) in zip(grid.flat, mean.items(), strict=False):
        print(f"{measure:23}", *(f"{value:20.3g}" for value in values))
        for name, of in measured.items():
            axes.semilogy(EVERY * np.arange(1, len(of[measure]) + 1), of[measure], color=viz.colour(name), label=name)
        axes.set(xlabel="step", title=measure)
    grid[1, 2].set_axis_off()
    grid[1, 2].legend(*axes.get_legend_handles_labels(), loc="center", frameon=False)
    figure.suptitle(f"784-100×5-10 on {run.args.data}, gradient descent with a rate of {run.args.lr:g}")
    run.save(figure, "landscape")
    loss, variation, _, beta, shift = mean.values()
    run.claim("with noise, the distributions shift more than without BatchNorm", shift[2] > shift[0] > shift[1])
    run.claim("and the mean loss is still lower than without", max(loss[1:]) < loss[0])
    run.claim("with BatchNorm, noisy or not, the loss varies 5 times less", 5 * max(variation[1:]) < variation[0])
    run.claim("and β, the change of the gradient per step length, is smaller", max(beta[1:]) < beta[0])
    if all(run.claims.values()):
        run.console.print(
            "The paper of 2015 explains BatchNorm by a smaller shift of layer inputs. The shift is smaller: "
            f"{shift[1]:.2g} standard deviations instead of {shift[0]:.2g}. But with noise it is {shift[2]:.2g}, and "
            "the loss still falls faster than without BatchNorm. Both networks with BatchNorm have a smoother loss: it "
            f"varies {variation[0] / variation[1]:.0f} times less, with noise {variation[0] / variation[2]:.0f} times."
        )
    return run.finish(models=MODELS, **mean)


if __name__ == "__main__":
    main()
