"""Python threads and processes at once: exact gradients, the same bits, and a cache of compiled loops that stays whole.

See also `test_threads_share_a_model.py`, and in tests/kernels `test_threads.py` and `test_forks_during_imports.py`.
"""

import multiprocessing
import signal

import numpy as np
import pytest

from tests.tools.networks import Training
from tests.tools.processes import on_threads, output, python
from tinygrad_bn import functional as F
from tinygrad_bn import nn

pytestmark = [pytest.mark.compiled, pytest.mark.slow]
THREADS = 4
DIGEST = "from tests.tools.digests import digest; print(digest('titanic_mlp'))"


def test_threads_add_up_the_gradients_of_a_network_that_they_share():
    """The numbers are small integers, so that sums are exact in any order."""
    rng = np.random.default_rng(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    for p in model.parameters():
        p.data = rng.integers(-2, 3, p.shape).astype(np.float32)
    batches = [rng.integers(-2, 3, (8, 6)).astype(np.float32) for _ in range(THREADS)]

    def work(i):
        for _ in range(50):
            F.sum(model(batches[i])).backward()

    for i in range(THREADS):
        work(i)
    want = [p.grad.numpy().copy() for p in model.parameters()]
    model.zero_grad()
    on_threads(work, THREADS)
    for p, g in zip(model.parameters(), want, strict=True):
        np.testing.assert_array_equal(p.grad.numpy(), g)
    assert any(g.any() for g in want)


def test_a_captured_step_goes_on_in_another_thread():
    here, moved = (Training("titanic_mlp", captured=True) for _ in range(2))
    for n in range(60):
        here.step(n)
    for n in range(30):
        moved.step(n)
    on_threads(lambda _: [moved.step(n) for n in range(30, 60)], 1)
    assert len(moved.update.programs) == Training.PERIOD
    states = [{k: a.tobytes() for k, a in t.model.state_dict().items()} for t in (here, moved)]
    assert states[0] == states[1]


FIRST_USE = """
from tests.tools.networks import NETWORKS, Training
from tests.tools.processes import on_threads
names = ["titanic_mlp", "iris_mlp", "titanic_mlp"]
def trained(each):
    for n in range(2):
        each.step(n)
    return {k: a.tobytes() for k, a in each.model.state_dict().items()}
def networks():
    return [Training(name, captured=False) for name in names]
together, ends = networks(), {}
on_threads(lambda i: ends.update({i: trained(together[i])}), len(names))
assert [ends[i] for i in range(len(names))] == [trained(each) for each in networks()]
"""


def test_threads_that_compile_the_loops_of_their_own_networks(tmp_path):
    """In an empty cache: each thread compiles some loops for the first time while the others train."""
    output(python(FIRST_USE, NUMBA_CACHE_DIR=tmp_path, TINYGRAD_BN_NUM_THREADS=2))


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_children_train_to_the_same_bits(method):
    program = f"""
import multiprocessing
from tests.tools.digests import digest
want = digest("titanic_mlp")
with multiprocessing.get_context({method!r}).Pool(2) as pool:
    ends = pool.map(digest, ["titanic_mlp"] * 2)
assert ends == [want] * 2
"""
    output(python(program, TINYGRAD_BN_PARALLEL_FROM=1, TINYGRAD_BN_NUM_THREADS=2))


def test_processes_that_start_with_an_empty_cache_train_to_the_same_bits(tmp_path):
    """They compile and write at the same time. The third finds all that it needs, and changes no file."""
    settings = {"NUMBA_CACHE_DIR": tmp_path, "TINYGRAD_BN_NUM_THREADS": 2}
    first, second = (python(DIGEST, **settings) for _ in range(2))
    want = output(python(DIGEST, TINYGRAD_BN_NUM_THREADS=2))
    assert output(first) == output(second) == want
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb?")}
    assert files
    assert output(python(DIGEST, **settings)) == want
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb?")}


KILLED = """
import os, signal
from contextlib import contextmanager
from tinygrad_bn_kernels.cpu import jit
class Torn:
    def __init__(self, file):
        self.file = file
    def write(self, content):
        self.file.write(content[: len(content) // 2])
        self.file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
open_for_write, written = jit._Files._open_for_write, 0
@contextmanager
def torn(files, path):
    global written
    with open_for_write(files, path) as file:
        written += 1
        yield Torn(file) if written == NUMBER else file
jit._Files._open_for_write = torn
"""


FEW_LOOPS = """
import numpy as np
from tinygrad_bn import ops
print(ops.sum(np.random.default_rng(0).normal(size=(60, 100)).astype("f4"), axis=0).tobytes().hex())
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="processes are killed on POSIX systems")
@pytest.mark.parametrize("number", [1, 2])  # index or machine code
def test_a_process_killed_while_it_writes_leaves_a_cache_that_works(number, tmp_path):
    killed = python(KILLED.replace("NUMBER", str(number)) + FEW_LOOPS, NUMBA_CACHE_DIR=tmp_path)
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    want = output(python(FEW_LOOPS))
    assert [output(python(FEW_LOOPS, NUMBA_CACHE_DIR=tmp_path)) for _ in range(2)] == [want] * 2
