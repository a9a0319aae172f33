"""Learning-rate schedules, with PyTorch's names and results."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

from tinygrad_bn.arguments import expect_integer, expect_number, expect_size, shown
from tinygrad_bn.keywords import Named
from tinygrad_bn.optim.optimizer import Optimizer

RATES = ("lr", "initial_lr")  # of each group


class Schedule(Named):
    """Base of the schedules: `step()`, once an epoch (or a batch), sets the learning rate of each group.

    A subclass defines `next_lr`, usually from the rate before. So a rate that is set by hand is the one that goes on,
    and several schedules of one optimiser work together. `t` counts the steps.

    Each group keeps the rate that its first schedule found as `group["initial_lr"]`.

    Raises TypeError if `optimizer` is not an optimiser, TypeError or ValueError for options that do not fit.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.t = optimizer, 0
        self._check_all()
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def next_lr(self, lr: float, initial: float) -> float:
        """The learning rate after `t` steps.

        Args:
            lr: the one after t − 1 steps.
            initial: the first one.
        """
        raise TypeError(f"{type(self).__name__} defines no next_lr")

    def step(self) -> None:
        """Advance by one step. On an error nothing changes.

        Raises TypeError or ValueError if an option or a learning rate that was set by hand, or the next rate, does not
        fit.
        """
        self._advance()

    def _advance(self) -> None:
        self._check_all()
        groups = self.optimizer.param_groups
        for group in groups:
            group["lr"] = expect_number("lr", group["lr"], 0)
        self.t += 1
        try:
            rates = [expect_number("lr", self.next_lr(g["lr"], g["initial_lr"]), 0) for g in groups]
        except BaseException:
            self.t -= 1
            raise
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        """The options, the step, and the learning rates of the groups: enough to resume exactly."""
        own = {k: v.state_dict() if isinstance(v, Schedule) else v for k, v in self._attributes().items()}
        return {**own, **{rate: [group[rate] for group in self.optimizer.param_groups] for rate in RATES}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a `state_dict`, with the learning rates of the optimiser's groups; before or after its own state.

        Raises ValueError or TypeError, and changes nothing, if the state is that of another schedule or of another
        number of groups, or if an option does not fit.
        """
        for schedule, values in self._loading(state):
            vars(schedule).update(values)
        for i, group in enumerate(self.optimizer.param_groups):
            group.update({rate: state[rate][i] for rate in RATES})

    def _attributes(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "optimizer"}

    def _loading(self, state: Any) -> list[tuple[Schedule, dict[str, Any]]]:
        """This schedule and those inside it, each with its new attributes, all checked."""
        own, groups = self._attributes(), len(self.optimizer.param_groups)
        if not isinstance(state, Mapping) or state.keys() != {*own, *RATES}:
            raise ValueError(f"this is not the state of a {type(self).__name__}, which has {', '.join((*own, *RATES))}")
        for rate in RATES:
            if not isinstance(state[rate], list) or len(state[rate]) != groups:
                raise ValueError(
                    f"{rate} has to be a list of {groups} numbers, one for each group; got {state[rate]!r}"
                )
            for value in state[rate]:
                expect_number(rate, value, 0)
        new = {k: state[k] for k, v in own.items() if not isinstance(v, Schedule)}
        trial = copy.copy(self)
        vars(trial).update(new)
        trial._check_all()
        inside = [pair for k, v in own.items() if isinstance(v, Schedule) for pair in v._loading(state[k])]
        return [(self, new), *inside]

    def _check_all(self) -> None:
        if not isinstance(self.optimizer, Optimizer):
            raise TypeError(f"a schedule takes an Optimizer; got a {type(self.optimizer).__name__}")
        self.t = expect_integer("t", self.t, 0)
        self._check()

    def _check(self) -> None:
        """Raise TypeError or ValueError for an option that does not fit."""


class StepLR(Schedule):
    """Multiplies the learning rate by `gamma` every `step_size` steps."""

    def __init__(self, optimizer: Optimizer, step_size: int, gamma: float = 0.1) -> None:
        self.step_size, self.gamma = step_size, gamma
        super().__init__(optimizer)

    def _check(self) -> None:
        self.step_size = expect_size("step_size", self.step_size)
        self.gamma = expect_number("gamma", self.gamma, 0)

    def next_lr(self, lr: float, initial: float) -> float:
        return lr if self.t % self.step_size else lr * self.gamma


class CosineAnnealingLR(Schedule):
    """Lowers the learning rate to `eta_min` along half a cosine of `T_max` steps (Loshchilov & Hutter 2017).

    After that it rises again, as in PyTorch.
    """

    def __init__(self, optimizer: Optimizer, T_max: int, eta_min: float = 0.0) -> None:
        self.T_max, self.eta_min = T_max, eta_min
        super().__init__(optimizer)

    def _check(self) -> None:
        self.T_max = expect_size("T_max", self.T_max)
        self.eta_min = expect_number("eta_min", self.eta_min, 0)

    def next_lr(self, lr: float, initial: float) -> float:
        before, now = (1 + math.cos(math.pi * t / self.T_max) for t in (self.t - 1, self.t))
        if (self.t - 1) % (2 * self.T_max) == self.T_max:  # at the lowest point, where `before` is 0
            return lr + (initial - self.eta_min) * now / 2
        return (lr - self.eta_min) * now / before + self.eta_min


class WarmupLR(Schedule):
    """Raises the learning rate linearly over `warmup_steps`; then steps `after`, from its step 0.

    The first rate is 1 / (warmup_steps + 1) of the optimiser's.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int, after: Schedule | None = None) -> None:
        self.warmup_steps, self.after = warmup_steps, after
        super().__init__(optimizer)
        for group in optimizer.param_groups:
            group["lr"] /= self.warmup_steps + 1

    def _check(self) -> None:
        self.warmup_steps = expect_size("warmup_steps", self.warmup_steps)
        if not (self.after is None or isinstance(self.after, Schedule)):
            raise TypeError(f"after has to be a Schedule or None; got {shown(self.after)}")
        if self.after is not None and self.after.optimizer is not self.optimizer:
            raise ValueError("after is a schedule of another optimizer; make it for the optimizer of this WarmupLR")

    def next_lr(self, lr: float, initial: float) -> float:
        return lr * (self.t + 1) / self.t if self.t <= self.warmup_steps else lr

    def _advance(self) -> None:
        if self.after is not None and self.t >= self.warmup_steps:
            self.after.step()
        else:
            super()._advance()
