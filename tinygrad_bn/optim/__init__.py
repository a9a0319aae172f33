"""Optimisers, learning-rate schedules and gradient clipping, with PyTorch's names, defaults and results."""

from tinygrad_bn.optim.algorithms import SGD, Adagrad, Adam, AdamW, RMSprop
from tinygrad_bn.optim.gradients import clip_grad_norm_, clip_grad_value_
from tinygrad_bn.optim.optimizer import Optimizer, param_groups
from tinygrad_bn.optim.schedules import CosineAnnealingLR, Schedule, StepLR, WarmupLR

__all__ = [
    "SGD", "Adagrad", "Adam", "AdamW", "CosineAnnealingLR", "Optimizer", "RMSprop", "Schedule", "StepLR", "WarmupLR",
    "clip_grad_norm_", "clip_grad_value_", "param_groups",
]  # fmt: skip
