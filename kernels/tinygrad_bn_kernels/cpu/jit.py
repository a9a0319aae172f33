"""How loops are compiled: the options of all of them, and a cache on disk where there can be one."""

import hashlib
import os
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numba

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

F = TypeVar("F", bound=Callable[..., Any])

# reassoc lets sums use vector registers; nnan and ninf are left out, as they would break NaN and Inf.
SUMS = {"reassoc", "contract", "nsz", "arcp"}


@cache
def cache_folder() -> str:
    """Where compiled loops are kept: in NUMBA_CACHE_DIR, or the user's cache, under a name that their source gives.

    So a change of any of these files, or of Numba, starts an empty folder: Numba itself notices a change only in the
    file of the loop.
    """
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    version = hashlib.sha256(sources + numba.__version__.encode() + sys.version.encode()).hexdigest()[:16]
    home = Path.home() / (".cache" if os.name == "posix" else "AppData/Local")
    base = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or home
    return str(Path(base) / "tinygrad_bn" / version)


@cache
def _warn_once() -> None:
    warnings.warn(
        "kernels cannot be cached and are compiled in every process; set NUMBA_CACHE_DIR to a folder that can be "
        "written to",
        RuntimeWarning,
        stacklevel=4,
    )


def _save_one_at_a_time(dispatcher: Any) -> None:
    """Let one process at a time write to a loop's cache: two that save different dtypes would mix them up."""
    cache = getattr(dispatcher, "_cache", None)  # there is none with NUMBA_DISABLE_JIT
    if fcntl is None or cache is None:
        return
    save, path = cache._cache_file.save, os.path.join(cache.cache_path, ".lock")

    def locked(key: Any, data: Any) -> None:
        with open(path, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
            save(key, data)

    cache._cache_file.save = locked


def njit(**options: Any) -> Callable[[F], F]:
    """`numba.njit` with division by zero as in NumPy, without the GIL, and cached on disk in a folder of our own.

    Where no folder for the cache can be written to, the loops are compiled anew in every process, and a warning
    says so once.
    """
    options = {"error_model": "numpy", "nogil": True, **options}

    def compile_lazily(function: F) -> F:
        config: Any = numba.config
        before, config.CACHE_DIR = config.CACHE_DIR, cache_folder()  # read while the dispatcher is made
        try:
            compiled: F = numba.njit(cache=True, **options)(function)
            _save_one_at_a_time(compiled)
        except RuntimeError:  # Numba's "no locator available"
            _warn_once()
            compiled = numba.njit(**options)(function)
        finally:
            config.CACHE_DIR = before
        return compiled

    return compile_lazily
