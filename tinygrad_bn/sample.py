"""Test inputs of ops.

An op's `sample` is a function from a `Draw` to `(operands, params)`. Tests pass a `Draw` backed by Hypothesis,
`testing.check_op` passes a `RandomDraw`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
Array: TypeAlias = NDArray[Any]
Shape: TypeAlias = tuple[int, ...]


class Domain(NamedTuple):
    """The interval [low, high] that operands are drawn from, without values closer than `gap` to 0."""

    low: float
    high: float
    gap: float = 0.0


REAL = Domain(-3.0, 3.0)
POSITIVE = Domain(0.3, 3.0)
NONZERO = Domain(-3.0, 3.0, gap=0.2)  # away from a pole or a kink at 0


class Draw(Protocol):
    """The random source of a sample. Arrays are float64; the tests cast them to the dtype under test."""

    def shape(self, min_dims: int = 0, max_dims: int = 3, min_side: int = 0, max_side: int = 4) -> Shape: ...
    def broadcastable(self, count: int) -> Sequence[Shape]:
        """Shapes that broadcast with each other."""

    def array(self, domain: Domain, shape: Shape) -> Array: ...
    def distinct(self, shape: Shape) -> Array:
        """Values that differ by at least 0.2, in random order: no ties for max or argmax."""

    def integer(self, low: int, high: int) -> int: ...
    def integers(self, low: int, high: int, shape: Shape) -> Array:
        """int64 indices in [low, high]."""

    def choice(self, options: Sequence[T]) -> T: ...


class RandomDraw:
    """A `Draw` from a seeded generator."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def shape(self, min_dims: int = 0, max_dims: int = 3, min_side: int = 0, max_side: int = 4) -> Shape:
        sides = self.rng.integers(min_side, max_side + 1, self.integer(min_dims, max_dims))
        return tuple(int(n) for n in sides)

    def broadcastable(self, count: int) -> Sequence[Shape]:
        full = self.shape(min_side=1)
        shapes = []
        for _ in range(count):
            kept = full[self.integer(0, len(full)) :]
            shapes.append(tuple(1 if self.rng.random() < 0.3 else n for n in kept))
        return shapes

    def array(self, domain: Domain, shape: Shape) -> Array:
        x = self.rng.uniform(domain.low, domain.high, shape)
        if domain.gap or not domain.low <= 0 <= domain.high:
            return np.where(np.abs(x) < domain.gap, domain.gap, x)
        return np.where(np.abs(x) < 0.05 * (domain.high - domain.low), 0.0, x)  # a tenth is 0, where g · y / x is 0 / 0

    def distinct(self, shape: Shape) -> Array:
        return self.rng.permutation(math.prod(shape)).reshape(shape) * 0.2 - 1.0

    def integer(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def integers(self, low: int, high: int, shape: Shape) -> Array:
        return self.rng.integers(low, high + 1, shape)

    def choice(self, options: Sequence[Any]) -> Any:
        return options[self.integer(0, len(options) - 1)]


Drawn: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]  # operands, each an array or None, and options
Sample: TypeAlias = Callable[[Draw], Drawn]


def completed(sample: Sample, defaults: dict[str, Any]) -> Sample:
    """A sample with the options that it leaves out. Raises TypeError unless it is a function."""
    if not callable(sample):
        raise TypeError(f"sample is a function of a Draw, as elementwise(REAL) gives one; got {sample!r}")

    def draw(d: Draw) -> Drawn:
        operands, params = sample(d)
        return operands, {**defaults, **params}

    return draw


def elementwise(*domains: Domain, **params: Any) -> Sample:
    """One operand per domain, all of one shape, and fixed params."""

    def sample(d: Draw) -> Drawn:
        shape = d.shape()
        return tuple(d.array(domain, shape) for domain in domains), params

    return sample


def broadcasting(*domains: Domain) -> Sample:
    """One operand per domain; their shapes broadcast with each other."""

    def sample(d: Draw) -> Drawn:
        shapes = d.broadcastable(len(domains))
        return tuple(d.array(domain, shape) for domain, shape in zip(domains, shapes, strict=True)), {}

    return sample


