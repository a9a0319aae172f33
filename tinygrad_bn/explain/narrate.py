"""The backward pass told step by step, with its numbers: that of a BatchNorm in words, any other by its formulas."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from tinygrad_bn import backend
from tinygrad_bn.explain.graph import last_gradient
from tinygrad_bn.explain.steps import Pass, Step
from tinygrad_bn.explain.words import WORDS

if TYPE_CHECKING:
    from tinygrad_bn.explain.explanation import Explanation

FEW = 6  # numbers of a list that are told
CASTS = ("reshape", "astype")


def narrate(e: Explanation, lang: str, of: str | None) -> str:
    """The story of the BatchNorm whose scope is `of`, or of the first that a backward pass reached.

    Without a BatchNorm it goes through every step with a name. Raises ValueError for another language, for an `of` that
    is no BatchNorm here, and if there was no backward pass.
    """
    if lang not in WORDS:
        raise ValueError(f"lang is one of {', '.join(map(repr, WORDS))}; got {lang!r}")
    if not e.passes:
        raise ValueError("no backward pass was recorded, so there is nothing to tell; call backward() in the block")
    found = {s.origin: s for s in e.steps if _is_batch_norm(e, s)}
    if of is not None and of not in found:
        raise ValueError(f"{of!r} is no BatchNorm with a gradient; there are {', '.join(map(repr, found)) or 'none'}")
    if not found:
        return _any(e, WORDS[lang])
    scope = of if of is not None else next(iter(found))
    return _Story(e, found[scope], WORDS[lang]).text()


def _is_batch_norm(e: Explanation, step: Step) -> bool:
    """Whether a step is the xhat of a BatchNorm. That of LayerNorm and its like is reshaped."""
    ivars = [s.array.shape for s in step.sources if "ivar" in s.names]
    if "xhat" not in step.names or not ivars or not any("xmu" in s.names for s in step.sources):
        return False
    if step.array.ndim < 2 or math.prod(ivars[0]) != step.array.shape[1] or last_gradient(e, step) is None:
        return False
    return not any(user.op and user.op.name == "reshape" for p in e.passes for user in p.users(step))


def _any(e: Explanation, words: dict[str, str]) -> str:
    lines = [words["other"].format(of=e.path_of(e.passes[-1].y))]
    for step in e.passes[-1].nodes:
        if step.all_names or step.op is None:
            call, grad = step.describe(), _told(last_gradient(e, step))
            lines.append(words["step"].format(name=e.path_of(step), call=call, grad=grad, formula=step.formula))
    return "\n\n".join(lines)


class _Story:
    """One BatchNorm and its numbers in one channel, that of the largest gradient: a ReLU after it may stop others."""

    def __init__(self, e: Explanation, xhat: Step, words: dict[str, str]) -> None:
        self.e, self.xhat, self.words, self.scope = e, xhat, words, xhat.origin
        self.p: Pass = next(p for p in reversed(e.passes) if xhat in p.grads)
        self.xmu, self.ivar = (next(s for s in xhat.sources if n in s.names) for n in ("xmu", "ivar"))
        self.wide = self.xmu.sources[0]
        grad = np.abs(backend.to_numpy(self.p.grads[xhat]))
        self.channel = int(np.argmax(np.nanmax(grad, axis=(0, *range(2, grad.ndim)))))
        after = [s for s in self.p.users(xhat) if s.origin == self.scope]
        self.gammax = after[0] if after and after[0].op and after[0].op.name == "mul" else None
        self.out = self._last(xhat)

    def _last(self, step: Step) -> Step:
        """The result of the layer: its step `out`, or where the only way on leaves it."""
        while "out" not in step.names and len(users := [s for s in self.p.users(step) if s.origin == self.scope]) == 1:
            step = users[0]
        return step

    def one(self, array: Any) -> Any:
        """The numbers of the channel, in float64."""
        a = np.asarray(backend.to_numpy(array), np.float64)
        axis = 1 if a.ndim >= self.xhat.array.ndim else 0  # of the channels, in (N, C, ...), (C, 1, 1) or (C,)
        return np.take(a, self.channel, axis).ravel()

    def grad(self, step: Step) -> Any:
        return self.one(self.p.grads[step])

    def given(self, step: Step) -> Step:
        """The tensor behind casts and reshapes."""
        while step.op is not None and step.op.name in CASTS:
            step = step.sources[0]
        return step

    def text(self) -> str:
        """The sentences, a paragraph each."""
        trains = self.p.fed(self.xhat).get(1) is self.ivar or self.p.fed(self.xhat).get(0) is self.ivar
        channels = self.xhat.array.shape[1]
        told = self.numbers(trains)
        keys = ["title", "start", *(["bias"] if "dbias" in told else [])]
        keys.append("weight" if "dweight" in told else "plain")
        if trains:
            keys += ["xhat", "ivar", "sqrtvar", "var", "sq", "xmu", "mu", "x", "closed", "sum", "scale"]
        else:
            keys += ["given", "given_sum"]
        of = f" {self.scope!r}" if self.scope in self.e.kinds and self.scope else ""
        words = {k: v if isinstance(v, str | int) else _told(v) for k, v in told.items()}
        filled = [self.words[k].format(of=of, channel=self.channel + 1, channels=channels, **words) for k in keys]
        return "\n\n".join(" ".join(line.split()) for line in filled)

    def numbers(self, trains: bool) -> dict[str, Any]:
        """What the sentences tell, each by its name in them."""
        dxhat, xhat, ivar = self.grad(self.xhat), self.one(self.xhat.array), self.one(self.ivar.array)
        told: dict[str, Any] = {"n": dxhat.size, "dout": self.grad(self.out), "dxhat": dxhat, "ivar": ivar}
        told |= self._affine()
        if not trains:
            dx = self.one(self.p.edges[self.xmu, 0])
            return told | {"dx": dx, "sum": dx.sum()}
        sqrtvar, var, sq = self._chain()
        into_x = [(s, i) for s, i in self.p.edges if s.origin == self.scope and s.operands[i] is self.wide]
        dx = sum(self.one(self.p.edges[edge]) for edge in into_x)  # x may be used outside the layer too
        dxmu, n = self.grad(self.xmu), dxhat.size
        variance = self.grad(sq) * 2 * self.one(self.xmu.array)
        closed = ivar * (dxhat - dxhat.mean() - xhat * (dxhat * xhat).mean())
        eps = next(o for s in sqrtvar.sources for o in s.operands if isinstance(o, int | float))  # of var + eps
        exact = ivar * (dxhat * xhat).sum() * eps / (self.one(var.array) + eps)
        return told | {
            "direct": dxhat * ivar, "divar": self.grad(self.ivar), "sqrtvar": self.one(sqrtvar.array),
            "dsqrtvar": self.grad(sqrtvar), "dvar": self.grad(var), "dsq": self.grad(sq)[0], "variance": variance,
            "dxmu": dxmu, "dmu": self.grad(self.xmu.sources[1]), "mean_of_variance": variance.sum(),
            "mean": self.grad(self.xmu.sources[1]) / n, "dx": dx, "closed": closed,
            "difference": np.abs(dx - closed).max(), "sum": dx.sum(), "scale": (dx * xhat).sum(), "exact": exact,
        }  # fmt: skip

    def _chain(self) -> tuple[Step, Step, Step]:
        """sqrtvar, var and sq, behind ivar."""
        behind, todo = {}, [self.ivar]
        while todo:
            step = todo.pop()
            for name in ("sqrtvar", "var", "sq"):
                if name in step.names:
                    behind[name] = step
            if "sq" not in step.names:
                todo += [s for s in step.sources if s.origin == self.scope]
        return behind["sqrtvar"], behind["var"], behind["sq"]

    def _affine(self) -> dict[str, Any]:
        """The weight and the bias in this channel, and their gradients, where they have one."""
        told: dict[str, Any] = {}
        if self.gammax is not None:
            weight = self.given(next(s for s in self.gammax.sources if s is not self.xhat))
            told["weight"] = weight.value[self.channel]
            told["dweight"] = self.one(self.p.grads[weight]) if weight in self.p.grads else "–"
        shifted = next((s for s in self.p.users(self.gammax or self.xhat) if s.op and s.op.name == "add"), None)
        if shifted is not None and shifted.origin == self.scope:
            bias = self.given(next(s for s in shifted.sources if s is not (self.gammax or self.xhat)))
            told["dbias"] = self.one(self.p.grads[bias]) if bias in self.p.grads else "–"
        return told


def _told(array: Any) -> str:
    """A few numbers in words: `[0.12, −0.5, … (32)]`."""
    a = np.asarray(array, np.float64).ravel()
    words = [f"{v:.4g}".replace("-", "−") for v in a[:FEW]]
    if a.size == 1:
        return words[0]
    return f"[{', '.join(words)}{f', … ({a.size})' if a.size > FEW else ''}]"
