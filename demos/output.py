"""Output that arrives: files that are replaced whole, text in any encoding, a pipe that closes early."""

import io
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to. At the end it replaces `path`; an error, as of a full disk, leaves `path`."""
    beside = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield beside
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def start(main: Callable[[], int]) -> NoReturn:
    """Call `main` as a program, and exit with its status: 130 after Ctrl-C, 141 if nobody reads the output."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an encoding may have no "−" or "✓"
    try:
        code = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still buffered
        code = 141
    sys.exit(code)


def finite(content: Any) -> Any:
    """Replace NaN and Inf by None: JSON has no such numbers."""
    if isinstance(content, Mapping):
        return {k: finite(v) for k, v in content.items()}
    if isinstance(content, list | tuple):
        return [finite(v) for v in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
