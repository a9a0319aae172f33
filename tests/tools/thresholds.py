"""Kernels take their paths for large work on small arrays."""

from contextlib import contextmanager

from tinygrad_bn_kernels.cpu import elementwise, reduce, threads

SETTINGS = [(reduce, name) for name in ("SMALL", "PIECE", "WIDE", "NARROW")]
SETTINGS += [(threads, "PARALLEL_FROM"), (elementwise, "WHERE_FROM")]


@contextmanager
def thresholds(piece=8, parallel_from=1):
    """In this block small work runs in the loops, in pieces of `piece` elements, on threads from `parallel_from`."""
    before = [getattr(module, name) for module, name in SETTINGS]
    try:
        for (module, name), value in zip(SETTINGS, (0, piece, 6, 5, parallel_from, 0), strict=True):
            setattr(module, name, value)
        yield
    finally:
        for (module, name), value in zip(SETTINGS, before, strict=True):
            setattr(module, name, value)