def reducing(*, distinct: bool = False, tuples: bool = True) -> Sample:
    """One operand and the params `axis` and `keepdims` of a reduction.

    With `distinct`, the operand is not empty and has no ties. With `tuples`, `axis` can be a tuple.
    """

    def sample(d: Draw) -> Drawn:
        shape = d.shape(min_side=1 if distinct else 0)
        axes = [None, *range(-len(shape), len(shape))]
        if tuples and len(shape) > 1:
            axes.append((0, len(shape) - 1))
        params = {"axis": d.choice(axes), "keepdims": d.choice([False, True])}
        return (d.distinct(shape) if distinct else d.array(REAL, shape),), params

    return sample


# ---- single ops -----------------------------------------------------------------------------------------


def for_clip(d: Draw) -> Drawn:
    """Values away from the limits; either limit can be None."""
    low, high = d.choice([(-1.0, 1.0), (None, 0.5), (-0.5, None)])
    x = d.array(NONZERO, d.shape())
    for bound in (low, high):
        if bound is not None:
            x = np.where(np.abs(x - bound) < 0.1, 0.2, x)  # away from the kinks
    return (x,), {"min": low, "max": high}


def for_distinct_pair(d: Draw) -> Drawn:
    """Two operands that broadcast with each other, without ties."""
    shapes = d.broadcastable(2)
    return (d.distinct(shapes[0]), d.distinct(shapes[1]) + 0.1), {}


def for_where(d: Draw) -> Drawn:
    """A boolean condition and two operands that broadcast with it."""
    shapes = d.broadcastable(3)
    return (d.integers(0, 1, shapes[0]).astype(bool), d.array(REAL, shapes[1]), d.array(REAL, shapes[2])), {}


def for_broadcast_to(d: Draw) -> Drawn:
    """An operand and a shape that it broadcasts to, along axes of length 1 and new axes."""
    narrow, wide = d.choice([((2, 1), (2, 3)), ((2, 1), (4, 2, 3)), ((), (3, 2)), ((3,), (3,)), ((1,), (0,))])
    return (d.array(REAL, narrow),), {"shape": wide}


def for_sum_to(d: Draw) -> Drawn:
    """The reverse of `for_broadcast_to`: a broadcast operand and its original shape."""
    (x,), params = for_broadcast_to(d)
    return (d.array(REAL, params["shape"]),), {"shape": x.shape}


def for_matmul(d: Draw) -> Drawn:
    """Matrices, stacks of matrices that broadcast, and vectors as either operand."""
    n, k, m = d.integer(0, 3), d.integer(1, 3), d.integer(1, 3)
    shapes = [
        ((n, k), (k, m)), ((2, n, k), (k, m)), ((1, n, k), (2, k, m)), ((2, 1, n, k), (3, k, m)), ((k,), (k,)),
        ((n, k), (k,)), ((k,), (k, m)), ((2, n, k), (k,)), ((k,), (2, k, m)),
    ]  # fmt: skip
    a, b = d.choice(shapes)
    return (d.array(REAL, a), d.array(REAL, b)), {}


def for_linear(d: Draw) -> Drawn:
    """An input of one, two or three axes, possibly empty, a weight, and a bias or None."""
    n, k, m = d.integer(0, 3), d.integer(1, 3), d.integer(1, 3)
    x = d.choice([(n, k), (k,), (2, n, k)])
    return (d.array(REAL, x), d.array(REAL, (m, k)), d.array(REAL, (m,)) if d.choice([True, True, False]) else None), {}


def for_reshape(d: Draw) -> Drawn:
    """An operand and a new shape of the same size, with and without -1."""
    shape = d.shape(min_side=1)
    x = d.array(REAL, shape)
    return (x,), {"shape": d.choice([(x.size,), -1, (1, *shape), shape[::-1], (*shape[:1], -1)])}


_INDICES: list[Any] = [
    1, -1, slice(None, None, -2), (0, slice(1, None)), (Ellipsis, 1), (None, 0), [2, 0, 2], ([0, 2, 0], [1, 1, 1]),
    np.array([[True, False, True], [False] * 3, [True] * 3]), (slice(None), [0, 0]), np.array([True, False, True]),
    ((0, 0, 0), (1, 1, 1)), ((0, 0, 1),),
]  # fmt: skip


