"""Linear, Embedding, Dropout, Flatten."""

from __future__ import annotations

import math
from typing import ClassVar, cast

import numpy as np

from tinygrad_bn import functional as F
from tinygrad_bn.arguments import (
    expect_array,
    expect_fits_memory,
    expect_flags,
    expect_integer,
    expect_size,
)
from tinygrad_bn.functional.basics import expect_probability
from tinygrad_bn.nn import init
from tinygrad_bn.nn.module import AFFINE, Module, Parameter
from tinygrad_bn.random import generator
from tinygrad_bn.tensor import Tensor


class Linear(Module):
    """y = x Wᵀ + b, from (..., in_features) to (..., out_features).

    `weight` is (out_features, in_features), as in PyTorch; both parameters start uniform on ±1/√in_features.
    """

    _optional: ClassVar = AFFINE

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, rng: np.random.Generator | None = None
    ) -> None:
        in_features = expect_size("in_features", in_features)
        out_features = expect_size("out_features", out_features)
        expect_flags(bias=bias)
        expect_fits_memory("the weight of Linear", (out_features, in_features))
        bound = 1 / math.sqrt(in_features)
        self.in_features, self.out_features = in_features, out_features
        self.weight = Parameter(np.empty((out_features, in_features), np.float32))
        init.uniform_(self.weight, -bound, bound, rng)
        self.bias = Parameter(np.empty(out_features, np.float32)) if bias else None
        if self.bias is not None:
            init.uniform_(self.bias, -bound, bound, rng)

    def forward(self, x: Tensor) -> Tensor:
        expect_array(x, "Linear")
        if not x.ndim or x.shape[-1] != self.in_features:
            raise ValueError(f"{self!r} got an input of shape {x.shape}; its last axis has to be {self.in_features}")
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class Embedding(Module):
    """Rows of a table: integers (...) to vectors (..., embedding_dim).

    `weight` is (num_embeddings, embedding_dim), at first N(0, 1). The row `padding_idx` starts as 0, and gets no
    gradient.

    Raises TypeError for indices that are no integers, and IndexError for one that the table does not have.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        rng: np.random.Generator | None = None,
    ) -> None:
        self.num_embeddings = expect_size("num_embeddings", num_embeddings)
        self.embedding_dim = expect_size("embedding_dim", embedding_dim)
        shape = self.num_embeddings, self.embedding_dim
        expect_fits_memory("the weight of Embedding", shape)
        self.weight = Parameter(np.empty(shape, np.float32))
        init.normal_(self.weight, rng=rng)
        self.padding_idx = None
        if padding_idx is not None:
            last = self.num_embeddings - 1
            self.padding_idx = expect_integer("padding_idx", padding_idx, -last - 1, last) % self.num_embeddings
            values = self.weight.numpy().copy()
            values[self.padding_idx] = 0
            self.weight.data = values

    def forward(self, x: Tensor) -> Tensor:
        expect_array(x, "Embedding")
        if x.dtype.kind not in "iu":
            raise TypeError(f"Embedding takes integers, the numbers of rows; got {x.dtype}")
        rows = F.embedding(x, self.weight)
        if self.padding_idx is None:
            return rows
        padding = F.reshape(x == self.padding_idx, shape=(*x.shape, 1))
        return cast(Tensor, F.where(padding, rows.detach(), rows))

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}"


class Identity(Module):
    """y = x."""

    def forward(self, x: Tensor) -> Tensor:
        expect_array(x, "Identity")
        return x


class Flatten(Module):
    """(N, ...) to (N, product of the rest)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.flatten(x)


class Dropout(Module):
    """In training, zeroes elements with probability `p` and scales the others by 1 / (1 − p)."""

    def __init__(self, p: float = 0.5, rng: np.random.Generator | None = None) -> None:
        expect_probability(p)
        generator(rng)  # raises TypeError unless it is one
        self.p, self.rng = p, rng

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, F.dropout(x, self.p, self.training, self.rng))

    def extra_repr(self) -> str:
        return f"p={self.p}"
