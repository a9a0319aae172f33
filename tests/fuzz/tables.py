"""CSV tables."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any
from unittest import mock

from hypothesis import strategies as st

from tests.fuzz.mutations import damaged, packed
from tests.fuzz.target import Files, Target, one_file
from tinygrad_bn.datasets import DataError, files, read_csv

BYTES, CELLS = 1 << 18, 1 << 14  # limits that a case can exceed: the reader's own take gigabytes to reach
VALUES = (
    "",
    "1",
    "-2.5",
    "nan",
    "inf",
    "1e999",
    "a b",
    "a,b",
    'a "b"',
    "x\ny",
    "x\r\ny",
    "\0",
    "é",
    "\u2028",
    "\ufeff",
    "🙂",
)
SCRAPS = (
    b'"', b'""', b'"x', b'x"y', b",", b",,,", b"\n", b"\n\n", b"\r", b"\r\n", b"\0", b"\xef\xbb\xbf", b"\xff\xfe",
    b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\x80", b"\x1a", b"'", b"\\", b";", b"\t",
)  # fmt: skip


@st.composite
def valid(draw: st.DrawFn) -> bytes:
    """A table in one of several encodings, of which the reader takes UTF-8."""
    value = st.one_of(st.sampled_from(VALUES), st.text(max_size=5))
    columns = draw(st.integers(1, 4))
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator=draw(st.sampled_from(("\n", "\n", "\r\n", "\r"))))
    for _ in range(draw(st.integers(1, 5))):
        writer.writerow([draw(value) for _ in range(columns)])
    encoding = draw(st.sampled_from(("utf-8",) * 6 + ("utf-8-sig", "utf-16", "utf-32", "latin-1")))
    return text.getvalue().encode(encoding, "replace")


@st.composite
def torn(draw: st.DrawFn) -> bytes:
    """A table with a scrap of syntax somewhere in it."""
    content = draw(valid())
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        content = content[:at] + draw(st.sampled_from(SCRAPS)) + content[at:]
    return content


@st.composite
def huge(draw: st.DrawFn) -> bytes:
    """Very long lines, fields, headers and columns."""
    n = draw(st.sampled_from((1000, CELLS - 2, CELLS, 140_000, BYTES, BYTES + 1)))
    unit = draw(
        st.sampled_from((b"x", b",", b"\n", b"1\n", b"1,2\n", b'"', b'""', b'"a\n', b"\r", b"\0", "é".encode(), b" "))
    )
    start = draw(st.sampled_from((b"", b"a\n", b"a,b\n", b'"')))
    return start + unit * (n // len(unit)) + draw(st.sampled_from((b"", b"\n", b'"')))


CONTENTS = st.one_of(
    valid().flatmap(lambda content: packed(content, b"1,2\n")), torn(), torn().flatmap(packed), huge().flatmap(packed),
    valid().flatmap(damaged).flatmap(packed), st.binary(max_size=60).flatmap(packed),
)  # fmt: skip


def read(folder: Path) -> Any:
    """`read_csv`, with limits that a case can exceed."""
    with mock.patch.multiple(files, CSV_LIMIT=BYTES, CSV_CELLS=CELLS):
        return read_csv(folder / "data.csv")


def verify(result: Any, _: Files) -> None:
    """A table: every row as long as the header, in texts, within the limits, and the same when it is read again."""
    header, rows = result
    assert header
    assert all(len(row) == len(header) for row in rows)
    assert all(type(value) is str for row in (header, *rows) for value in row)
    assert len(header) * (len(rows) + 1) <= CELLS + 1  # the last line may have no break
    text = io.StringIO(newline="")
    csv.writer(text).writerows((header, *rows))
    assert list(csv.reader(io.StringIO(text.getvalue(), newline=""), strict=True)) == [header, *rows]


CSV = Target("csv", one_file("data.csv", CONTENTS), read, DataError, verify, 1 << 23)