def for_getitem(d: Draw) -> Drawn:
    """A matrix and a basic, integer or boolean index, also with repeated elements."""
    return (d.array(REAL, (3, 3)),), {"index": d.choice(_INDICES)}


def for_scatter_add(d: Draw) -> Drawn:
    """An operand of the shape of `matrix[index]`, the index, and the shape of the matrix."""
    index = d.choice(_INDICES)
    return (d.array(REAL, np.zeros((3, 3))[index].shape),), {"index": index, "shape": (3, 3)}


def for_concatenate(d: Draw) -> Drawn:
    """Three operands that can have different lengths along `axis`."""
    axis = d.choice([0, 1, -1])
    shapes = [tuple(n if i != axis % 2 else d.integer(0, 3) for i, n in enumerate((2, 3))) for _ in range(3)]
    return tuple(d.array(REAL, shape) for shape in shapes), {"axis": axis}


def for_pad(d: Draw) -> Drawn:
    """An operand, a pad width before and after each axis, and the pad value."""
    x = d.array(REAL, d.shape())
    width = tuple((d.integer(0, 2), d.integer(0, 2)) for _ in range(x.ndim))
    return (x,), {"width": width, "value": d.choice([0.0, 1.5])}


def for_batch_norm(d: Draw, samples: int = 2) -> Drawn:
    """Inputs (N, C, ...) of at least so many samples, with a weight, a bias, or None for either."""
    shape = d.integer(samples, 9), *d.shape(min_dims=1, max_dims=3, min_side=1, max_side=3)
    x = d.distinct(shape) if d.choice([True, False]) else d.array(REAL, shape)
    weight, bias = (d.array(REAL, shape[1:2]) if d.choice([True, True, False]) else None for _ in range(2))
    return (x, weight, bias), {"eps": d.choice([0.3, 0.7])}


def for_batch_norm_gradient(d: Draw) -> Drawn:
    """A cotangent, an input and a weight, or None."""
    (x, weight, _), options = for_batch_norm(d)
    return (d.array(REAL, x.shape), x, weight), options


def for_batch_norm_weight_gradient(d: Draw) -> Drawn:
    """A cotangent and an input."""
    (g, x, _), options = for_batch_norm_gradient(d)
    return (g, x), options


def for_batch_norm_relu(d: Draw) -> Drawn:
    """Operands whose outputs keep a distance from the kink."""
    n, c, plane = d.integer(3, 9), d.integer(1, 3), d.choice([(), (2,), (1, 2)])
    x = np.stack([d.distinct((n, *plane)) * 10 for _ in range(c)], axis=1)
    channels, eps = x.swapaxes(0, 1).reshape(c, -1), d.choice([0.3, 0.7])
    xhat = (channels - channels.mean(1, keepdims=True)) / np.sqrt(channels.var(1, keepdims=True) + eps)
    between = np.sort(xhat)[:, :2].mean(1)  # the output is 0 half-way between two samples
    weight = np.where(np.arange(c) % 2, -1.5, 1.0)
    return (x, weight, -weight * between), {"eps": eps}


def for_batch_norm_inference(d: Draw) -> Drawn:
    """The same with a mean and a variance; all vectors positive, as the tests pass one of them for each."""
    (x, weight, bias), options = for_batch_norm(d, samples=1)
    mean, var = (d.array(POSITIVE, x.shape[1:2]) for _ in range(2))
    return (x, mean, var, *(None if v is None else np.abs(v) + 0.3 for v in (weight, bias))), options


def for_running_statistics(d: Draw) -> Drawn:
    """Running statistics, and those of a batch."""
    mean, var = (tuple(d.array(domain, (3,)) for _ in range(2)) for domain in (REAL, POSITIVE))
    tracked = d.integers(0, 9, ())
    return (mean[0], var[0], tracked, mean[1], var[1]), {
        "momentum": d.choice([0.1, 1.0]),
        "unbias": d.choice([1.0, 1.5]),
    }
