"""Compositions: ordinary functions of tensors, whose gradients need no code; and the primitives of `ops`.

Called with arrays, a function returns an array.
"""

# isort: off
from tinygrad_bn.functional.activations import (
    celu, gelu_tanh, hardsigmoid, hardswish, hardtanh, logsigmoid, mish, relu6, selu, softsign,
)  # fmt: skip
from tinygrad_bn.functional.basics import (
    concatenate, dropout, elu, embedding, flatten, gelu, leaky_relu, log_softmax, logsumexp, silu, softmax, stack,
)  # fmt: skip
from tinygrad_bn.functional.batch_norm import (
    Normalization, batch_norm, batch_norm_inference, batch_norm_relu, batch_norm_steps, batch_norm_training,
    running_statistics,
)  # fmt: skip
from tinygrad_bn.functional.batch_norm_gradient import batch_norm_gradient, batch_norm_weight_gradient
from tinygrad_bn.functional.convolution import conv1d, conv2d, conv3d, conv_transpose2d
from tinygrad_bn.functional.losses import (
    binary_cross_entropy_with_logits, cross_entropy, huber_loss, l1_loss, mse_loss, nll_loss, softmax_cross_entropy,
)  # fmt: skip
from tinygrad_bn.functional.normalization import group_norm, instance_norm, layer_norm, rms_norm
from tinygrad_bn.functional.pooling import (
    adaptive_avg_pool, adaptive_max_pool, avg_pool1d, avg_pool2d, avg_pool3d, max_pool1d, max_pool2d, max_pool3d,
)  # fmt: skip
from tinygrad_bn.functional.statistics import mean, mean_and_var, std, sum_of_squares, var
from tinygrad_bn.more_ops import (
    abs, argmax, argmin, clip, equal, erf, expm1, greater, greater_equal, less, less_equal, linear, max, maximum, min,
    minimum, not_equal, pad, pow, sigmoid, sign, softplus, tanh,
)  # fmt: skip
from tinygrad_bn.ops import (
    add, astype, broadcast_to, div, exp, log, matmul, mul, neg, relu, reshape, rsqrt, sqrt, sub, sum, transpose, where,
)  # fmt: skip
# isort: on

__all__ = [
    "Normalization", "abs", "adaptive_avg_pool", "adaptive_max_pool", "add", "argmax", "argmin", "astype",
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "batch_norm", "batch_norm_gradient", "batch_norm_inference",
    "batch_norm_relu", "batch_norm_steps", "batch_norm_training", "batch_norm_weight_gradient",
    "binary_cross_entropy_with_logits", "broadcast_to", "celu", "clip", "concatenate", "conv1d", "conv2d", "conv3d",
    "conv_transpose2d", "cross_entropy", "div", "dropout", "elu", "embedding", "equal", "erf", "exp", "expm1",
    "flatten", "gelu", "gelu_tanh", "greater", "greater_equal", "group_norm", "hardsigmoid", "hardswish", "hardtanh",
    "huber_loss", "instance_norm", "l1_loss", "layer_norm", "leaky_relu", "less", "less_equal", "linear", "log",
    "log_softmax", "logsigmoid", "logsumexp", "matmul", "max", "max_pool1d", "max_pool2d", "max_pool3d", "maximum",
    "mean", "mean_and_var", "min", "minimum", "mish", "mse_loss", "mul", "neg", "nll_loss", "not_equal", "pad", "pow",
    "relu", "relu6", "reshape", "rms_norm", "rsqrt", "running_statistics", "selu", "sigmoid", "sign", "silu",
    "softmax", "softmax_cross_entropy", "softplus", "softsign", "sqrt", "stack", "std", "sub", "sum",
    "sum_of_squares", "tanh", "transpose", "var", "where",
]  # fmt: skip
