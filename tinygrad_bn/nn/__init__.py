"""Modules, layers and initialisers, with PyTorch's names, defaults and state-dict keys."""

# isort: off
from tinygrad_bn.nn import init
from tinygrad_bn.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from tinygrad_bn.nn.batch_statistics import BatchStatistics, batch_statistics
from tinygrad_bn.nn.conv import Conv1d, Conv2d, Conv3d, ConvTranspose2d
from tinygrad_bn.nn.fold import Folded, fold_batch_norm
from tinygrad_bn.nn.activations import (
    CELU, ELU, GELU, SELU, Hardsigmoid, Hardswish, Hardtanh, LeakyReLU, LogSigmoid, Mish, ReLU, ReLU6, Sigmoid, SiLU,
    Softmax, Softplus, Softsign, Tanh,
)  # fmt: skip
from tinygrad_bn.nn.containers import ModuleDict, ModuleList
from tinygrad_bn.nn.layers import Dropout, Embedding, Flatten, Identity, Linear
from tinygrad_bn.nn.module import Buffer, Module, Parameter, evaluating, observe
from tinygrad_bn.nn.normalization import GroupNorm, InstanceNorm1d, InstanceNorm2d, LayerNorm, RMSNorm
from tinygrad_bn.nn.pooling import (
    AdaptiveAvgPool1d, AdaptiveAvgPool2d, AdaptiveAvgPool3d, AdaptiveMaxPool1d, AdaptiveMaxPool2d, AdaptiveMaxPool3d,
    AvgPool1d, AvgPool2d, AvgPool3d, MaxPool1d, MaxPool2d, MaxPool3d,
)  # fmt: skip
from tinygrad_bn.nn.sequential import Sequential
# isort: on

__all__ = [
    "CELU", "ELU", "GELU", "SELU", "AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveAvgPool3d", "AdaptiveMaxPool1d",
    "AdaptiveMaxPool2d", "AdaptiveMaxPool3d", "AvgPool1d", "AvgPool2d", "AvgPool3d", "BatchNorm1d", "BatchNorm2d",
    "BatchNorm3d", "BatchStatistics", "Buffer", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose2d", "Dropout", "Embedding",
    "Flatten", "Folded", "GroupNorm", "Hardsigmoid", "Hardswish", "Hardtanh", "Identity", "InstanceNorm1d",
    "InstanceNorm2d", "LayerNorm", "LeakyReLU", "Linear", "LogSigmoid", "MaxPool1d", "MaxPool2d", "MaxPool3d", "Mish",
    "Module", "ModuleDict", "ModuleList", "Parameter", "RMSNorm", "ReLU", "ReLU6", "Sequential", "SiLU", "Sigmoid",
    "Softmax", "Softplus", "Softsign", "Tanh", "batch_statistics", "evaluating", "fold_batch_norm", "init", "observe",
]  # fmt: skip
