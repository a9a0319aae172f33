"""Normalisation layers. What they compute stands in `functional.normalization_steps`; here are state and modes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import DTypeLike

from tinygrad_bn import functional as F
from tinygrad_bn.device import as_array, full, kernel_or, to_numpy
from tinygrad_bn.nn.module import Buffer, Module, Parameter, evaluating
from tinygrad_bn.tensor import Array, Tensor


def _running_statistics(
    running_mean: Array, running_var: Array, mean: Array, var: Array, *, momentum: float, unbias: float
) -> tuple[Array, Array, bool]:
    """(1 − momentum) · running + momentum · batch of mean and unbias · variance, (C,); and whether all are finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        new_mean = ((1 - momentum) * running_mean + momentum * mean).astype(running_mean.dtype)
        new_var = ((1 - momentum) * running_var + momentum * (var * unbias)).astype(running_var.dtype)
    return new_mean, new_var, bool(np.isfinite(new_mean).all() and np.isfinite(new_var).all())


class BatchStatistics(NamedTuple):
    """Mean and biased variance of a batch, float64 (C,), and how many values of each channel they are of."""

    mean: Array
    var: Array
    size: int


class _BatchNorm(Module):
    _shapes: ClassVar[dict[int, str]]  # how many axes the input may have, and what they are
    _collected: list[BatchStatistics] | None = None  # where `batch_statistics` wants those of each batch

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        running_var_correction: int = 1,
        virtual_batch_size: int | None = None,
    ) -> None:
        if num_features < 1:
            raise ValueError(f"num_features has to be at least 1; got {num_features}")
        if not eps > 0:
            raise ValueError(f"eps has to be greater than 0; got {eps}")
        if momentum is not None and not 0 <= momentum <= 1:
            raise ValueError(f"momentum has to be in [0, 1], or None for the cumulative mean; got {momentum}")
        if virtual_batch_size is not None and virtual_batch_size < 1:
            raise ValueError(f"virtual_batch_size has to be at least 1, or None; got {virtual_batch_size}")
        if momentum is not None and 0.5 < momentum < 1 and running_var_correction:  # else it comes from a preset
            warnings.warn(
                f"momentum={momentum} is the weight of the NEW batch here, as in PyTorch; did you mean "
                f"{1 - momentum:.3g}? ({type(self).__name__}.keras and .onnx take the weight of the old value)",
                stacklevel=2,
            )
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.running_var_correction, self.virtual_batch_size = running_var_correction, virtual_batch_size
        self.num_batches_skipped = 0
        self.stats_frozen = False
        self.weight = Parameter(np.ones(num_features, np.float32)) if affine else None
        self.bias = Parameter(np.zeros(num_features, np.float32)) if affine else None
        self.running_mean = Buffer(np.zeros(num_features, np.float32)) if track_running_stats else None
        self.running_var = Buffer(np.ones(num_features, np.float32)) if track_running_stats else None
        self.num_batches_tracked = Buffer(np.int64(0)) if track_running_stats else None

    @classmethod
    def keras(cls, num_features: int, eps: float = 1e-3, momentum: float = 0.99, **options: Any) -> Self:
        """With Keras' conventions: momentum is the weight of the OLD value, the running variance is biased."""
        return cls(num_features, eps, 1 - momentum, running_var_correction=0, **options)

    @classmethod
    def onnx(cls, num_features: int, eps: float = 1e-5, momentum: float = 0.9, **options: Any) -> Self:
        """With ONNX' conventions: momentum is the weight of the OLD value, the running variance is biased."""
        return cls(num_features, eps, 1 - momentum, running_var_correction=0, **options)

    @property
    def affine(self) -> bool:
        """Whether there are a weight and a bias."""
        return self.weight is not None

    @property
    def track_running_stats(self) -> bool:
        """Whether there are running statistics."""
        return self.running_mean is not None

    def freeze(self, affine: bool = True, stats: bool = True) -> Self:
        """Stop training the weight and bias, and keep to the running statistics, in training mode too.

        Raises ValueError if statistics shall be frozen that are not tracked.
        """
        if stats and not self.track_running_stats:
            raise ValueError(f"{self!r} has no running statistics to freeze; call freeze(stats=False)")
        self.stats_frozen = stats
        return self.requires_grad_(False) if affine else self

    def unfreeze(self) -> Self:
        """Undo `freeze`."""
        self.stats_frozen = False
        return self.requires_grad_(True)

    def _convert(self, dtype: DTypeLike) -> None:
        super()._convert(np.result_type(dtype, np.float32))  # float16 could not hold statistics

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        """Normalise `x`, and with `relu` take the ReLU of the result in the same pass over memory."""
        self._check(x)
        uses_batch = (self.training and not self.stats_frozen) or not self.track_running_stats
        if not uses_batch or not x.size:
            y = self._normalize_by_running(x)
            return y.relu() if relu else y
        parts = len(x) // self.virtual_batch_size if self.training and self.virtual_batch_size else 1
        if parts < 2:
            return self._normalize_by_batch(x, relu)
        bounds = [i * len(x) // parts for i in range(parts + 1)]
        return F.concatenate([self._normalize_by_batch(x[i:j], relu) for i, j in pairwise(bounds)])

    def _normalize_by_batch(self, x: Tensor, relu: bool) -> Tensor:
        per_channel = x.size // self.num_features
        if self.training and per_channel == 1:
            raise ValueError(
                f"{self!r} in training needs more than one value per channel, and got an input of shape {x.shape}. "
                "Leave out the last small batch (drop_last=True), or call eval() to use the running statistics, "
                "or freeze() this layer"
            )
        y, mean, var = F.batch_norm_with_statistics(x, self.weight, self.bias, eps=self.eps, relu=relu)
        if self.training:
            self._track(mean, var, per_channel)
        return y

    def _check(self, x: Tensor) -> None:
        if x.ndim not in self._shapes or x.shape[1] != self.num_features:
            wanted = " or ".join(self._shapes.values()).replace("C", str(self.num_features))
            raise ValueError(f"{type(self).__name__}({self.num_features}) takes {wanted}; got shape {x.shape}")
        if x.dtype.kind != "f":
            raise TypeError(f"{type(self).__name__} takes floating-point input; got {x.dtype}")

    def _normalize_by_running(self, x: Tensor) -> Tensor:
        if self.running_mean is None or self.running_var is None:  # an empty batch, and nothing tracked
            mean, var = (Tensor._of(full((self.num_features,), v, x.dtype, x.device)) for v in (0, 1))
        else:  # detached: a later update must not look like a change of what this graph needs
            mean, var = self.running_mean.detach(), self.running_var.detach()
        return F.batch_norm(x, mean, var, self.weight, self.bias, eps=self.eps)

    def _track(self, mean: Any, var: Any, count: int) -> None:
        """Move the running statistics towards those that normalised this batch, unless they are not finite."""
        if self._collected is not None:
            self._collected.append(BatchStatistics(to_numpy(mean), to_numpy(var), count))
            return
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        tracked = self.num_batches_tracked._data + 1
        m = 1 / float(tracked) if self.momentum is None else self.momentum
        arrays = self.running_mean._data, self.running_var._data, mean, var
        options: Any = {"momentum": float(m), "unbias": count / (count - self.running_var_correction)}
        new_mean, new_var, finite = kernel_or(_running_statistics, "nn.running_statistics", *arrays, **options)
        if not finite:
            self.num_batches_skipped += 1
            if self.num_batches_skipped == 1:
                warnings.warn(
                    f"{type(self).__name__}({self.num_features}) met a batch whose statistics are not finite; the "
                    "running statistics stay as they were (num_batches_skipped counts such batches)",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return
        self.num_batches_tracked._data = as_array(tracked)
        self.running_mean._data, self.running_var._data = new_mean, new_var

    def extra_repr(self) -> str:
        words = [str(self.num_features), f"eps={self.eps:g}"]
        if not self.affine:
            words.append("affine=False")
        if not self.track_running_stats:
            words.append("track_running_stats=False")
        elif self.momentum is None:
            words.append("momentum=None: running = mean of all batches")
        else:
            old = f"{1 - self.momentum:g} * running + {self.momentum:g} * batch"
            words.append(f"momentum={self.momentum:g}: running = {old}")
        if self.running_var_correction != 1:
            words.append(f"running_var_correction={self.running_var_correction}")
        if self.virtual_batch_size is not None:
            words.append(f"virtual_batch_size={self.virtual_batch_size}")
        if self.stats_frozen:
            words.append("stats frozen")
        if self.weight is not None and not self.weight.requires_grad:
            words.append("affine frozen")
        if self.num_batches_skipped:
            words.append(f"{self.num_batches_skipped} batches skipped as not finite")
        return ", ".join(words)


_DOC = """Batch normalisation (Ioffe & Szegedy 2015) of {shapes}, each channel over all other axes.

    In training the batch's mean and biased variance normalise it, and the running statistics follow:
    `running = (1 - momentum) * running + momentum * batch`, the running variance from the unbiased estimate. In
    evaluation the running statistics normalise. {table}

    Names, defaults and keys are PyTorch's. A batch whose statistics are not finite leaves the running statistics
    as they were, and is counted in `num_batches_skipped`. float16 input is normalised in float32.

    Args:
        num_features: C.
        eps: added to the variance; greater than 0.
        momentum: the weight of the NEW batch; None for the mean of all batches so far.
        affine: whether to scale by a `weight` and shift by a `bias` of shape (C,), at first 1 and 0.
        track_running_stats: whether to keep `running_mean`, `running_var` and `num_batches_tracked`.
        running_var_correction: 1 for the unbiased running variance, 0 for the biased (Keras, ONNX).
        virtual_batch_size: for ghost batch normalisation (Hoffer et al. 2017): in training a batch is cut into parts
            of at least as many samples, as equal as can be; each is normalised by its own statistics, and the running
            ones follow each in turn.

    Raises:
        ValueError: options out of range; an input of another shape; or, in training, one value per channel.
        TypeError: an input that is not floating-point.
    """
_TABLE = """Which statistics normalise:

    ====================  ===========  ================
    .                     tracked      not tracked
    ====================  ===========  ================
    train()               the batch's  the batch's
    eval()                running      the batch's
    train(), frozen       running      (cannot be)
    ====================  ===========  ================"""


class BatchNorm1d(_BatchNorm):
    __doc__ = _DOC.format(shapes="(N, C) or (N, C, L)", table=_TABLE)
    _shapes: ClassVar = {2: "(N, C)", 3: "(N, C, L)"}


class BatchNorm2d(_BatchNorm):
    __doc__ = _DOC.format(shapes="(N, C, H, W)", table="See `BatchNorm1d` for a table.")
    _shapes: ClassVar = {4: "(N, C, H, W)"}


class BatchNorm3d(_BatchNorm):
    __doc__ = _DOC.format(shapes="(N, C, D, H, W)", table="See `BatchNorm1d` for a table.")
    _shapes: ClassVar = {5: "(N, C, D, H, W)"}


BATCH_NORMS = (BatchNorm1d, BatchNorm2d, BatchNorm3d)


@contextmanager
def batch_statistics(model: Module) -> Iterator[dict[_BatchNorm, list[BatchStatistics]]]:
    """Evaluation mode for this block, but BatchNorm normalises by the batch: its running statistics stay as they are.

    Gives, for each BatchNorm that has running statistics, the list that fills with what normalised each batch; of a
    frozen one it stays empty. Dropout does nothing. Afterwards every module is in the mode it was in.

    >>> bn = BatchNorm1d(1)
    >>> with batch_statistics(bn) as collected:
    ...     y = bn(np.array([[1.0], [3.0]]))
    >>> [(s.mean.item(), s.var.item(), s.size) for s in collected[bn]], bn.running_mean.item()
    ([(2.0, 1.0, 2)], 0.0)
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    collected: dict[_BatchNorm, list[BatchStatistics]] = {layer: [] for layer in layers}
    with evaluating(model):
        for layer in layers:
            layer.training, layer._collected = True, collected[layer]
        try:
            yield collected
        finally:
            for layer in layers:
                layer._collected = None


class LayerNorm(Module):
    """Layer normalisation (Ba et al. 2016) over the last axes, which have the shape `normalized_shape`."""

    def __init__(
        self, normalized_shape: int | tuple[int, ...], eps: float = 1e-5, elementwise_affine: bool = True
    ) -> None:
        self.normalized_shape = tuple(int(n) for n in np.atleast_1d(normalized_shape))
        self.eps = eps
        self.weight = Parameter(np.ones(self.normalized_shape, np.float32)) if elementwise_affine else None
        self.bias = Parameter(np.zeros(self.normalized_shape, np.float32)) if elementwise_affine else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps:g}, elementwise_affine={self.weight is not None}"


class RMSNorm(Module):
    """Root-mean-square normalisation (Zhang & Sennrich 2019) over the last axes: no mean, no bias.

    As in PyTorch `eps` is by default the machine epsilon of the input's dtype.
    """

    def __init__(
        self, normalized_shape: int | tuple[int, ...], eps: float | None = None, elementwise_affine: bool = True
    ) -> None:
        self.normalized_shape = tuple(int(n) for n in np.atleast_1d(normalized_shape))
        self.eps = eps
        self.weight = Parameter(np.ones(self.normalized_shape, np.float32)) if elementwise_affine else None

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.weight is not None}"


class GroupNorm(Module):
    """Group normalisation (Wu & He 2018) of (N, C, ...): each sample over groups of C / num_groups channels."""

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5, affine: bool = True) -> None:
        if num_groups < 1 or num_channels % num_groups:
            raise ValueError(f"{num_channels} channels do not divide into {num_groups} groups")
        self.num_groups, self.num_channels, self.eps = num_groups, num_channels, eps
        self.weight = Parameter(np.ones(num_channels, np.float32)) if affine else None
        self.bias = Parameter(np.zeros(num_channels, np.float32)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim < 2 or x.shape[1] != self.num_channels:
            raise ValueError(f"{self!r} takes (N, {self.num_channels}, ...); got shape {x.shape}")
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.num_groups}, {self.num_channels}, eps={self.eps:g}, affine={self.weight is not None}"


class _InstanceNorm(Module):
    _ndim: int

    def __init__(self, num_features: int, eps: float = 1e-5, *, affine: bool = False) -> None:
        self.num_features, self.eps = num_features, eps
        self.weight = Parameter(np.ones(num_features, np.float32)) if affine else None
        self.bias = Parameter(np.zeros(num_features, np.float32)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != self._ndim or x.shape[1] != self.num_features:
            raise ValueError(f"{self!r} takes {self._ndim} axes with {self.num_features} channels; got {x.shape}")
        if x.size and x.size == x.shape[0] * x.shape[1]:
            raise ValueError(f"{self!r} needs more than one value per channel; got shape {x.shape}")
        return F.instance_norm(x, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps:g}, affine={self.weight is not None}"


class InstanceNorm1d(_InstanceNorm):
    """Instance normalisation (Ulyanov et al. 2016) of (N, C, L): each channel of each sample by itself."""

    _ndim = 3


class InstanceNorm2d(_InstanceNorm):
    """Instance normalisation (Ulyanov et al. 2016) of (N, C, H, W): each channel of each sample by itself."""

    _ndim = 4
