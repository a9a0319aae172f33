"""A step of a training: gradients, the optimizer, and the check for NaN and infinity."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

import numpy as np

from tinygrad_bn import captured, nn
from tinygrad_bn.backend import Array, to_numpy
from tinygrad_bn.optim import Optimizer, clip_grad_norm_
from tinygrad_bn.optim.gradients import all_finite
from tinygrad_bn.tensor import Tensor
from tinygrad_bn.train.history import History
from tinygrad_bn.train.scores import Loss, MeanScore, measure, outputs_and_loss

NonFinite: TypeAlias = Literal["raise", "skip", "restore", "ignore"]


class NonFiniteError(FloatingPointError):
    """A loss, a gradient or a parameter became NaN or infinite. `history` holds the completed epochs."""

    history: History


class Steps:
    """The steps of the optimizer, and what happens where one would not be finite."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss: Loss,
        clip_norm: float | None,
        nonfinite: NonFinite,
        captures: bool,
    ) -> None:
        self.model, self.optimizer, self.loss, self.clip_norm = model, optimizer, loss, clip_norm
        self.nonfinite = nonfinite
        self.value = math.nan  # the loss of the last batch
        self.params = [p for group in optimizer.param_groups for p in group["params"]]

        def both_ways(x: Array, y: Array) -> tuple[Tensor, Any, Any]:
            outputs, target, value = outputs_and_loss(model, loss, x, y)
            optimizer.zero_grad()
            mean = value[0] if isinstance(value, tuple) else value
            if isinstance(mean, Tensor) and mean.size == 1:  # what else it may be is reported later
                mean.backward()
            return outputs, target, value

        self.run = captured.capture(both_ways, quiet=True) if captures else both_ways

    def remember(self) -> None:
        """Note what the epoch that begins may have to restore. Arrays of tensors are replaced, never written into."""
        self.buffers = list(self.model.buffers())
        if self.nonfinite == "restore":
            tensors = {*self.params, *self.model.parameters(), *self.buffers}
            self.epoch = [(t, t._data) for t in tensors], self.optimizer._undoing()

    def take(self, x: Array, y: Array, mean: MeanScore) -> str:
        """Take a step on a batch, and its score into the mean; or say why not, with the model as it was before."""
        tensors = [*self.params, *self.buffers]
        before = [t._data for t in tensors]
        batch = measure(self.run, x, y, self.loss)
        self.value = batch.loss
        if not isinstance(batch.value, Tensor):
            raise TypeError(f"loss has to return a Tensor; got a {type(batch.value).__name__}")
        looks, fault, undo = self.nonfinite != "ignore", "", None
        if batch.weight:
            fault = f"the loss is {batch.loss}" if looks and not math.isfinite(batch.loss) else self._clipped()
            if not fault:
                undo = self.optimizer._undoing() if looks else None
                self.optimizer.step()
        if looks and not fault:
            fault = self._overflow([pair for pair in zip(tensors, before, strict=True) if pair[0]._data is not pair[1]])
        if not fault:
            mean.add(batch)
            return ""
        if undo is not None:
            undo()
        for t, array in zip(tensors, before, strict=True):
            t._data = array
        self.optimizer.zero_grad()  # a later step by hand would take what is not finite
        return fault if np.isfinite(x).all() else f"{fault}, since the samples are not finite"

    def _clipped(self) -> str:
        """Clip the gradients; why that is not possible, or "" if all are finite."""
        if self.nonfinite == "ignore" and self.clip_norm is None:
            return ""
        norm = clip_grad_norm_(self.params, math.inf if self.clip_norm is None else self.clip_norm)
        if math.isfinite(norm) or self.nonfinite == "ignore":
            return ""
        wrong = [p for p in self.params if p.grad is not None and not _is_finite(p.grad)]
        return (
            f"the gradient of {self._name(wrong[0])} is not finite" if wrong else "the norm of the gradients overflows"
        )

    def _overflow(self, changed: list[tuple[Tensor, Array]]) -> str:
        """Which of the changed tensors, each with its array before, becomes NaN or infinite; "" if none does."""
        if all_finite([t._data for t, _ in changed if t._data.dtype.kind == "f"]):
            return ""
        for t, old in changed:
            was, now = to_numpy(old), to_numpy(t)
            if (~np.isfinite(now) & (now != was) & ~np.isnan(was)).any():
                cure = "" if isinstance(t, nn.module.Buffer) else ": lower the learning rate"
                return f"{self._name(t)} would become NaN or infinite{cure}"
        return ""

    def handle(self, fault: str, history: History) -> None:
        """Skip the step, or restore the last completed epoch, or raise the error."""
        if self.nonfinite == "restore":
            tensors, undo = self.epoch
            undo()
            for t, array in tensors:
                t._data = array
            history.diverged = fault
            return
        wrong = [p for p in self.params if not _is_finite(p)]
        if self.nonfinite == "skip" and not wrong:
            history.skipped += 1
            return
        kept = "parameters and running statistics are those before this step"
        if wrong:
            kept = f"{self._name(wrong[0])} was not finite before this step"
        error = NonFiniteError(f"{fault}; {kept}. See the option nonfinite of fit")
        error.history = history
        raise error

    def _name(self, p: Tensor) -> str:
        names = {t: name for name, t in self.model.named_tensors()}
        return names.get(p, f"a parameter of shape {p.shape}")


def _is_finite(t: Tensor) -> bool:
    return bool(np.isfinite(to_numpy(t)).all())
