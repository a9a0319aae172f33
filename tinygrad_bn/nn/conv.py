"""Convolution and pooling layers, with PyTorch's names, defaults and state."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import numpy as np

from tinygrad_bn import functional as F
from tinygrad_bn.functional.convolution import Ints, Padding
from tinygrad_bn.nn import init
from tinygrad_bn.nn.module import Module, Parameter
from tinygrad_bn.tensor import Tensor


def _options(module: Module, **defaults: object) -> str:
    """The options that differ from their defaults, for `repr`."""
    return "".join(f", {k}={getattr(module, k)!r}" for k, v in defaults.items() if getattr(module, k, v) != v)


class _Conv(Module):
    _ndim: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Ints,
        stride: int | Ints = 1,
        padding: Padding = 0,
        dilation: int | Ints = 1,
        groups: int = 1,
        bias: bool = True,
        rng: np.random.Generator | None = None,
    ) -> None:
        if in_channels < 1 or out_channels < 1 or groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(f"{in_channels} and {out_channels} channels do not divide into {groups} groups")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = (
            (int(kernel_size),) * self._ndim if isinstance(kernel_size, int | np.integer) else tuple(kernel_size)
        )
        if len(self.kernel_size) != self._ndim or min(self.kernel_size) < 1:
            raise ValueError(f"kernel_size is an integer of at least 1, or {self._ndim} of them; got {kernel_size!r}")
        self.stride, self.padding, self.dilation = stride, padding, dilation
        bound = 1 / math.sqrt(math.prod(self._weight_shape()[1:]))  # the fan-in, as PyTorch counts it
        self.weight = Parameter(np.empty(self._weight_shape(), np.float32))
        init.uniform_(self.weight, -bound, bound, rng)
        self.bias = Parameter(np.empty(out_channels, np.float32)) if bias else None
        if self.bias is not None:
            init.uniform_(self.bias, -bound, bound, rng)

    def _weight_shape(self) -> Ints:
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    def _check_input(self, x: Tensor) -> None:
        if x.ndim != self._ndim + 2 or x.shape[1] != self.in_channels:
            axes = ", ".join(["N", str(self.in_channels), *"DHW"[3 - self._ndim :]])
            raise ValueError(f"{self!r} takes ({axes}); got shape {x.shape}")

    def extra_repr(self) -> str:
        options = _options(self, stride=1, padding=0, dilation=1, groups=1, output_padding=0)
        no_bias = ", bias=False" if self.bias is None else ""
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}{options}{no_bias}"


class Conv1d(_Conv):
    """Convolution of (N, C, L); see `functional.conv2d`. `weight` is (out, in / groups, K)."""

    _ndim = 1

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x)
        return F.conv1d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Conv2d(_Conv):
    """Convolution of (N, C, H, W); see `functional.conv2d`. `weight` is (out, in / groups, KH, KW).

    Both parameters start uniform on ±1/√(in / groups · KH · KW), as in PyTorch.
    """

    _ndim = 2

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Conv3d(_Conv):
    """Convolution of (N, C, D, H, W); see `functional.conv2d`. `weight` is (out, in / groups, KD, KH, KW)."""

    _ndim = 3

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x)
        return F.conv3d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class ConvTranspose2d(_Conv):
    """The adjoint of `Conv2d`; see `functional.conv_transpose2d`. `weight` is (in, out / groups, KH, KW)."""

    _ndim = 2

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Ints,
        stride: int | Ints = 1,
        padding: int | Ints = 0,
        output_padding: int | Ints = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | Ints = 1,
        rng: np.random.Generator | None = None,
    ) -> None:
        self.output_padding = output_padding
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, rng)

    def _weight_shape(self) -> Ints:
        return self.in_channels, self.out_channels // self.groups, *self.kernel_size

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x)
        return F.conv_transpose2d(
            x, self.weight, self.bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
        )


class _MaxPool(Module):
    _pool: ClassVar[Callable[..., Tensor]]

    def __init__(
        self,
        kernel_size: int | Ints,
        stride: int | Ints | None = None,
        padding: int | Ints = 0,
        dilation: int | Ints = 1,
        ceil_mode: bool = False,
    ) -> None:
        self.kernel_size, self.stride, self.padding = kernel_size, kernel_size if stride is None else stride, padding
        self.dilation, self.ceil_mode = dilation, ceil_mode

    def extra_repr(self) -> str:
        options = _options(self, stride=self.kernel_size, padding=0, dilation=1, ceil_mode=False)
        return f"kernel_size={self.kernel_size}{options}"

    def forward(self, x: Tensor) -> Tensor:
        return type(self)._pool(x, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)


class MaxPool1d(_MaxPool):
    """The largest element of each window of (N, C, L); see `functional.max_pool2d`."""

    _pool = staticmethod(F.max_pool1d)


class MaxPool2d(_MaxPool):
    """The largest element of each window of (N, C, H, W); see `functional.max_pool2d`."""

    _pool = staticmethod(F.max_pool2d)


class MaxPool3d(_MaxPool):
    """The largest element of each window of (N, C, D, H, W); see `functional.max_pool2d`."""

    _pool = staticmethod(F.max_pool3d)


class _AvgPool(Module):
    _pool: ClassVar[Callable[..., Tensor]]

    def __init__(
        self,
        kernel_size: int | Ints,
        stride: int | Ints | None = None,
        padding: int | Ints = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
    ) -> None:
        self.kernel_size, self.stride, self.padding = kernel_size, kernel_size if stride is None else stride, padding
        self.ceil_mode, self.count_include_pad = ceil_mode, count_include_pad

    def extra_repr(self) -> str:
        options = _options(self, stride=self.kernel_size, padding=0, ceil_mode=False, count_include_pad=True)
        return f"kernel_size={self.kernel_size}{options}"

    def forward(self, x: Tensor) -> Tensor:
        return type(self)._pool(x, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad)


class AvgPool1d(_AvgPool):
    """The mean of each window of (N, C, L); see `functional.avg_pool2d`."""

    _pool = staticmethod(F.avg_pool1d)


class AvgPool2d(_AvgPool):
    """The mean of each window of (N, C, H, W); see `functional.avg_pool2d`."""

    _pool = staticmethod(F.avg_pool2d)


class AvgPool3d(_AvgPool):
    """The mean of each window of (N, C, D, H, W); see `functional.avg_pool2d`."""

    _pool = staticmethod(F.avg_pool3d)


class _AdaptivePool(Module):
    _axes: ClassVar[int]
    _pool: ClassVar[Callable[..., Tensor]]

    def __init__(self, output_size: int | Ints) -> None:
        self.output_size = output_size

    def extra_repr(self) -> str:
        return f"{self.output_size}"

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != self._axes + 2:
            raise ValueError(f"{type(self).__name__} takes {self._axes + 2} axes, (N, C, ...); got {x.shape}")
        return type(self)._pool(x, self.output_size)


class AdaptiveAvgPool1d(_AdaptivePool):
    """Means of the windows that divide (N, C, L) into `output_size`; 1 is global average pooling."""

    _axes, _pool = 1, staticmethod(F.adaptive_avg_pool)


class AdaptiveAvgPool2d(_AdaptivePool):
    """Means of the windows that divide (N, C, H, W) into `output_size`; 1 is global average pooling."""

    _axes, _pool = 2, staticmethod(F.adaptive_avg_pool)


class AdaptiveAvgPool3d(_AdaptivePool):
    """Means of the windows that divide (N, C, D, H, W) into `output_size`; 1 is global average pooling."""

    _axes, _pool = 3, staticmethod(F.adaptive_avg_pool)


class AdaptiveMaxPool1d(_AdaptivePool):
    """The largest elements of the windows that divide (N, C, L) into `output_size`."""

    _axes, _pool = 1, staticmethod(F.adaptive_max_pool)


class AdaptiveMaxPool2d(_AdaptivePool):
    """The largest elements of the windows that divide (N, C, H, W) into `output_size`."""

    _axes, _pool = 2, staticmethod(F.adaptive_max_pool)


class AdaptiveMaxPool3d(_AdaptivePool):
    """The largest elements of the windows that divide (N, C, D, H, W) into `output_size`."""

    _axes, _pool = 3, staticmethod(F.adaptive_max_pool)
