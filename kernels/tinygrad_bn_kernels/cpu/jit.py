"""`njit` with the options of all loops, and a cache of compiled loops on disk."""

import gc
import hashlib
import logging
import os
import pickle
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba.core.compiler_lock import global_compiler_lock

from tinygrad_bn_kernels import HELD_AT_FORKS

try:
    from numba.core.caching import IndexDataCacheFile
except ImportError:  # another version of Numba, which then keeps its own cache
    IndexDataCacheFile = object  # type: ignore[assignment, misc]

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

F = TypeVar("F", bound=Callable[..., Any])

# reassoc lets LLVM vectorise sums; nnan and ninf are left out, as they would break NaN and Inf.
SUMS = {"reassoc", "contract", "nsz", "arcp"}

HELD_AT_FORKS.append(global_compiler_lock)


def _bases() -> Iterator[Path]:
    """Candidate folders for the cache, best first: NUMBA_CACHE_DIR or the user's cache, then beside the source."""
    given = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME")
    if given:
        yield Path(given)
    else:
        with suppress(RuntimeError):  # the user has no home
            yield Path.home() / (".cache" if os.name == "posix" else "AppData/Local")
    yield Path(__file__).parent / "__pycache__"


@cache
def cache_folder() -> str:
    """The folder of compiled loops, named by a hash of all sources here, of Numba's version and of its options.

    So a change in any of them starts an empty folder; Numba itself only notices changes in the file of the loop.
    Raises RuntimeError if no folder is writable.
    """
    config: Any = numba.config
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    made_by = numba.__version__, sys.version, bool(config.BOUNDSCHECK), config.OPT
    version = hashlib.sha256(sources + repr(made_by).encode()).hexdigest()[:16]
    for base in _bases():
        folder = base / "tinygrad_bn" / version
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            return str(folder)
    raise RuntimeError("no folder for compiled loops is writable")


@cache
def _warn_once() -> None:
    # Logged: a warning that a program turns into an error would break an import, on some machines only.
    logging.getLogger(__name__).warning(
        "kernels cannot be cached and are compiled in every process; set NUMBA_CACHE_DIR to a writable folder"
    )


class _Files(IndexDataCacheFile):
    """Numba's files of one loop, each behind a checksum: machine code with a flipped bit would end the process.

    A damaged file counts as missing, so the loop is compiled and written again.
    """

    # Methods of Numba's that are replaced or called here. A version without one of them keeps its own files.
    NEEDS = "_load_index", "_save_index", "_load_data", "_save_data", "_data_path", "_dump", "_open_for_write"

    @classmethod
    def of(cls, cache: Any) -> "_Files | None":
        """The files of a loop's cache; None if this version of Numba has others."""
        try:
            names = cache._impl
            files = cls(cache.cache_path, names.filename_base, names.locator.get_source_stamp())
            known = cache._cache_file, cache.save_overload, files._index_path, files._source_stamp
        except (AttributeError, TypeError):
            return None
        return files if known and all(hasattr(IndexDataCacheFile, name) for name in cls.NEEDS) else None

    def _load_index(self) -> dict[Any, str]:
        try:
            stamp, names = self._read(self._index_path)
        except OSError:
            return {}
        return names if stamp == self._source_stamp else {}

    def _save_index(self, names: dict[Any, str]) -> None:
        self._write(self._index_path, (self._source_stamp, names))

    def _load_data(self, name: str) -> Any:
        return self._read(self._data_path(name))  # after an OSError Numba compiles

    def _save_data(self, name: str, data: Any) -> None:
        self._write(self._data_path(name), data)

    def _read(self, path: str) -> Any:
        content = Path(path).read_bytes()
        if content[:32] != _checksum(path, content[32:]):
            raise OSError(f"{path} is damaged")
        return pickle.loads(content[32:])

    def _write(self, path: str, data: Any) -> None:
        content = self._dump(data)
        with self._open_for_write(path) as file:
            file.write(_checksum(path, content) + content)


