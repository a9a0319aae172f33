"""Modules, layers and initialisers, with PyTorch's names, defaults and state-dict keys."""

from tinygrad_bn.nn import init
from tinygrad_bn.nn.layers import (
    ELU,
    GELU,
    Dropout,
    Flatten,
    LeakyReLU,
    Linear,
    ReLU,
    Sequential,
    Sigmoid,
    SiLU,
    Softmax,
    Softplus,
    Tanh,
)
from tinygrad_bn.nn.module import Buffer, Module, Parameter, evaluating, observe
from tinygrad_bn.nn.norm import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    LayerNorm,
    RMSNorm,
)

__all__ = [
    "ELU", "GELU", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "Buffer", "Dropout", "Flatten", "GroupNorm",
    "InstanceNorm1d", "InstanceNorm2d", "LayerNorm", "LeakyReLU", "Linear", "Module", "Parameter", "RMSNorm", "ReLU",
    "Sequential", "SiLU", "Sigmoid", "Softmax", "Softplus", "Tanh", "evaluating", "init", "observe",
]  # fmt: skip
