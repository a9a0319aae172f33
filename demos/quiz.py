"""Derive the backward pass of BatchNorm yourself, step by step; the engine says of each gradient whether it is right.

You answer with NumPy expressions of the values (x, mu, xmu, sq, var, sqrtvar, ivar, xhat, gammax, weight, bias, eps, N)
and of the gradients so far (dout, dgammax, …). Each is checked against the engine's, which also knows common mistakes.
"""

import argparse
from typing import Any

import numpy as np

from tinygrad_bn import Tensor, functional
from tinygrad_bn.explain import Explanation, explain

# Step: its formula, a hint, and one right answer.
STEPS = {
    "gammax": ("out = gammax + bias", "a sum passes the gradient on to each term", "dout"),
    "bias": ("out = gammax + bias", "bias was repeated for each sample, so its gradient is summed", "dout.sum(axis=0)"),
    "xhat": ("gammax = xhat · weight", "a product passes on g times the other factor", "dgammax * weight"),
    "weight": ("gammax = xhat · weight", "as for xhat, then summed over the batch", "(dgammax * xhat).sum(axis=0)"),
    "ivar": ("xhat = xmu · ivar", "ivar is (1, 2): sum, and keep the axis", "(dxhat * xmu).sum(axis=0, keepdims=True)"),
    "sqrtvar": ("ivar = 1 / sqrtvar", "the derivative of 1/s is −1/s²", "-divar / sqrtvar**2"),
    "var": ("sqrtvar = √(var + eps)", "the derivative of √v is 1 / (2√v)", "dsqrtvar / (2 * sqrtvar)"),
    "sq": ("var = mean of sq over the batch", "each sample has 1/N of it", "dvar / N * np.ones_like(sq)"),
    "xmu": ("xhat = xmu · ivar, and sq = xmu²", "two ways, which add", "dxhat * ivar + dsq * 2 * xmu"),
    "mu": ("xmu = x − mu", "a difference: mind the sign, and sum", "-dxmu.sum(axis=0, keepdims=True)"),
    "x": ("xmu = x − mu, and mu = mean of x over the batch", "two ways again", "dxmu + dmu / N"),
}


def batch(seed: int) -> tuple[Explanation, dict[str, Any]]:
    """BatchNorm of five samples with two channels, explained; and what answers may use."""
    rng = np.random.default_rng(seed)
    x = Tensor(rng.normal(3.0, 2.0, (5, 2)), requires_grad=True)
    weight, bias = (Tensor(v, requires_grad=True) for v in np.array([[1.5, -0.5], [0.1, 0.2]]))
    with explain() as e:
        out = functional.batch_norm_steps(x, weight, bias, eps=1e-5).out
        out.backward(rng.normal(size=(5, 2)))
    values = {name: e[name].value for name in (*STEPS, "out")}
    return e, values | {"dout": e["out"].grad, "eps": 1e-5, "N": 5, "np": np}


def ask(e: Explanation, known: dict[str, Any], name: str) -> bool:
    """Ask for one gradient until it is right or skipped. False to quit."""
    formula, hint, answer = STEPS[name]
    print(f"\n{formula}.  {name} has the shape {known[name].shape}.")
    while True:
        text = input(f"d{name} = ").strip()
        if text == "q":
            return False
        if text == "?":
            print(f"  {hint}")
        elif text == "!":
            print(f"  d{name} = {answer}")
            return True
        elif text:
            try:
                finding = e.check({f"d{name}": eval(text, {}, known)})[f"d{name}"]
            except Exception as error:
                print(f"  {type(error).__name__}: {error}")
                continue
            print(f"  {finding}")
            if finding.verdict != "wrong":
                return True


def main(argv: list[str] | None = None) -> int:
    """Ask for each gradient, or print all answers with their verdicts. Return the exit status."""
    parser = argparse.ArgumentParser(prog=f"python -m {__package__} quiz", description=__doc__)
    parser.add_argument("--answers", action="store_true", help="print right answers instead of asking")
    parser.add_argument("--seed", type=int, default=0, help="of the batch")
    args = parser.parse_args(argv)
    e, known = batch(args.seed)
    if not args.answers:
        print(__doc__)
        print("Enter ? for a hint, ! for the answer, q to quit. Read the forward pass from its end. dout is given.")
    for name, (formula, _, answer) in STEPS.items():
        if args.answers:
            print(f"{formula:52} d{name} = {answer}")
            print(f"  {e.check({f'd{name}': eval(answer, {}, known)})}")
        else:
            try:
                if not ask(e, known, name):
                    return 0
            except EOFError:
                return 0
        known[f"d{name}"] = e[name].grad
    if not args.answers:
        print(
            f"\nThat is the backward pass of BatchNorm. python -m {__package__} bn_backward shows every number of it."
        )
    return 0
