"""For extenders: batch renormalisation as a composition, then as one op with kernels, and small batches with it.

Batch renormalisation (Ioffe 2017, arXiv 1702.03275) corrects what BatchNorm's statistics of a small batch give towards
the running ones: out = weight · (x̂ · r + d) + bias, with r = σ_batch / σ_running in [1/3, 3] and
d = (μ_batch − μ_running) / σ_running in [−5, 5], both constants to the gradient. Both limits grow from r = 1 and d = 0,
which is BatchNorm. The kernels are BatchNorm's, for the weight weight · r and the bias weight · d + bias. It helps in
batches of two; in batches of four this network shows no difference.
"""

from itertools import pairwise
from typing import Any

import numpy as np

from tinygrad_bn import Tensor, backend, functional, manual_seed, nn, no_grad, train
from tinygrad_bn.extend import POSITIVE, REAL, Draw, Drawn, Operand, check_op, fused, kernel
from tinygrad_bn.train.interval import interval

from .common import Run
from .output import start


def operands(d: Draw) -> Drawn:
    """x (N, C), and r, d, weight and bias (C,)."""
    n, c = d.integer(3, 9), d.integer(1, 3)
    domains = POSITIVE, REAL, REAL, REAL
    return (d.array(REAL, (n, c)), *(d.array(domain, (c,)) for domain in domains)), {"eps": d.choice([0.3, 0.7])}


@fused(formula="y = weight · ((x − μ) / √(σ² + eps) · r + d) + bias", sample=operands, saves=("mean", "var"))
def renorm(x: Operand, r: Operand, d: Operand, weight: Operand, bias: Operand, *, eps: float) -> Any:
    """BatchNorm of x (N, C), corrected by r and d (C,). By-products: mean and biased variance of the batch."""
    steps = functional.batch_norm_steps(x, eps=eps)
    mean, var = (functional.reshape(s, shape=-1) for s in (steps.mu, steps.var))
    return weight * (steps.xhat * r + d) + bias, mean, var


@kernel("renorm", "cpu")
def forward(x, r, d, weight, bias, *, eps):  # type: ignore[no-untyped-def]
    """By BatchNorm's kernel: y, mean and variance."""
    normalize = backend.find_kernel("batch_norm_training", "cpu")
    return normalize(x, weight * r, weight * d + bias, eps=eps) if normalize else NotImplemented


@kernel("renorm.vjp", "cpu")
def backward(g, y, x, r, d, weight, bias, *, needs, eps, mean, var):  # type: ignore[no-untyped-def]
    """By BatchNorm's kernel, and the chain rule of weight · r and weight · d + bias."""
    vjp = backend.find_kernel("batch_norm_training.vjp", "cpu")
    wanted = [needs[0], any(needs[1:4]), any(needs[2:])]
    found = vjp(g, y, x, weight * r, bias, needs=wanted, eps=eps, mean=mean, var=var) if vjp else NotImplemented
    if found is NotImplemented:
        return found
    gx, by_scale, by_shift = (0.0 if a is None else a for a in found)
    return gx, by_scale * weight, by_shift * weight, by_scale * r + by_shift * d, by_shift


class BatchRenorm(nn.BatchNorm1d):
    """Batch renormalisation of (N, C): in evaluation it is BatchNorm."""

    ramp = 500  # steps until the limits have grown

    def forward(self, x: Tensor) -> Tensor:
        if not self.uses_batch(x) or self.running_mean is None:
            return super().forward(x)
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        with no_grad():  # r and d are constants to the gradient
            mean, var = functional.mean_and_var(x, axis=0)
            grown = functional.minimum(self.num_batches_tracked.astype(np.float32) / self.ramp, 1.0)
            deviation = functional.sqrt(self.running_var + self.eps)
            most, far = 1 + 2 * grown, 5 * grown
            r = functional.maximum(functional.minimum(functional.sqrt(var + self.eps) / deviation, most), 1 / most)
            d = functional.maximum(functional.minimum((mean - self.running_mean) / deviation, far), -far)
        y, (mean, var) = renorm.run(x, r, d, self.weight, self.bias, eps=self.eps)
        self.track(mean, var, len(x))
        return y


def build(norm: type[nn.BatchNorm1d], seed: int) -> nn.Sequential:
    """784-100-100-100-10 with ReLU, and the normalisation before it."""
    manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise((784, 100, 100, 100)):
        layers += [nn.Linear(fan_in, fan_out), norm(fan_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(100, 10))


def main(argv: list[str] | None = None) -> Run:
    """Check the op, then train in small batches with BatchNorm and with it."""
    run = Run(
        "batch_renorm", __doc__, argv,
        data="mnist5k", epochs=1, batch_size=2, lr=1e-3, optimizer="adam", seeds=10,
    )  # fmt: skip
    run.print(f"{check_op(renorm)}\n")  # the composition and the kernels agree, and more; else AssertionError
    training, validation = run.images()

    def accuracies(seed: int) -> list[float]:
        models = [build(norm, seed) for norm in (nn.BatchNorm1d, BatchRenorm)]
        for model in models:
            run.fit(model, training, name=f"{type(model[2]).__name__}, seed {seed}", seed=seed, drop_last=True)
        return [train.evaluate(model, validation).accuracy for model in models]

    accuracy = np.array(run.each(accuracies, run.seeds, "seeds"))
    for name, found in zip(("BatchNorm", "batch renormalisation"), accuracy.T, strict=True):
        run.print(f"validation accuracy with {name}: {interval(found)}")
    gain = accuracy[:, 1] - accuracy[:, 0]
    run.claim_mean(f"in batches of {run.args.batch_size}, batch renormalisation is more accurate", gain, above=0)
    return run.finish(accuracy=accuracy.tolist())


if __name__ == "__main__":
    start(lambda: main().code)
