"""One self-contained page: the graph, and behind every step its formula, numbers and gradient."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinygrad_bn.explain.graph import Expand, Shown, boxes, call_in_names, label, last_gradient, opened, shown_steps
from tinygrad_bn.explain.paths import parting
from tinygrad_bn.explain.table import memory_table

if TYPE_CHECKING:
    from tinygrad_bn.explain.explanation import Explanation

HERE = Path(__file__).parent
SCRIPTS = ("layout.js", "graph.js", "panel.js")
ROWS, COLUMNS = 12, 8  # of the numbers of a step
EXPLAINED = 12  # tensors whose paths are on the page


def write_page(e: Explanation, path: str | Path, expand: Expand = None) -> Path:
    """Write the page and return its path. Boxes that `expand` does not open are folded at first."""
    data = json.dumps(content(e, expand), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    script = "\n".join((HERE / name).read_text("utf-8") for name in SCRIPTS)
    parts = {"CSS": (HERE / "page.css").read_text("utf-8"), "SCRIPT": script, "DATA": data.replace("<", "\\u003c")}
    text = (HERE / "page.html").read_text("utf-8")
    for name, part in parts.items():
        before, _, after = text.partition(f"/*{name}*/")
        text = before + part + after
    Path(path).write_text(text, "utf-8")
    return Path(path)


def content(e: Explanation, expand: Expand = None) -> dict[str, Any]:
    """All that the page shows, as plain data."""
    shown = shown_steps(e)
    around = boxes(e, shown)
    is_open = opened(e, list(around), expand)
    memory = memory_table(e)
    result = e.path_of(e.passes[-1].y) if e.passes else next(reversed(shown), "")
    return {
        "nodes": {path: _node(e, node) for path, node in shown.items()},
        "boxes": {s: {"label": label(e, s), "around": around[s], "open": s in is_open} for s in around},
        "paths": _paths(e, shown),
        "result": result,
        "memory": [list(row) for row in (memory.head, *memory.rows)],
    }


def _node(e: Explanation, node: Shown) -> dict[str, Any]:
    step = node.step
    assert step is not None
    return {
        "name": node.name,
        "scope": node.scope,
        "given": step.op is None,
        "shape": list(step.array.shape),
        "dtype": str(step.array.dtype),
        "ops": [{"call": call_in_names(e, s), "rule": s.formula} for s in node.steps],
        "value": numbers(step.value),
        "grad": numbers(last_gradient(e, step)),
        "from": node.sources,
        "line": step.where.replace("\\", "/").rpartition("/")[2],
    }


def _paths(e: Explanation, shown: dict[str, Shown]) -> dict[str, Any]:
    """The paths of what the program named and of the results of layers, where the gradient has several."""
    out: dict[str, Any] = {}
    candidates = [n for n in shown.values() if n.step and (not n.scope or n.name == "out") and n.step.array.ndim]
    for node in sorted(candidates, key=lambda n: bool(n.scope)):
        step = node.step
        assert step is not None
        p = next((p for p in reversed(e.passes) if step in p.grads), None)
        if p is None or not (chosen := parting(p, step)) or len(out) == EXPLAINED:
            continue
        forward = [e.path_of(s) for s in chosen if not s.derivative_of]
        for ways in (e[node.path].paths, e[node.path].paths(via=forward)):
            try:
                several = len(ways) > 1
                break
            except ValueError:  # too many; those that the forward pass tells apart are fewer
                several = False
        if several:
            out[node.path] = [
                {
                    "label": name,
                    "steps": [q for s in steps if (q := e.path_of(s)) in shown],
                    "share": numbers(ways[name]),
                }
                for name, steps in ways.steps.items()
            ]
    return out


def numbers(a: Any) -> dict[str, Any] | None:
    """The first numbers as rows, and the shape they are from; NaN and infinity are words, as JSON has none."""
    if a is None:
        return None
    a = np.asarray(a)
    a = a.reshape(a.shape[0], -1) if a.ndim > 1 and a.size else a.reshape(1, -1)
    rows = a[:ROWS, :COLUMNS].tolist()
    return {"of": list(a.shape), "rows": [[v if np.isfinite(v) else str(v) for v in r] for r in rows]}
