"""What the tests feed an op: data, not tests.

An op's `sample` is a function of a `Draw` to `(operands, params)`. The suite hands it a `Draw` that asks
Hypothesis, `testing.check_op` one that asks a seeded generator; the op need not know which.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

from numpy.typing import NDArray

T = TypeVar("T")
Array: TypeAlias = NDArray[Any]
Shape: TypeAlias = tuple[int, ...]


class Domain(NamedTuple):
    """Where operands are drawn from: [low, high], no closer than `gap` to 0."""

    low: float
    high: float
    gap: float = 0.0


REAL = Domain(-3.0, 3.0)
POSITIVE = Domain(0.3, 3.0)
NONZERO = Domain(-3.0, 3.0, gap=0.2)  # away from a pole or a kink at 0


class Draw(Protocol):
    """The source of a sample. Arrays are float64; the harness casts them to the dtypes that it tests."""

    def shape(self, min_dims: int = 0, max_dims: int = 3, min_side: int = 0, max_side: int = 4) -> Shape: ...
    def broadcastable(self, count: int) -> Sequence[Shape]:
        """Shapes that broadcast with each other."""

    def array(self, domain: Domain, shape: Shape) -> Array: ...
    def distinct(self, shape: Shape) -> Array:
        """Values that differ by at least 0.2, in random order: no ties for max, argmax and their like."""

    def integer(self, low: int, high: int) -> int: ...
    def integers(self, low: int, high: int, shape: Shape) -> Array:
        """int64 indices in [low, high]."""

    def choice(self, options: Sequence[T]) -> T: ...


Sample: TypeAlias = Callable[[Draw], tuple[tuple[Array, ...], dict[str, Any]]]


def elementwise(*domains: Domain, **params: Any) -> Sample:
    """Operands of one shape, one for each domain; and fixed params."""

    def sample(d: Draw) -> tuple[tuple[Array, ...], dict[str, Any]]:
        shape = d.shape()
        return tuple(d.array(domain, shape) for domain in domains), params

    return sample


def broadcasting(*domains: Domain) -> Sample:
    """Operands whose shapes broadcast with each other, one for each domain."""

    def sample(d: Draw) -> tuple[tuple[Array, ...], dict[str, Any]]:
        shapes = d.broadcastable(len(domains))
        return tuple(d.array(domain, shape) for domain, shape in zip(domains, shapes, strict=True)), {}

    return sample


def reducing(*, distinct: bool = False, tuples: bool = True) -> Sample:
    """One operand and the `axis` and `keepdims` of a reduction.

    `distinct` values have no ties, and are not empty; `tuples` of axes are drawn too.
    """

    def sample(d: Draw) -> tuple[tuple[Array, ...], dict[str, Any]]:
        shape = d.shape(min_side=1 if distinct else 0)
        axes = [None, *range(-len(shape), len(shape))]
        if tuples and len(shape) > 1:
            axes.append((0, len(shape) - 1))
        params = {"axis": d.choice(axes), "keepdims": d.choice([False, True])}
        return (d.distinct(shape) if distinct else d.array(REAL, shape),), params

    return sample
