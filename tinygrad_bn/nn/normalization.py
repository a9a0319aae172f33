"""Normalisation layers without running statistics. The computation is in `functional/normalization.py`."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from tinygrad_bn import functional as F
from tinygrad_bn.arguments import expect_array, expect_eps, expect_flags, expect_size
from tinygrad_bn.functional.normalization import last_axes
from tinygrad_bn.nn.module import AFFINE, Module, Parameter
from tinygrad_bn.tensor import Tensor

CHECKS = {**Module._checks, "eps": lambda _, eps: expect_eps(eps)}  # of options, as they are set


class LayerNorm(Module):
    """Layer normalisation (Ba et al. 2016) over the last axes, which have the shape `normalized_shape`."""

    _optional: ClassVar = AFFINE
    _checks: ClassVar = CHECKS

    def __init__(
        self, normalized_shape: int | tuple[int, ...], eps: float = 1e-5, elementwise_affine: bool = True
    ) -> None:
        expect_flags(elementwise_affine=elementwise_affine)
        self.normalized_shape, self.eps = last_axes(normalized_shape), eps
        self.weight = Parameter(np.ones(self.normalized_shape, np.float32)) if elementwise_affine else None
        self.bias = Parameter(np.zeros(self.normalized_shape, np.float32)) if elementwise_affine else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps:g}, elementwise_affine={self.weight is not None}"


class RMSNorm(Module):
    """Root-mean-square normalisation (Zhang & Sennrich 2019) over the last axes: no mean, no bias.

    As in PyTorch `eps` is by default the machine epsilon of the input's dtype, but of float32 for half precision.
    """

    _optional: ClassVar = {"weight": Parameter}
    _checks: ClassVar = CHECKS | {"eps": lambda _, eps: None if eps is None else expect_eps(eps)}

    def __init__(
        self, normalized_shape: int | tuple[int, ...], eps: float | None = None, elementwise_affine: bool = True
    ) -> None:
        expect_flags(elementwise_affine=elementwise_affine)
        self.normalized_shape, self.eps = last_axes(normalized_shape), eps
        self.weight = Parameter(np.ones(self.normalized_shape, np.float32)) if elementwise_affine else None

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.weight is not None}"


class GroupNorm(Module):
    """Group normalisation (Wu & He 2018) of (N, C, ...): each sample over groups of C / num_groups channels."""

    _optional: ClassVar = AFFINE
    _checks: ClassVar = CHECKS

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5, affine: bool = True) -> None:
        expect_flags(affine=affine)
        num_channels, num_groups = expect_size("num_channels", num_channels), expect_size("num_groups", num_groups)
        if num_channels % num_groups:
            raise ValueError(
                f"num_groups has to divide num_channels: {num_channels} channels do not divide into {num_groups} groups"
            )
        self.num_groups, self.num_channels, self.eps = num_groups, num_channels, eps
        self.weight = Parameter(np.ones(num_channels, np.float32)) if affine else None
        self.bias = Parameter(np.zeros(num_channels, np.float32)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        expect_array(x, "GroupNorm")
        if x.ndim < 2 or x.shape[1] != self.num_channels:
            raise ValueError(f"{self!r} takes (N, {self.num_channels}, ...); got shape {x.shape}")
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.num_groups}, {self.num_channels}, eps={self.eps:g}, affine={self.weight is not None}"


class _InstanceNorm(Module):
    _optional: ClassVar = AFFINE
    _checks: ClassVar = CHECKS
    _ndim: int

    def __init__(self, num_features: int, eps: float = 1e-5, *, affine: bool = False) -> None:
        expect_flags(affine=affine)
        self.num_features, self.eps = expect_size("num_features", num_features), eps
        self.weight = Parameter(np.ones(num_features, np.float32)) if affine else None
        self.bias = Parameter(np.zeros(num_features, np.float32)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        expect_array(x, type(self).__name__)
        if x.ndim != self._ndim or x.shape[1] != self.num_features:
            raise ValueError(f"{self!r} takes {self._ndim} axes with {self.num_features} channels; got {x.shape}")
        return F.instance_norm(x, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps:g}, affine={self.weight is not None}"


class InstanceNorm1d(_InstanceNorm):
    """Instance normalisation (Ulyanov et al. 2016) of (N, C, L): each channel of each sample by itself."""

    _ndim = 3


class InstanceNorm2d(_InstanceNorm):
    """Instance normalisation (Ulyanov et al. 2016) of (N, C, H, W): each channel of each sample by itself."""

    _ndim = 4
