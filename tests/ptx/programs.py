"""The programs for cuda that the project ships, compiled."""

import re
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from tests.ptx.compile import offline


@cache
def programs() -> dict[str, Any]:
    """Every declared program, by name."""
    from tinygrad_bn_kernels import cuda

    for module in iter_modules(cuda.__path__, "tinygrad_bn_kernels.cuda."):
        import_module(module.name)
    return dict(cuda.launch.PROGRAMS)


@cache
def ptx_for(program: Any, cc: tuple[int, int]) -> str:
    """A program's PTX for its first signature: for sm_80 and sm_90 it is that for sm_75, but for the target's name."""
    generation = (7, 5) if cc < (10, 0) else (10, 0)
    with offline(generation):
        ptx = program.ptx(program.signatures[0], generation)
    return re.sub(r"\.target sm_\d+", f".target sm_{cc[0]}{cc[1]}", ptx)
