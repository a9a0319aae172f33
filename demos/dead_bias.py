"""Before BatchNorm: a bias does nothing, weights have no scale, and weight decay is a learning rate.

784-100-100-10, BatchNorm and ReLU, gradient descent. BatchNorm subtracts the mean, and with it any bias before it: that
bias has no gradient. It divides by the deviation, so ten times the weights w give the same output, and w · ∂w = 0: each
step is at right angles to w and makes it longer. So the rate that counts, lr / ‖w‖², falls. Weight decay makes w
shorter, which changes no output, only this rate. A learning rate that grows by 1 / (1 − lr · decay)² per step does the
same without decay (Li and Arora 2020, An exponential learning rate schedule for deep learning).
"""

from dataclasses import replace

import numpy as np

from tinygrad_bn import datasets, functional, manual_seed, nn, optim, train, viz
from tinygrad_bn.tensor import Array
from tinygrad_bn.train.interval import interval, number

from .common import Run, recalibrate
from .output import start

METHODS = ("no decay", "weight decay", "no decay, growing rate")
STYLES = ("-", "-", "--")
DECAY = 0.01


def build(seed: int, bias: bool = False) -> nn.Sequential:
    """The network in float64. eps is tiny, since the scale of the weights matters as far as eps does."""
    manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in ((784, 100), (100, 100)):
        layers += [nn.Linear(fan_in, fan_out, bias=bias), nn.BatchNorm1d(fan_out, eps=1e-12), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(100, 10)).astype(np.float64)


def facts(data: datasets.Dataset, seed: int) -> list[float]:
    """For the first layer before training: the gradient of its bias over that of its weight, |w · ∂w| over both norms,
    and the largest change of an output when w is ten times as large and the bias is shifted."""
    model = build(seed, bias=True)
    named = dict(model.named_parameters())
    weight, bias = named["1.weight"], named["1.bias"]
    outputs = model(data.x)
    functional.cross_entropy(outputs, data.y).backward()
    w, dw, db = (np.ravel(np.asarray(t)) for t in (weight, weight.grad, bias.grad))
    weight.data, bias.data = 10 * weight.numpy(), bias.numpy() + 5
    changed = np.abs(model(data.x).numpy() - outputs.numpy()).max()
    size = np.linalg.norm(dw)
    return [float(np.linalg.norm(db) / size), float(abs(w @ dw) / np.linalg.norm(w) / size), float(changed)]


def trained(run: Run, data: datasets.Dataset, method: str, seed: int) -> tuple[nn.Sequential, Array]:
    """The network, and for each step: its loss, and the norm and effective rate of the first weight (steps, 3)."""
    model, lr = build(seed), run.args.lr
    named = dict(model.named_parameters())
    weights = [named.pop(name) for name in ("1.weight", "4.weight")]
    decay = DECAY if method == "weight decay" else 0.0
    optimizer = optim.SGD([{"params": weights, "weight_decay": decay}, {"params": named.values()}], lr=lr)

    def next_rate(training: train.Training) -> list[float]:
        growth = (1 - lr * DECAY) ** -(2 * training.step + 1) if method == METHODS[2] else 1
        optimizer.param_groups[0]["lr"] = lr * growth
        norm = float(np.linalg.norm(weights[0].numpy()))
        return [training.loss, norm, lr * growth / norm**2]

    seen = train.Measure(next_rate, "step")
    run.fit(model, data, None, f"{method}, seed {seed}", optimizer=optimizer, seed=seed, callbacks=seen, drop_last=True)
    values = np.array(seen.values)
    return model, np.column_stack([values[1:, 0], values[:-1, 1:]])


def main(argv: list[str] | None = None) -> Run:
    """Show the three facts before training, then train without decay, with it, and with the growing rate."""
    run = Run(
        "dead_bias", __doc__, argv,
        data="mnist5k", epochs=5, batch_size=100, lr=0.5, seeds=10, check={"epochs": 2},
    )  # fmt: skip
    training, validation = (replace(part, x=part.x.astype(np.float64)) for part in run.images(check=2000))
    run.expect_batches(len(training), run.args.batch_size, drop_last=True)

    def measure(seed: int) -> tuple[list[float], Array, Array]:
        models, seen = zip(*(trained(run, training, method, seed) for method in METHODS), strict=True)
        for model in models:
            recalibrate(model.eval(), training)  # the running variances are those of w some steps before
        outputs = np.array([model(validation.x).numpy() for model in models])
        return facts(training.take(np.arange(200)), seed), np.array(seen), outputs

    before, seen, outputs = (np.array(part) for part in zip(*run.each(measure, run.seeds, "seeds"), strict=True))
    figure, grid = viz.subplots(1, 3, 13, 4.4)
    each = seen.reshape(*seen.shape[:2], run.args.epochs, -1, 3).mean(axis=3)[..., 0]  # losses by epoch
    epochs = np.arange(1, run.args.epochs + 1)
    for i, (name, style) in enumerate(zip(METHODS, STYLES, strict=True)):
        for axes, values in zip(grid[0], (seen[:, i, :, 1], seen[:, i, :, 2], each[:, i]), strict=True):
            at = epochs if axes is grid[0, 2] else np.arange(values.shape[1])
            axes.plot(at, values.mean(axis=0), style, color=viz.COLOURS[i], label=name, linewidth=(1.5, 4, 1.5)[i])
    for axes, title in zip(grid[0], ("norm of the first weight", "lr / ‖w‖²", "loss in training"), strict=True):
        axes.set(title=title, xlabel="step")
    grid[0, 2].set(xlabel="epoch", yscale="log", xticks=epochs)
    viz.legend_below(grid[0, 0])
    run.save(figure, "dead_bias")

    accuracy = (outputs.argmax(axis=-1) == validation.y).mean(axis=-1)
    last = seen[:, :, -1]
    means = np.column_stack([last[..., 1:].mean(axis=0), each[..., -1].mean(axis=0)]).tolist()
    rows = [[name, *map(number, means[i]), str(interval(accuracy[:, i]))] for i, name in enumerate(METHODS)]
    run.print(run.table(("", "norm of w", "lr / ‖w‖²", "loss", "validation accuracy"), rows, caption="after training"))
    same, other = (np.abs(outputs[:, 1] - outputs[:, i]).max(axis=(1, 2)) for i in (2, 0))
    run.claim_mean("a bias before BatchNorm has a gradient of 0 but for rounding", before[:, 0], below=1e-12)
    run.claim_mean("so is w · ∂w, of the product of the norms", before[:, 1], below=1e-12)
    run.claim_mean("w ten times as large and another bias change no output by more than", before[:, 2], below=1e-9)
    run.claim("without decay every step makes w longer", (np.diff(seen[:, 0, :, 1]) > 0).all())
    run.claim_mean("with decay the rate lr / ‖w‖² ends higher, times", last[:, 1, 2] / last[:, 0, 2], above=1.2)
    run.claim_mean("the growing rate gives the outputs of weight decay, but for", same, below=1e-6)
    run.claim_mean("which differ from those without decay, by up to", other, above=0.1)
    return run.finish(methods=METHODS, facts=before.tolist(), last=last.tolist(), accuracy=accuracy.tolist())


if __name__ == "__main__":
    start(lambda: main().code)
