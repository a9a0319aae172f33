"""How loops are compiled: the options of all of them, and a cache on disk where there can be one."""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import numba

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


def njit(**options: Any) -> Callable[[F], F]:
    """`numba.njit` with division by zero as in NumPy, without the GIL, and cached on disk.

    Where no folder for the cache can be written to, the loops are compiled anew in every process, and a warning
    says so once.
    """
    options = {"error_model": "numpy", "nogil": True, **options}

    def compile_lazily(function: F) -> F:
        try:
            compiled: F = numba.njit(cache=True, **options)(function)
        except RuntimeError as error:  # Numba's "no locator available"
            _warn_once(str(error).split(":")[0])
            compiled = numba.njit(**options)(function)
        return compiled

    return compile_lazily
