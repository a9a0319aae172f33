"""A device for tests of CUDA programs, without a GPU."""

import pytest

from tests.cuda.ptx.compile import require_compiler
from tests.cuda.ptx.programs import interpreted


@pytest.fixture(scope="module")
def device():
    """The interpreter as the device of this module's tests."""
    require_compiler()
    with interpreted() as device:
        yield device
