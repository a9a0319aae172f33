"""Every test of kernels leaves the number of threads as it was."""

import pytest
from tinygrad_bn_kernels.cpu import threads


@pytest.fixture(autouse=True)
def restored_num_threads():
    before = threads.num_threads()
    yield
    threads.set_num_threads(before)
