"""Convolution layers, with PyTorch's names, defaults and state."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import numpy as np

from tinygrad_bn import functional as F
from tinygrad_bn.arguments import each_axis, expect_array, expect_fits_memory, expect_flags, expect_size
from tinygrad_bn.functional.convolution import Ints, Padding, pairs, transposed_options
from tinygrad_bn.nn import init
from tinygrad_bn.nn.module import AFFINE, Module, Parameter
from tinygrad_bn.tensor import Tensor


def options_repr(module: Module, **defaults: object) -> str:
    """The options that differ from their defaults, for `repr`."""
    return "".join(f", {k}={getattr(module, k)!r}" for k, v in defaults.items() if getattr(module, k, v) != v)


class _Conv(Module):
    _optional: ClassVar = AFFINE
    _ndim: ClassVar[int]
    _convolution: ClassVar[Callable[..., Tensor]]

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
        self.in_channels = expect_size("in_channels", in_channels)
        self.out_channels = expect_size("out_channels", out_channels)
        self.groups = expect_size("groups", groups)
        expect_flags(bias=bias)
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise ValueError(
                "groups has to divide in_channels and out_channels: "
                f"{in_channels} and {out_channels} channels do not divide into {groups} groups"
            )
        self.kernel_size = each_axis(kernel_size, self._ndim, "kernel_size", 1)
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self._check_options()
        expect_fits_memory(f"the weight of {type(self).__name__}", self._weight_shape())
        bound = 1 / math.sqrt(math.prod(self._weight_shape()[1:]))  # the fan-in, as PyTorch counts it
        self.weight = Parameter(np.empty(self._weight_shape(), np.float32))
        init.uniform_(self.weight, -bound, bound, rng)
        self.bias = Parameter(np.empty(self.out_channels, np.float32)) if bias else None
        if self.bias is not None:
            init.uniform_(self.bias, -bound, bound, rng)

    def _weight_shape(self) -> Ints:
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    def _check_options(self) -> None:
        steps = each_axis(self.stride, self._ndim, "stride", 1), each_axis(self.dilation, self._ndim, "dilation", 1)
        pairs(self.padding, self.kernel_size, *steps)

    def _check_input(self, x: Tensor) -> None:
        expect_array(x, type(self).__name__)
        if x.ndim != self._ndim + 2 or x.shape[1] != self.in_channels:
            axes = ", ".join(["N", str(self.in_channels), *"DHW"[3 - self._ndim :]])
            raise ValueError(f"{self!r} takes ({axes}); got shape {x.shape}")

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x)
        options = self.stride, self.padding, self.dilation, self.groups
        return type(self)._convolution(x, self.weight, self.bias, *options)

    def extra_repr(self) -> str:
        options = options_repr(self, stride=1, padding=0, dilation=1, groups=1, output_padding=0)
        no_bias = ", bias=False" if self.bias is None else ""
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}{options}{no_bias}"


class Conv1d(_Conv):
    """Convolution of (N, C, L); see `functional.conv1d`. `weight` is (out, in / groups, K)."""

    _ndim, _convolution = 1, staticmethod(F.conv1d)


class Conv2d(_Conv):
    """Convolution of (N, C, H, W); see `functional.conv2d`. `weight` is (out, in / groups, KH, KW).

    Both parameters start uniform on ±1/√(in / groups · KH · KW), as in PyTorch.
    """

    _ndim, _convolution = 2, staticmethod(F.conv2d)


class Conv3d(_Conv):
    """Convolution of (N, C, D, H, W); see `functional.conv3d`. `weight` is (out, in / groups, KD, KH, KW)."""

    _ndim, _convolution = 3, staticmethod(F.conv3d)


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

    def _check_options(self) -> None:
        transposed_options(self.stride, self.padding, self.output_padding, self.dilation)

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x)
        return F.conv_transpose2d(
            x, self.weight, self.bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
        )
