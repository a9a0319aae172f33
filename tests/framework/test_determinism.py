"""One seed gives the same bits: for any number of threads, in any process, captured or not, beside a busy thread."""

import pytest

from tests.tools.networks import NETWORKS
from tests.tools.processes import output, python

pytestmark = [pytest.mark.compiled, pytest.mark.slow]

PROGRAM = "from tests.tools.digests import main; main({captured}, {beside})"
# Numba's threads and those of the kernels, the seed of Python's hashes, with `capture`, and beside another thread.
PROCESSES = [(1, "0", False, False), (2, "7", True, True), (4, "random", False, True), (3, "random", True, False)]


def test_the_networks_of_the_articles_end_with_the_same_bits():
    """BLAS has one thread: the bits of its products depend on their number."""
    ends = []
    for threads, hashes, captured, beside in PROCESSES:
        settings = {"NUMBA_NUM_THREADS": threads, "TINYGRAD_BN_NUM_THREADS": threads, "PYTHONHASHSEED": hashes}
        program = PROGRAM.format(captured=captured, beside=beside)
        ends.append(output(python(program, TINYGRAD_BN_PARALLEL_FROM=1, OPENBLAS_NUM_THREADS=1, **settings)))
    assert [line.split()[0] for line in ends[0].splitlines()] == list(NETWORKS)
    assert ends == [ends[0]] * len(ends)
