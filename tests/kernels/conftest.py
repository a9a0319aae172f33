"""Threads in the tests of kernels."""

import pytest
from tinygrad_bn_kernels.cpu import threads


@pytest.fixture(autouse=True)
def restored_num_threads():
    """A test leaves the number of threads as it was."""
    before = threads.num_threads()
    yield
    threads.set_num_threads(before)


@pytest.fixture(params=["serial", "parallel"])
def driver(request, monkeypatch):
    """Small work runs serially, and split over threads."""
    monkeypatch.setattr(threads, "PARALLEL_FROM", 1 << 60 if request.param == "serial" else 1)
