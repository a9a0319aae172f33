"""The node tests of the package `onnx`, at their own tolerances."""

import pytest

from tests.peers.onnx_nodes import DIFFERENT, cases, compare, refusal

COMPUTED = [name for name in cases() if name not in DIFFERENT and not refusal(name)]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, where a case is about overflow or NaN
@pytest.mark.parametrize("name", COMPUTED)
def test_a_node(name):
    compare(name)


def test_how_many():
    assert len(COMPUTED) == 1098
    assert not any(map(refusal, DIFFERENT))


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_still_does(name):
    with pytest.raises(AssertionError):
        compare(name)