def _checksum(path: str, content: bytes) -> bytes:
    """Of the contents and the name: a file in the place of another is as wrong."""
    return hashlib.sha256(os.path.basename(path).encode() + b"\0" + content).digest()


def _save_safely(dispatcher: Any) -> None:
    """Lock a loop's cache while writing: two processes that save different dtypes would corrupt it.

    If writing fails (full disk, no locks) the loop is only compiled.
    """
    cache = getattr(dispatcher, "_cache", None)  # None with NUMBA_DISABLE_JIT
    files = None if cache is None else _Files.of(cache)
    if cache is None or files is None:
        return
    save, cache._cache_file = cache.save_overload, files

    def save_alone(signature: Any, data: Any) -> None:
        try:
            os.makedirs(cache.cache_path, exist_ok=True)
            with open(os.path.join(cache.cache_path, ".lock"), "w") as lock:
                if fcntl is not None:
                    fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
                save(signature, data)
        except OSError:
            _warn_once()

    cache.save_overload = save_alone


def _without_collector(compile_loop: Callable[..., Any]) -> Callable[..., Any]:
    """Pause the collector of cyclic garbage while a loop compiles: it would look at all objects many times."""

    def compile_alone(*args: Any) -> Any:
        with global_compiler_lock:  # one thread at a time, as the collector is global
            enabled = gc.isenabled()
            gc.disable()
            try:
                return compile_loop(*args)
            finally:
                if enabled:
                    gc.enable()

    return compile_alone


def njit(allocates: bool = True, **options: Any) -> Callable[[F], F]:
    """`numba.njit` with NumPy's division by zero, without the GIL, cached in `cache_folder()`.

    A loop that creates no arrays says `allocates=False`: it is compiled without reference counts, in less time.
    If no folder is writable, every process compiles the loops and logs that once, as a warning.
    """
    options = {"error_model": "numpy", "nogil": True, "no_cfunc_wrapper": True, "_nrt": allocates, **options}

    def compile_lazily(function: F) -> F:
        config: Any = numba.config
        with global_compiler_lock:  # one thread at a time, as the folder is a global setting of Numba's
            before = config.CACHE_DIR
            try:
                config.CACHE_DIR = cache_folder()  # numba.njit reads it
                compiled: F = numba.njit(cache=True, **options)(function)
                _save_safely(compiled)
            except RuntimeError:  # no writable folder, or no source file for Numba's cache
                _warn_once()
                compiled = numba.njit(**options)(function)
            finally:
                config.CACHE_DIR = before
        dispatcher: Any = compiled
        if dispatcher is not function:  # with NUMBA_DISABLE_JIT it is
            dispatcher.compile = _without_collector(dispatcher.compile)
        return compiled

    return compile_lazily


def helper(**options: Any) -> Callable[[F], F]:
    """`njit` for a function that only compiled loops call, without arrays of its own: it compiles in half the time.

    A call from Python raises TypeError.
    """

    def compile_lazily(function: F) -> F:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise TypeError(f"{function.__name__} is a helper of compiled loops; it cannot be called from Python")

        compiled: Any = njit(allocates=False, no_cpython_wrapper=True, **options)(function)
        if compiled is not function:  # with NUMBA_DISABLE_JIT it is
            compiled._compile_for_args = refuse
            compiled._insert = lambda *ignored: None  # else Python would call what is not there
        return cast(F, compiled)

    return compile_lazily


def inlined(**options: Any) -> Callable[[F], F]:
    """A `helper` that rounds as `fastmath` allows: every loop that calls it is compiled with its code inside.

    Otherwise each of these loops holds a copy of the helper. A process calls the copy that it loads first, and copies
    may differ in the last bit; so results would depend on the cache and on the order of calls.
    """
    return helper(forceinline=True, **options)
