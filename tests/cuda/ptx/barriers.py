"""Removing barriers from PTX, to test that a kernel needs each of them."""

import re

BARRIER = re.compile(r"^[ \t]*(?:@!?%?\w+\s+)?(?:bar|barrier)\.[\w.]+[^;\n]*;|\bbar(?:rier)?\.[\w.]+\s[^;{}\n]*;", re.M)


def barriers(ptx: str) -> list[str]:
    """The barriers of blocks and warps in a module, in order."""
    return [m[0].strip() for m in BARRIER.finditer(ptx)]


def without_barrier(ptx: str, k: int) -> str:
    """The module without its k-th barrier."""
    found = list(BARRIER.finditer(ptx))[k]
    return ptx[: found.start()] + ptx[found.end() :]
