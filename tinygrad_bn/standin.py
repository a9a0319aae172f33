"""Tensors that stand for another one while a function runs: under `vmap`, and when a module is traced."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NoReturn

import numpy as np

from tinygrad_bn.tensor import Tensor


class StandIn(Tensor):
    """A tensor that stands for another one, `value`. Reading its numbers in Python is an error, `unreadable`."""

    __slots__ = ("value",)

    unreadable: ClassVar[tuple[type[Exception], str]]  # the error of reading a number
    value: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.value.dtype

    @property
    def device(self) -> str:
        return self.value.device

    def __len__(self) -> int:
        if not self.ndim:
            raise TypeError("a 0-d tensor has no length")
        return self.shape[0]

    def _read(self, *_: Any, **__: Any) -> NoReturn:
        error, words = self.unreadable
        raise error(words)

    item = numpy = __array__ = __bool__ = __float__ = __int__ = __index__ = _read
    data = property(_read)
