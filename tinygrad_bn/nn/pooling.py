"""Pooling layers, with PyTorch's names and defaults."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from tinygrad_bn import functional as F
from tinygrad_bn.arguments import each_axis, expect_array, expect_flags
from tinygrad_bn.functional.convolution import Ints
from tinygrad_bn.functional.pooling import window_options
from tinygrad_bn.nn.conv import options_repr
from tinygrad_bn.nn.module import Module
from tinygrad_bn.tensor import Tensor


class _Pool(Module):
    _axes: ClassVar[int]
    _pool: ClassVar[Callable[..., Tensor]]

    def __init__(
        self,
        kernel_size: int | Ints,
        stride: int | Ints | None,
        padding: int | Ints,
        ceil_mode: bool,
        dilation: int | Ints = 1,
    ) -> None:
        window_options(self._axes, kernel_size, stride, padding, dilation)
        expect_flags(ceil_mode=ceil_mode)
        self.kernel_size, self.stride = kernel_size, kernel_size if stride is None else stride
        self.padding, self.ceil_mode = padding, ceil_mode

    def extra_repr(self) -> str:
        options = options_repr(
            self, stride=self.kernel_size, padding=0, dilation=1, ceil_mode=False, count_include_pad=True
        )
        return f"kernel_size={self.kernel_size}{options}"


class _MaxPool(_Pool):
    def __init__(
        self,
        kernel_size: int | Ints,
        stride: int | Ints | None = None,
        padding: int | Ints = 0,
        dilation: int | Ints = 1,
        ceil_mode: bool = False,
    ) -> None:
        super().__init__(kernel_size, stride, padding, ceil_mode, dilation)
        self.dilation = dilation

    def forward(self, x: Tensor) -> Tensor:
        return type(self)._pool(x, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)


class MaxPool1d(_MaxPool):
    """The largest element of each window of (N, C, L); see `functional.max_pool1d`."""

    _axes, _pool = 1, staticmethod(F.max_pool1d)


class MaxPool2d(_MaxPool):
    """The largest element of each window of (N, C, H, W); see `functional.max_pool2d`."""

    _axes, _pool = 2, staticmethod(F.max_pool2d)


class MaxPool3d(_MaxPool):
    """The largest element of each window of (N, C, D, H, W); see `functional.max_pool3d`."""

    _axes, _pool = 3, staticmethod(F.max_pool3d)


class _AvgPool(_Pool):
    def __init__(
        self,
        kernel_size: int | Ints,
        stride: int | Ints | None = None,
        padding: int | Ints = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
    ) -> None:
        super().__init__(kernel_size, stride, padding, ceil_mode)
        expect_flags(count_include_pad=count_include_pad)
        self.count_include_pad = count_include_pad

    def forward(self, x: Tensor) -> Tensor:
        return type(self)._pool(x, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad)


class AvgPool1d(_AvgPool):
    """The mean of each window of (N, C, L); see `functional.avg_pool1d`."""

    _axes, _pool = 1, staticmethod(F.avg_pool1d)


class AvgPool2d(_AvgPool):
    """The mean of each window of (N, C, H, W); see `functional.avg_pool2d`."""

    _axes, _pool = 2, staticmethod(F.avg_pool2d)


class AvgPool3d(_AvgPool):
    """The mean of each window of (N, C, D, H, W); see `functional.avg_pool3d`."""

    _axes, _pool = 3, staticmethod(F.avg_pool3d)


class _AdaptivePool(Module):
    _axes: ClassVar[int]
    _pool: ClassVar[Callable[..., Tensor]]

    def __init__(self, output_size: int | Ints) -> None:
        each_axis(output_size, self._axes, "output_size", 1)
        self.output_size = output_size

    def extra_repr(self) -> str:
        return f"{self.output_size}"

    def forward(self, x: Tensor) -> Tensor:
        expect_array(x, type(self).__name__)
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
