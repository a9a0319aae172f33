"""How results of executed programs are compared, and the operands that tests draw for it."""

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cuda.ptx.programs import run

BLOCK = 256
SIZES = st.sampled_from([1, BLOCK - 1, BLOCK, BLOCK + 1, 4 * BLOCK, 8 * BLOCK + 3]) | st.integers(1, 3000)
SIDES = st.sampled_from([1, 7, 31, 32, 33, 63, 65]) | st.integers(1, 80)
KINDS = st.sampled_from(["plain", "offset", "special"])
SEEDS = st.integers(0, 2**32 - 1)
EPS = 2.0**-23


def given_few(*strategies: Any) -> Callable[[Any], Any]:
    """`given` with fewer examples, as each example is many launches."""
    return lambda test: settings(max_examples=max(8, settings().max_examples // 5))(given(*strategies)(test))


def close(found: Any, expected: Any, ulps: float = 8, scale: Any = 0.0) -> None:
    """Assert equality within `ulps` float32 units in the last place of the result, or of `scale` if that is larger."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    if found.dtype != np.float32:
        np.testing.assert_array_equal(found, expected)
        return
    with np.errstate(all="ignore"):
        rounded = expected.astype(np.float32)
        allowed = ulps * EPS * np.maximum(np.abs(expected), scale) + 2.0**-126
        near = np.isfinite(allowed) & (np.abs(found - expected) <= allowed)  # any number is within ∞ of ∞
        same = (found == rounded) | (np.isnan(found) & np.isnan(rounded)) | near
    if not same.all():
        at = tuple(int(i[0]) for i in np.nonzero(~same))
        raise AssertionError(f"{(~same).sum()} of {same.size} differ; at {at}: {found[at]} and not {expected[at]}")


def double(*arrays: np.ndarray) -> list[np.ndarray]:
    return [a.astype(np.float64) if a.dtype == np.float32 else a for a in arrays]


def same_bits(name: str, operands: list[Any], spelt_out: list[Any], **params: Any) -> Any:
    """The results of a kernel, which must not change if None is replaced by an array."""
    found, expected = (run(name, *xs, **params) for xs in (operands, spelt_out))
    for one, want in zip(*(r if isinstance(r, tuple) else (r,) for r in (found, expected)), strict=True):
        np.testing.assert_array_equal(one, want)
    return found


def same_gradients(name: str, g: Any, y: Any, operands: list[Any], spelt_out: list[Any], **params: Any) -> None:
    """The same of a vector-Jacobian product; the gradient of an operand that is None is None."""
    given = [x is not None for x in operands]
    found = same_bits(f"{name}.vjp", [g, y, *operands], [g, y, *spelt_out], needs=given, **params)
    assert [x is not None for x in found] == given
