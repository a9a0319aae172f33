"""Loops are compiled once, into a cache that processes share; without a cache they still work."""

import errno
import re
import sys
from pathlib import Path

import numba
import pytest
from numba.core.dispatcher import Dispatcher
from tinygrad_bn_kernels import MODULES, lookup
from tinygrad_bn_kernels.cpu import jit

from tests.tools.processes import output, python

pytestmark = pytest.mark.compiled
resource = pytest.importorskip("resource", reason="a limit for files is POSIX's")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """An empty cache, and no warning given yet."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    jit.cache_folder.cache_clear()
    jit._warn_once.cache_clear()
    yield tmp_path
    jit.cache_folder.cache_clear()


def compile_two():
    """Compile and run two loops."""

    def double(x):
        return 2 * x

    def triple(x):
        return 3 * x

    assert [jit.njit()(f)(14) for f in (double, triple)] == [28, 42]


def expect_one_warning(caplog):
    compile_two()
    (message,) = caplog.messages
    assert re.search(r"cannot be cached .* NUMBA_CACHE_DIR", message)


def test_the_cache_is_a_folder_of_our_own(cache):
    compile_two()
    folder = Path(jit.cache_folder())
    assert folder.parent == cache / "tinygrad_bn"
    assert len(list(folder.rglob("*.nbi"))) == 2


@pytest.mark.parametrize(("option", "value"), [("BOUNDSCHECK", 1), ("OPT", 0)])
def test_each_set_of_compiler_options_has_its_own_folder(option, value, monkeypatch):
    plain = jit.cache_folder()
    jit.cache_folder.cache_clear()
    monkeypatch.setattr(numba.config, option, value)
    assert jit.cache_folder() != plain


def test_a_user_without_a_home_has_a_cache(cache, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert jit.cache_folder().startswith(str(cache))
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert list(jit._bases()) == [Path(jit.__file__).parent / "__pycache__"]


def test_a_cache_beside_the_source_depends_on_the_version_too(cache, monkeypatch):
    version = Path(jit.cache_folder()).name
    (cache / "file").touch()
    monkeypatch.setattr(jit, "_bases", lambda: [cache / "file" / "no folder", cache / "second"])
    jit.cache_folder.cache_clear()
    assert jit.cache_folder() == str(cache / "second" / "tinygrad_bn" / version)


def test_without_a_folder_that_can_be_written_to_loops_are_compiled_anew(cache, monkeypatch, caplog):
    (cache / "file").touch()
    monkeypatch.setattr(jit, "_bases", lambda: [cache / "file" / "no folder"])
    expect_one_warning(caplog)


def test_without_a_source_file_loops_are_compiled_anew(monkeypatch, caplog):
    from numba.core.caching import CacheImpl

    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    expect_one_warning(caplog)


def test_a_file_system_without_locks(monkeypatch, caplog):
    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(jit.fcntl, "flock", no_locks)
    expect_one_warning(caplog)


def test_a_full_disk(caplog):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        expect_one_warning(caplog)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("lacking", ["a method", "the cache's parts"])
def test_a_numba_with_other_files_keeps_its_own_cache(cache, lacking, monkeypatch, caplog):
    if lacking == "a method":
        monkeypatch.setattr(jit._Files, "NEEDS", ("_method_of_an_older_version",))
    else:
        monkeypatch.setattr(jit._Files, "__init__", lambda self, path: None)
    for _ in range(2):
        compile_two()
    written = [path.read_bytes() for path in cache.rglob("*.nb?")]
    assert len(written) >= 4
    assert not caplog.messages
    with pytest.raises(OSError, match="is damaged"):  # they are Numba's, without a checksum
        jit._Files._read(None, str(next(cache.rglob("*.nbi"))))


@pytest.mark.parametrize("kind", ["*.nbi", "*.nbc"])
@pytest.mark.parametrize("length", [0, 40])
def test_a_damaged_file_is_compiled_anew(cache, kind, length):
    compile_two()
    damaged = list(cache.rglob(kind))
    assert len(damaged) == 2
    for path in damaged:
        path.write_bytes(path.read_bytes()[:length])
    compile_two()
    whole = {path: path.read_bytes() for path in damaged}
    assert min(map(len, whole.values())) > 40
    compile_two()
    assert whole == {path: path.read_bytes() for path in damaged}


@pytest.mark.parametrize("kind", ["*.nbi", "*.nbc"])
def test_one_flipped_bit_is_found_wherever_it_is(cache, kind):
    compile_two()
    for path in cache.rglob(kind):
        whole = path.read_bytes()
        for at in {*range(0, len(whole), max(len(whole) // 40, 1)), len(whole) - 1}:
            damaged = bytearray(whole)
            damaged[at] ^= 1 << at % 8
            path.write_bytes(damaged)
            with pytest.raises(OSError, match="is damaged"):
                jit._Files._read(None, str(path))
        path.write_bytes(whole)
        jit._Files._read(None, str(path))


def test_a_file_in_the_place_of_another_is_found(cache):
    compile_two()
    first, second = cache.rglob("*.nbc")
    first.write_bytes(second.read_bytes())
    with pytest.raises(OSError, match="is damaged"):
        jit._Files._read(None, str(first))
    compile_two()


@pytest.mark.parametrize("kind", ["*.nbi", "*.nbc"])
@pytest.mark.parametrize("part", [0.02, 0.3, 0.6, 0.95])
def test_a_process_compiles_damaged_files_again(cache, kind, part):
    compiled = output(python(COMPILING, NUMBA_CACHE_DIR=str(cache)))
    whole = {path: path.read_bytes() for path in cache.rglob(kind)}
    for path, content in whole.items():
        at = int(part * len(content))
        path.write_bytes(content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :])
    assert output(python(COMPILING, NUMBA_CACHE_DIR=str(cache))) == compiled
    assert output(python(COMPILING, NUMBA_CACHE_DIR=str(cache))) == "0"


COMPILING = """
import sys, numpy as np
from numba.core import event
from tinygrad_bn import Tensor, ops, functional as F
compiled = 0

