"""The processes of the speed table."""

import sys

import pytest

from tests.tools.processes import output, python


@pytest.mark.skipif(sys.platform != "linux", reason="a service of Linux")
def test_a_stopped_contender_ends_with_the_bench():
    program = """
import os
from tests.benchmarks.turns import Contender
os.dup2(1, 2)  # the contender writes its errors to this pipe too: the reader waits until both have ended
Contender("NumPy")
os._exit(0)"""
    assert output(python(program)) == ""
