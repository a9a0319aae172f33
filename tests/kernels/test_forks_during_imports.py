"""A fork waits while another thread imports kernels: the child would inherit the locks of half-imported modules."""

import os

import pytest

from tests.tools.processes import output, python

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks are POSIX's")

FIRST_USED = ["reduce", "reduce_loops", "simd", "thread_pool"]

SETTINGS = {"TINYGRAD_BN_PARALLEL_FROM": 1, "TINYGRAD_BN_NUM_THREADS": 2}

SETUP = """
import os, signal, sys, threading, time
import numpy as np
from tinygrad_bn import functional as F

x = np.ones((300, 300), "f4")

def work():
    assert (F.sum(x, axis=1) == 300).all()

def fork():
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)  # ends a child that hangs
        work()
        os._exit(0)
    return child

def expect_success(children):
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert set(statuses) == {0}, statuses
"""

HELD_UP = """
imports = threading.Event()

class Finder:
    def find_spec(name, path=None, target=None):
        if name == "MODULE":
            imports.set()
            time.sleep(0.3)

sys.meta_path.insert(0, Finder)
thread = threading.Thread(target=work)
thread.start()
assert imports.wait(60)
expect_success([fork()])
thread.join()
"""


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """The loops are in the cache, so that the programs take the time of imports."""
    output(python(SETUP + "work()", **SETTINGS))


@pytest.mark.parametrize("module", ["numba", *(f"tinygrad_bn_kernels.cpu.{m}" for m in FIRST_USED)])
def test_a_fork_while_a_module_is_being_imported(module):
    program = (SETUP + HELD_UP).replace("MODULE", module).replace("SECONDS", "60")
    output(python(program, **SETTINGS))


MANY = """
thread = threading.Thread(target=work)
thread.start()
children = []
for _ in range(6):
    time.sleep(0.02)
    children.append(fork())
thread.join()
expect_success(children)
"""


def test_many_forks_during_the_first_op():
    output(python((SETUP + MANY).replace("SECONDS", "60"), **SETTINGS))
