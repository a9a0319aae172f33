"""Learning-rate schedules, with PyTorch's names and results."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinygrad_bn.optim.optimizer import Optimizer


class Schedule:
    """Base of the schedules: `step()`, once an epoch (or a batch), sets each group's `lr` to factor(t) · its first."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.initial = [group["lr"] for group in optimizer.param_groups]
        self.t = 0
        self._set()

    def factor(self, t: int) -> float:
        """The factor of the initial learning rates after `t` steps."""
        return 1.0

    def step(self) -> None:
        """Advance by one step."""
        self.t += 1
        self._set()

    def _set(self) -> None:
        for group, lr in zip(self.optimizer.param_groups, self.initial, strict=True):
            group["lr"] = lr * self.factor(self.t)


class StepLR(Schedule):
    """Multiplies the learning rate by `gamma` every `step_size` steps."""

    def __init__(self, optimizer: Optimizer, step_size: int, gamma: float = 0.1) -> None:
        if step_size < 1:
            raise ValueError(f"step_size has to be at least 1; got {step_size}")
        self.step_size, self.gamma = step_size, gamma
        super().__init__(optimizer)

    def factor(self, t: int) -> float:
        return float(self.gamma ** (t // self.step_size))


class CosineAnnealingLR(Schedule):
    """Lowers the learning rate to `eta_min` along half a cosine of `T_max` steps (Loshchilov & Hutter 2017).

    After that it rises again, as in PyTorch.
    """

    def __init__(self, optimizer: Optimizer, T_max: int, eta_min: float = 0.0) -> None:
        if T_max < 1:
            raise ValueError(f"T_max has to be at least 1; got {T_max}")
        self.T_max, self.eta_min = T_max, eta_min
        super().__init__(optimizer)

    def _set(self) -> None:
        wave = (1 + math.cos(math.pi * self.t / self.T_max)) / 2
        for group, lr in zip(self.optimizer.param_groups, self.initial, strict=True):
            group["lr"] = self.eta_min + (lr - self.eta_min) * wave


class WarmupLR(Schedule):
    """Raises the learning rate linearly over `warmup_steps`; then steps `after`, from its step 0."""

    def __init__(self, optimizer: Optimizer, warmup_steps: int, after: Schedule | None = None) -> None:
        if warmup_steps < 1:
            raise ValueError(f"warmup_steps has to be at least 1; got {warmup_steps}")
        self.warmup_steps, self.after = warmup_steps, after
        super().__init__(optimizer)

    def factor(self, t: int) -> float:
        return min(1.0, (t + 1) / (self.warmup_steps + 1))

    def step(self) -> None:
        if self.after is not None and self.t >= self.warmup_steps:
            self.after.step()
        else:
            super().step()
