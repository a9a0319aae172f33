"""Damage that any format can suffer: bytes changed, lost, added or moved, and gzip of every kind around them."""

from __future__ import annotations

import gzip
import struct
import zlib
from functools import cache

from hypothesis import strategies as st

SIZES = (0, 1, 2, 3, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
NAMES = (b"data", b"../../etc/passwd", b"/etc/passwd", b"C:\\windows", b"\xff" * 300, b"")
FTEXT, FHCRC, FEXTRA, FNAME, FCOMMENT, RESERVED = 1, 2, 4, 8, 16, 0xE0


@cache
def bomb(unit: bytes) -> bytes:
    """A gzip member that unpacks to 32 MiB."""
    return gzip.compress(unit * ((1 << 25) // len(unit)), 9, mtime=0)


def deflated(content: bytes) -> bytes:
    """Raw deflate, as in a gzip member."""
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    return packer.compress(content) + packer.flush()


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` after one to three changes of its bytes."""
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(("cut", "flip", "replace", "insert", "delete", "repeat", "zero", "append")))
        at = draw(st.integers(0, len(content)))
        n = draw(st.integers(1, 9))
        if kind == "cut":
            content = content[:at]
        elif kind == "flip" and at < len(content):
            content = content[:at] + bytes([content[at] ^ (1 << n % 8)]) + content[at + 1 :]
        elif kind == "replace":
            content = content[:at] + draw(st.binary(min_size=n, max_size=n)) + content[at + n :]
        elif kind == "insert":
            content = content[:at] + draw(st.binary(max_size=n)) + content[at:]
        elif kind == "delete":
            content = content[:at] + content[at + n :]
        elif kind == "repeat":
            content = content[:at] + content[at : at + n] * n + content[at + n :]
        elif kind == "zero":
            content = content[:at] + bytes(n) + content[at + n :]
        elif kind == "append":
            content += draw(st.sampled_from((b"\0", b"\n", b"\xff" * 40, bytes(70_000))))
    return content


@st.composite
def member(draw: st.DrawFn, content: bytes) -> bytes:
    """A gzip member with any flags and their fields, or a wrong method, checksum or length."""
    flags = draw(
        st.sampled_from((0, FTEXT, FHCRC, FEXTRA, FNAME, FCOMMENT, FEXTRA | FNAME | FCOMMENT | FHCRC, RESERVED))
    )
    method = draw(st.sampled_from((8, 8, 8, 8, 0, 7, 255)))
    head = struct.pack("<BBBBLBB", 0x1F, 0x8B, method, flags, draw(st.sampled_from((0, (1 << 32) - 1))), 0, 255)
    if flags & FEXTRA:
        extra = draw(st.binary(max_size=8))
        head += struct.pack("<H", draw(st.sampled_from((len(extra), 0, 65535)))) + extra
    if flags & FNAME:
        head += draw(st.sampled_from(NAMES)) + draw(st.sampled_from((b"\0", b"\0", b"")))
    if flags & FCOMMENT:
        head += b"a comment\0"
    if flags & FHCRC:
        head += struct.pack("<H", zlib.crc32(head) & 0xFFFF)
    crc = zlib.crc32(content) ^ draw(st.sampled_from((0, 0, 0, 1)))
    size = draw(st.sampled_from((len(content), len(content), len(content), *SIZES)))
    return head + deflated(content) + struct.pack("<LL", crc, size)


@st.composite
def packed(draw: st.DrawFn, content: bytes, unit: bytes = b"\0") -> bytes:
    """`content` as a file: mostly plain or gzip; also in members, twice, damaged, or with a bomb behind it."""
    kind = draw(
        st.sampled_from(
            ("plain",) * 5 + ("gzip",) * 3
            + ("members", "flags", "twice", "cut", "damaged", "bomb", "inner bomb", "empty members", "zeros behind")
            + ("noise behind", "stored", "magic")
        )
    )  # fmt: skip
    if kind == "plain":
        return content
    if kind == "members":
        at = draw(st.integers(0, len(content)))
        return gzip.compress(content[:at], 1) + gzip.compress(content[at:], 1)
    if kind == "flags":
        return draw(member(content))
    if kind == "inner bomb":  # one member, so that no checksum comes between
        packer = zlib.compressobj(9, zlib.DEFLATED, 31)
        return packer.compress(content) + packer.compress(unit * ((1 << 21) // len(unit))) + packer.flush()
    if kind == "stored":
        return gzip.compress(content, 0)
    if kind == "magic":
        return b"\x1f\x8b" + content
    zipped = gzip.compress(content, 1)
    if kind == "twice":
        return gzip.compress(zipped, 1)
    if kind == "cut":
        return zipped[: draw(st.integers(0, len(zipped)))]
    if kind == "damaged":
        return draw(damaged(zipped))
    behind = {
        "bomb": lambda: bomb(unit),
        "empty members": lambda: gzip.compress(b"", 1) * draw(st.sampled_from((1, 300))),
        "zeros behind": lambda: bytes(draw(st.sampled_from((1, 5000)))),
        "noise behind": lambda: draw(st.binary(max_size=20)),
    }.get(kind, bytes)
    return zipped + behind()