class Count(event.Listener):
    def on_start(self, event):
        global compiled
        compiled += 1
    def on_end(self, event):
        pass

event.register("numba:compile", Count())
x = np.arange(6000, dtype="f4").reshape(60, 100)
np.testing.assert_array_equal(ops.sum(x, axis=0), x.sum(axis=0))
np.testing.assert_allclose(F.var(x, axis=1), x.var(axis=1), rtol=1e-6)
print(compiled)
"""


def test_processes_share_one_cache_of_compiled_loops_even_if_they_start_together(cache):
    first, second = (python(COMPILING, NUMBA_CACHE_DIR=str(cache)) for _ in range(2))
    assert int(output(first)) > 0
    assert int(output(second)) > 0
    files = sorted(cache.rglob("*.nb?"))
    assert files
    assert output(python(COMPILING, NUMBA_CACHE_DIR=str(cache))) == "0"
    assert sorted(cache.rglob("*.nb?")) == files


DIGESTS = """
import hashlib, numpy as np
from tinygrad_bn_kernels.cpu import blocks, norm
x, g = np.random.default_rng(0).normal(1, 2, (2, 19, 3, 814))
def digest(*arrays):
    return hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()
def batch():
    y, mean, var = norm.batch_norm_training(x, None, None, eps=1e-5)
    return digest(y, mean, var)
def gradient():
    needs, (y, mean, var) = [True, False, False], norm.batch_norm_training(x, None, None, eps=1e-5)
    return digest(norm.batch_norm_training_vjp(g, y, x, None, None, needs=needs, eps=1e-5, mean=mean, var=var)[0])
def instance():
    return digest(*blocks.block_norm(x, None, None, blocks=(19, 3, 1, 814), eps=1e-5, centered=True))
print(*{order})
"""


def test_bits_depend_neither_on_the_cache_nor_on_the_loop_that_is_loaded_first():
    orders = "(batch(), gradient(), instance())", "[instance(), gradient(), batch()][::-1]"
    written = [output(python(DIGESTS.replace("{order}", order))) for order in (*orders, *orders)]  # compiled, loaded
    assert len(set(written)) == 1


def test_a_helper_called_from_python_is_an_error():
    """It has no entry for Python: the call would end the process."""

    @jit.helper()
    def double(x):
        return 2 * x

    @jit.njit()
    def loop(x):
        return double(x) + 1

    for compile_first in (False, True):
        assert not compile_first or loop(3) == 7
        with pytest.raises(TypeError, match="double is a helper of compiled loops"):
            double(3)


def test_helpers_that_round_are_inlined():
    """Each loop that calls a helper out of line holds a copy of it, and copies may round differently."""
    for name, device in MODULES:
        assert lookup(name, device)
    modules = [m for name, m in sys.modules.items() if name.startswith("tinygrad_bn_kernels.cpu.")]
    loops = {f.py_func: f for m in modules for f in vars(m).values() if isinstance(f, Dispatcher)}
    called = {
        f.py_func.__globals__[name]
        for f in loops.values()
        for name in f.py_func.__code__.co_names
        if f.py_func.__globals__.get(name) in loops.values()
    }
    rounding = {f.__name__: f.targetoptions for f in called if f.targetoptions.get("fastmath")}
    assert len(rounding) > 10
    inlined = {n for n, options in rounding.items() if options.get("forceinline") or options.get("inline") == "always"}
    assert sorted(rounding.keys() - inlined) == []
