"""The BatchNorm layers: their state, and which statistics normalise in which mode.

The computation is in `functional/batch_norm.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import DTypeLike

from tinygrad_bn import functional as F
from tinygrad_bn.arguments import BATCH_NORM, all_or_none, expect_flags, expect_floats, expect_number, warn_caller
from tinygrad_bn.backend import atomic
from tinygrad_bn.modes import REPEATING
from tinygrad_bn.nn.module import AFFINE, Buffer, Module, Parameter
from tinygrad_bn.tensor import Tensor


class _BatchNorm(Module):
    _optional: ClassVar = AFFINE | dict.fromkeys(("running_mean", "running_var", "num_batches_tracked"), Buffer)
    _checks: ClassVar = BATCH_NORM
    _shapes: ClassVar[dict[int, str]]  # how many axes the input may have, and their names
    _collect: Callable[[Any, Any, int], None] | None = None  # takes the statistics of each batch instead of `track`

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
        expect_flags(affine=affine, track_running_stats=track_running_stats)
        self.num_features, self.eps, self.momentum = num_features, eps, momentum  # checked, as when they are set later
        self.running_var_correction, self.virtual_batch_size = running_var_correction, virtual_batch_size
        self.num_batches_skipped, self.stats_frozen = 0, False
        if momentum is not None and 0.5 < momentum < 1 and running_var_correction:  # not from a preset
            warn_caller(
                f"momentum={momentum} is the weight of the NEW batch here, as in PyTorch; did you mean "
                f"{1 - momentum:.3g}? ({type(self).__name__}.keras and .onnx take the weight of the old value)"
            )
        self.weight = Parameter(np.ones(num_features, np.float32)) if affine else None
        self.bias = Parameter(np.zeros(num_features, np.float32)) if affine else None
        self.running_mean = Buffer(np.zeros(num_features, np.float32)) if track_running_stats else None
        self.running_var = Buffer(np.ones(num_features, np.float32)) if track_running_stats else None
        self.num_batches_tracked = Buffer(np.int64(0)) if track_running_stats else None

    @classmethod
    def keras(cls, num_features: int, eps: float = 1e-3, momentum: float = 0.99, **others: Any) -> Self:
        """With Keras' conventions: momentum is the weight of the OLD value, the running variance is biased."""
        return cls(num_features, eps, 1 - expect_number("momentum", momentum, 0, 1), running_var_correction=0, **others)

    @classmethod
    def onnx(cls, num_features: int, eps: float = 1e-5, momentum: float = 0.9, **others: Any) -> Self:
        """With ONNX' conventions: momentum is the weight of the OLD value, the running variance is biased."""
        return cls(num_features, eps, 1 - expect_number("momentum", momentum, 0, 1), running_var_correction=0, **others)

    # ---- forward ----------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        if self.virtual_batch_size and self.training and len(x) >= 2 * self.virtual_batch_size:
            return self._by_ghost_batches(x, len(x) // self.virtual_batch_size)
        if self.uses_batch(x):
            y, (mean, var) = F.batch_norm_training.run(x, self.weight, self.bias, eps=self.eps)
            self.track(mean, var, x.size // self.num_features)
            return y
        # Buffers are detached: a later update does not count as a change of this graph's operands.
        mean, var = (s.detach() if isinstance(s, Buffer) else s for s in (self.running_mean, self.running_var))
        return F.batch_norm_inference(x, mean, var, self.weight, self.bias, eps=self.eps)

    def uses_batch(self, x: Tensor) -> bool:
        """Whether the statistics of the batch normalise `x`, which is checked; otherwise the running ones do."""
        expect_floats(x, type(self).__name__)
        if x.ndim not in self._shapes or x.shape[1] != self.num_features:
            wanted = " or ".join(self._shapes.values()).replace("C", str(self.num_features))
            raise ValueError(f"{type(self).__name__}({self.num_features}) takes {wanted}; got shape {x.shape}")
        statistics = self.running_mean, self.running_var, self.num_batches_tracked
        all_or_none("running_mean, running_var and num_batches_tracked", *statistics)
        if self.running_mean is not None and (self.stats_frozen or not self.training or not x.size):
            return False
        if self.training and x.size == self.num_features:
            raise ValueError(
                f"{self!r} in training needs more than one value per channel, and got an input of shape {x.shape}. "
                "Leave out the last small batch (drop_last=True), or call eval() to use the running statistics, "
                "or freeze() this layer"
            )
        return True

    @atomic
    def track(self, mean: Any, var: Any, count: int) -> None:
        """In training, move the running statistics towards those of a batch, (C,) each, unless these are not finite.

        `running = (1 - momentum) * running + momentum * batch`, where the batch's variance is unbiased: `count` is the
        number of values in each channel.
        """
        if self.training and self._collect is not None:
            self._collect(mean, var, count)
            return
        buffers = [b for b in (self.running_mean, self.running_var, self.num_batches_tracked) if b is not None]
        if not (self.training and buffers) or REPEATING.get():
            return
        arrays = [b._data for b in buffers]
        momentum = 1 / (float(arrays[2]) + 1) if self.momentum is None else float(self.momentum)
        unbias = count / (count - self.running_var_correction)
        new_mean, (*others, finite) = F.running_statistics.run(*arrays, mean, var, momentum=momentum, unbias=unbias)
        if finite:
            for buffer, new in zip(buffers, (new_mean, *others), strict=True):
                buffer._data = new
            return
        self.num_batches_skipped += 1
        if self.num_batches_skipped == 1:
            warn_caller(
                f"{type(self).__name__}({self.num_features}) met a batch whose statistics are not finite; the "
                "running statistics stay as they were (num_batches_skipped counts such batches)",
                RuntimeWarning,
            )

    def _by_ghost_batches(self, x: Tensor, parts: int) -> Tensor:
        """Each part of the batch by itself: the parts are too small to be cut again."""
        bounds = [i * len(x) // parts for i in range(parts + 1)]
        return F.concatenate([self.forward(x[i:j]) for i, j in pairwise(bounds)])

    # ---- state ------------------------------------------------------------------------------------------

    @property
    def affine(self) -> bool:
        """Whether there are a weight and a bias."""
        return self.weight is not None

    @property
    def track_running_stats(self) -> bool:
        """Whether there are running statistics."""
        return self.running_mean is not None

    def freeze(self, affine: bool = True, stats: bool = True) -> Self:
        """Stop training the weight and bias, and use the running statistics in training mode too.

        Raises ValueError if statistics are to be frozen that are not tracked.
        """
        expect_flags(affine=affine, stats=stats)
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

    def extra_repr(self) -> str:
        m, frozen = self.momentum, self.weight is not None and not self.weight.requires_grad
        rule = "mean of all batches" if m is None else f"{1 - m:g} * running + {m:g} * batch"
        words = {
            f"{self.num_features}, eps={self.eps:g}": True,
            "affine=False": not self.affine,
            "track_running_stats=False": not self.track_running_stats,
            f"momentum={m if m is None else f'{m:g}'}: running = {rule}": self.track_running_stats,
            f"running_var_correction={self.running_var_correction}": self.running_var_correction != 1,
            f"virtual_batch_size={self.virtual_batch_size}": self.virtual_batch_size is not None,
            "stats frozen": self.stats_frozen,
            "affine frozen": frozen,
            f"{self.num_batches_skipped} batches skipped as not finite": self.num_batches_skipped > 0,
        }
        return ", ".join(word for word, applies in words.items() if applies)


_DOC = """Batch normalisation (Ioffe & Szegedy 2015) of {shapes}, each channel over all other axes.

    In training the batch's mean and biased variance normalise it, and the running statistics follow:
    `running = (1 - momentum) * running + momentum * batch`, the running variance from the unbiased estimate. In
    evaluation the running statistics normalise. {table}

    Names, defaults and keys are PyTorch's. A batch whose statistics are not finite leaves the running statistics
    as they were, and is counted in `num_batches_skipped`. Statistics and parameters of float16 input stay float32.

    Args:
        num_features: C.
        eps: added to the variance; greater than 0.
        momentum: the weight of the NEW batch; None for the mean of all batches so far.
        affine: whether to scale by a `weight` and shift by a `bias` of shape (C,), at first 1 and 0.
        track_running_stats: whether to keep `running_mean`, `running_var` and `num_batches_tracked`.
        running_var_correction: 1 for the unbiased running variance, 0 for the biased (Keras, ONNX).
        virtual_batch_size: for ghost batch normalisation (Hoffer et al. 2017): in training a batch is cut into parts
            of at least as many samples, of nearly equal size; each is normalised by its own statistics, and the
            running ones follow each in turn.

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
