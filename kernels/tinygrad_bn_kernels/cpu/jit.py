"""How loops are compiled: the options of all of them, and a cache on disk where there can be one."""

import hashlib
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numba
from numba.core.compiler_lock import global_compiler_lock

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

F = TypeVar("F", bound=Callable[..., Any])

# reassoc lets sums use vector registers; nnan and ninf are left out, as they would break NaN and Inf.
SUMS = {"reassoc", "contract", "nsz", "arcp"}

if hasattr(os, "register_at_fork"):
    # A fork waits for a thread that compiles: the child would inherit its lock, and nobody to release it.
    release = global_compiler_lock.release
    os.register_at_fork(before=global_compiler_lock.acquire, after_in_parent=release, after_in_child=release)


def _bases() -> Iterator[Path]:
    """Where a cache may be, best first: in NUMBA_CACHE_DIR, or the user's cache; beside the source."""
    given = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME")
    if given:
        yield Path(given)
    else:
        with suppress(RuntimeError):  # a user who has no home
            yield Path.home() / (".cache" if os.name == "posix" else "AppData/Local")
    yield Path(__file__).parent / "__pycache__"


@cache
def cache_folder() -> str:
    """Where compiled loops are kept, under a name that their source gives, and what changes the code made of it.

    So a change of any of these files, of Numba or of its options starts an empty folder: Numba itself notices a change
    only in the file of the loop. Raises RuntimeError where nothing can be written.
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
    raise RuntimeError("no folder for compiled loops can be written to")


@cache
def _warn_once() -> None:
    warnings.warn(
        "kernels cannot be cached and are compiled in every process; set NUMBA_CACHE_DIR to a folder that can be "
        "written to",
        RuntimeWarning,
        stacklevel=4,
    )


def _save_safely(dispatcher: Any) -> None:
    """Let one process at a time write to a loop's cache: two that save different dtypes would mix them up.

    What cannot be written, to a full disk or for want of locks, is compiled all the same; so is what cannot be read,
    as its file is damaged, and is written anew.
    """
    cache = getattr(dispatcher, "_cache", None)  # there is none with NUMBA_DISABLE_JIT
    if cache is None:
        return
    load, save = cache.load_overload, cache.save_overload

    def load_if_whole(signature: Any, context: Any) -> Any:
        try:
            return load(signature, context)
        except Exception:  # unpickling what is damaged may raise anything
            with suppress(OSError):
                cache.flush()
            return None

    def save_alone(signature: Any, data: Any) -> None:
        try:
            os.makedirs(cache.cache_path, exist_ok=True)
            with open(os.path.join(cache.cache_path, ".lock"), "w") as lock:
                if fcntl is not None:
                    fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
                save(signature, data)
        except OSError:
            _warn_once()

    cache.load_overload, cache.save_overload = load_if_whole, save_alone


def njit(**options: Any) -> Callable[[F], F]:
    """`numba.njit` with division by zero as in NumPy, without the GIL, and cached on disk in a folder of our own.

    Where no folder for the cache can be written to, the loops are compiled anew in every process, and a warning
    says so once.
    """
    options = {"error_model": "numpy", "nogil": True, "no_cfunc_wrapper": True, **options}

    def compile_lazily(function: F) -> F:
        config: Any = numba.config
        before = config.CACHE_DIR
        try:
            config.CACHE_DIR = cache_folder()  # read while the dispatcher is made
            compiled: F = numba.njit(cache=True, **options)(function)
            _save_safely(compiled)
        except RuntimeError:  # nowhere to write, or no source file that a cache could go by
            _warn_once()
            compiled = numba.njit(**options)(function)
        finally:
            config.CACHE_DIR = before
        return compiled

    return compile_lazily
