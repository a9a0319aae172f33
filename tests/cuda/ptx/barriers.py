"""Removing barriers from PTX, to show that a kernel cannot do without any of its own."""

import re

BARRIER = re.compile(r"^[ \t]*(?:@!?%?\w+\s+)?(?:bar|barrier)\.[\w.]+[^;\n]*;|\bbar(?:rier)?\.[\w.]+\s[^;{}\n]*;", re.M)


def barriers(ptx: str) -> list[str]:
    """The barriers of a block or a warp in a module, in order."""
    return [m[0].strip() for m in BARRIER.finditer(ptx)]


def without_barrier(ptx: str, k: int) -> str:
    """The module without its k-th barrier."""
    found = list(BARRIER.finditer(ptx))[k]
    return ptx[: found.start()] + ptx[found.end() :]
