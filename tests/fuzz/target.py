"""What is fuzzed, and what each case has to satisfy: a result that fits the files, or the reader's own error."""

from __future__ import annotations

import faulthandler
import signal
import sys
import time
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis.strategies import SearchStrategy, fixed_dictionaries

SECONDS = 10.0  # for one case; it takes milliseconds
MESSAGE = 800  # characters of an error beyond the path

Files = Mapping[str, bytes]


class Content(bytes):
    """The bytes of a file; long ones are printed as their ends."""

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # Hypothesis writes other bytes out

    def __repr__(self) -> str:
        whole = bytes(self)
        return repr(whole) if len(whole) <= 200 else f"<{len(whole)} bytes {whole[:120]!r} … {whole[-40:]!r}>"


@dataclass(frozen=True)
class Target:
    """A reader of files, and files for it.

    files: contents by name, written to one folder before each case.
    read: takes the folder. It reads the files and returns a result, or raises `error`.
    error: the only error allowed; its text holds the path of a file or the folder.
    verify: asserts that a result fits the files.
    memory: the most bytes that Python and NumPy may hold at once in `read`. What the files really hold has to fit,
        with what a reader adds to it; what a header claims and what an archive would unpack to must not.
    """

    name: str
    files: SearchStrategy[Files]
    read: Callable[[Path], Any]
    error: type[Exception]
    verify: Callable[[Any, Files], None]
    memory: int


def one_file(name: str, contents: SearchStrategy[bytes]) -> SearchStrategy[Files]:
    """Folders with one file of this name."""
    return fixed_dictionaries({name: contents.map(Content)})


def _alarm(seconds: float) -> None:
    """End the process with a traceback, also in C, unless it is called again within these seconds; 0 is never.

    A timer of the system, as `faulthandler.dump_traceback_later` starts a thread for every case.
    """
    if hasattr(signal, "setitimer"):  # POSIX
        if seconds:
            faulthandler.register(signal.SIGALRM, file=sys.__stderr__ or sys.stderr, chain=True)
        signal.setitimer(signal.ITIMER_REAL, seconds)


def check(target: Target, files: Files, folder: Path) -> str:
    """Read the files in an otherwise empty `folder`; "accepted" or "refused".

    Raises AssertionError, or an error of `read` that is not its own.

    A case that does not end ends the process, with a traceback.
    """
    for path in folder.iterdir():
        path.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    refused, result = None, None
    _alarm(6 * SECONDS)
    tracemalloc.start()
    start = time.perf_counter()
    try:
        result = target.read(folder)
    except target.error as error:
        if type(error) in (ValueError, OSError):
            raise
        refused = error
    finally:
        seconds, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        _alarm(0)
    assert peak <= target.memory, f"{peak} bytes at once; at most {target.memory} are allowed"
    assert seconds <= SECONDS, f"{seconds:.1f} s; at most {SECONDS} are allowed"
    if refused is None:
        target.verify(result, files)
        return "accepted"
    text = str(refused)
    assert str(folder) in text, f"the error does not name the file: {text}"
    assert len(text.replace(str(folder), "")) <= MESSAGE, f"an error of {len(text)} characters: {text[:200]} …"
    assert text.isprintable() or "\n" in text, f"the error has control characters: {text!r}"
    return "refused"
