"""Output that arrives: text in any encoding, tables of any width, pipes that close early."""

import io
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text


def table(
    console: Console, head: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", caption: str = ""
) -> RenderableType:
    """A table. On a narrow terminal its heads are broken, or each row becomes a list under its name."""
    for heads in (head, [name.replace(" ", "\n") for name in head]):
        table = Table(box=box.SIMPLE_HEAD, title=title, caption=caption)
        for i, name in enumerate(heads):
            table.add_column(name, justify="right" if i else "left", vertical="bottom", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        wide = console.options.update(width=1000)
        if console.measure(table, options=wide).maximum <= console.width:
            return table
    grid = Table.grid("", "", padding=(0, 2))
    for name, *cells in rows:
        grid.add_row(Text(name, style="bold"))
        for pair in zip(head[1:], cells, strict=True):
            grid.add_row(*pair)
    return Group(title, grid, caption)


def replace_unknown_letters() -> None:
    """Print "?" for what the encoding of the output does not have, such as "−" or "✓"."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def start(main: Callable[[], int]) -> NoReturn:
    """Call `main` as a program, and exit with its status.

    It is 130 after Ctrl-C, 141 if the reader of the output has gone, and 1 if the output cannot be written.
    """
    replace_unknown_letters()
    try:
        code = main()
        print(end="", flush=True)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except OSError as error:
        code = 141 if isinstance(error, BrokenPipeError) else 1
        if code == 1:
            print(error, file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still buffered
    sys.exit(code)


def finite(content: Any) -> Any:
    """Replace NaN and Inf by None: JSON has no such numbers."""
    if isinstance(content, Mapping):
        return {k: finite(v) for k, v in content.items()}
    if isinstance(content, list | tuple):
        return [finite(v) for v in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
