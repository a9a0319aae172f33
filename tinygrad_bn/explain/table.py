"""Tables that print in a terminal, by rich, and show as HTML in a notebook."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tinygrad_bn.explain.graph import Expand, folded, label, last_gradient, shown_steps
from tinygrad_bn.explain.memory import Memory, memory
from tinygrad_bn.explain.steps import Step

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from tinygrad_bn.explain.explanation import Explanation


@dataclass(frozen=True)
class Table:
    """Rows of text under a head. `print` it, show it in a notebook, or give it to rich."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __rich__(self) -> RichTable:
        from rich import box
        from rich.table import Table as RichTable

        table = RichTable(title=self.title, box=box.SIMPLE_HEAD)
        for name in self.head:
            table.add_column(name, overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO())
        console.print(self, markup=False, highlight=False)
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        return text.rstrip("\n")

    __repr__ = __str__

    def _repr_html_(self) -> str:
        def cells(tag: str, row: Sequence[str]) -> str:
            style = "white-space:nowrap;text-align:left"
            return "<tr>" + "".join(f"<{tag} style='{style}'>{html.escape(c)}</{tag}>" for c in row) + "</tr>"

        body = "".join(cells("td", row) for row in self.rows)
        head = cells("th", self.head)
        return f"<table><caption>{html.escape(self.title)}</caption><thead>{head}</thead><tbody>{body}</tbody></table>"


def steps_table(e: Explanation, expand: Expand) -> Table:
    """A row for each step: its name, its ops, shape, values, gradient and sources. By default nothing is folded.

    The row of a layer's result, or of a folded box, has the memory of the layer, as a plain run holds it.
    """
    shown = shown_steps(e) if expand is None else folded(e, expand)
    held = memory(e)
    ends = {id(of.result): name for name, of in held.items()}
    rows = []
    for path, node in shown.items():
        step = node.step
        ops = " ".join(s.op.name for s in node.steps if s.op) or "given"
        sources = ", ".join(s.removeprefix("box:") for s in node.sources)
        if step is None:
            box = path.removeprefix("box:")
            inside = [of for name, of in held.items() if f"{name}.".startswith(f"{box}.")]
            rows.append((node.name, f"{len(node.steps)} ops, folded", "", "", "", _sizes(inside), sources))
            continue
        grad = last_gradient(e, step)
        gradient = "" if grad is None else numbers(grad)
        own = held.get(ends.pop(id(step.array), ""))
        rows.append((path, ops, shape_of(step), numbers(step.value), gradient, _sizes([own] if own else []), sources))
    head = ("step", "ops", "shape", "value", "gradient", "memory, bytes", "from")
    return Table("What was computed; memory: a layer's result / kept for backward / gradient", head, rows)


def _sizes(layers: Sequence[Memory]) -> str:
    """The memory of layers together: of the result, of what is kept for the backward pass, and of the gradients."""
    return " / ".join(f"{sum(of):,}" for of in zip(*(m.sizes for m in layers), strict=True))


def shape_of(step: Step) -> str:
    """`float64 8×4`, or `float64` for a number."""
    return f"{step.array.dtype} {'×'.join(map(str, step.array.shape))}".rstrip()


def numbers(array: Any) -> str:
    """The first three numbers, or the only one; and the largest magnitude of several."""
    a = np.asarray(array)
    first = " ".join(f"{v:.4g}" for v in a.ravel()[:3].tolist())
    if a.size <= 3:
        return first
    return f"{first} …  |max| {max(float(a.max()), -float(a.min())):.3g}"


def memory_table(e: Explanation) -> Table:
    """`memory` as a table, with the sum of each column."""
    held = memory(e)
    rows = [(label(e, name) if name in e.kinds else name, *(f"{v:,}" for v in m.sizes)) for name, m in held.items()]
    total = ("together", *(f"{sum(column):,}" for column in zip(*(m.sizes for m in held.values()), strict=True)))
    head = ("layer", "result", "kept for backward", "gradient")
    return Table("Memory of each layer of a plain run, in bytes", head, [*rows, total])
