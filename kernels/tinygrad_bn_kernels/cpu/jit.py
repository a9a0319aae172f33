"""How loops are compiled: the options of all of them, and a cache on disk where there can be one."""

import os
import warnings
from collections.abc import Callable
from functools import cache
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
def _warn_once(reason: str) -> None:
    warnings.warn(
        "kernels cannot be cached and are compiled in every process; set NUMBA_CACHE_DIR to a folder that can be "
        f"written to ({reason})",
        RuntimeWarning,
        stacklevel=4,
    )


def _save_one_at_a_time(dispatcher: Any) -> None:
    """Let one process at a time write to a loop's cache: two that save different dtypes would mix them up."""
    if fcntl is None:
        return
    cache = dispatcher._cache
    save, path = cache._cache_file.save, os.path.join(cache.cache_path, ".lock")

    def locked(key: Any, data: Any) -> None:
        with open(path, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
            save(key, data)

    cache._cache_file.save = locked


def njit(**options: Any) -> Callable[[F], F]:
    """`numba.njit` with division by zero as in NumPy, without the GIL, and cached on disk.

    Where no folder for the cache can be written to, the loops are compiled anew in every process, and a warning
    says so once.
    """
    options = {"error_model": "numpy", "nogil": True, **options}

    def compile_lazily(function: F) -> F:
        try:
            compiled: F = numba.njit(cache=True, **options)(function)
            _save_one_at_a_time(compiled)
        except RuntimeError as error:  # Numba's "no locator available"
            _warn_once(str(error).split(":")[0])
            compiled = numba.njit(**options)(function)
        return compiled

    return compile_lazily
