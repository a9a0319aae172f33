"""The graph as a figure: steps from left to right, values and gradients as colour."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tinygrad_bn.explain.graph import Expand, Shown, boxes, folded, label, last_gradient
from tinygrad_bn.explain.layout import Layout, layout
from tinygrad_bn.viz import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tinygrad_bn.explain.explanation import Explanation

WIDTH, HEIGHT = 0.8, 0.72  # of a step, where steps are 1 apart
ROWS, COLUMNS = 64, 32  # of a picture of numbers


def figure(e: Explanation, expand: Expand = None) -> Figure:
    """A figure of the graph. In each step the left picture is its value and the right one its gradient."""
    nodes = folded(e, expand)
    if not nodes:
        raise ValueError("nothing was computed in the block, so there is no figure of it")
    given = {k: n.scope for k, n in nodes.items() if n.step is not None and n.step.op is None}
    places = layout({k: n.sources for k, n in nodes.items()}, given, {k: n.scope for k, n in nodes.items()})
    xs, ys = zip(*[p for route in (*places.routes.values(), list(places.place.values())) for p in route], strict=True)
    width, height = max(xs) - min(xs) + 1.4, max(ys) - min(ys) + 1.6
    fig = new_figure(1.12 * width, 1.12 * height)
    axes = fig.subplots()
    axes.set(xlim=(min(xs) - 0.7, max(xs) + 0.7), ylim=(max(ys) + 0.7, min(ys) - 0.9))
    axes.set_axis_off()
    _draw_boxes(axes, e, nodes, places)
    for (source, target), route in places.routes.items():
        _draw_edge(axes, route, nodes[source], nodes[target])
    for key, node in nodes.items():
        _draw_step(axes, e, node, *places.place[key])
    caption = "left: value, right: gradient; blue is negative, orange positive" if e.passes else "blue is negative"
    axes.text(0.5, 0, caption, transform=axes.transAxes, ha="center", va="bottom", fontsize=8, color="0.4")
    return fig


def _draw_boxes(axes: Axes, e: Explanation, nodes: dict[str, Shown], places: Layout) -> None:
    from matplotlib.patches import FancyBboxPatch

    around = boxes(e, {k: n for k, n in nodes.items() if n.step})
    depth_of: dict[str, int] = {}
    for scope, outer in around.items():
        depth_of[scope] = depth_of.get(outer, -1) + 1
    for scope in around:
        inside = {k for k, n in nodes.items() if f"{n.scope}.".startswith(f"{scope}.")}
        if len(inside) < 2:
            continue
        xs, ys = zip(*(places.place[k] for k in inside), strict=True)
        inner = [route for (a, b), route in places.routes.items() if a in inside and b in inside]
        bends = [at for route in inner for _, at in route[1:-1]]
        within = max(depth_of[nodes[k].scope] for k in inside if nodes[k].scope in around) - depth_of[scope]
        x, y = min(xs) - 0.44 - 0.05 * within, min(ys) - 0.58 - 0.17 * within
        right, bottom = max(xs) + 0.44 + 0.05 * within, max((max(ys) + 0.4, *(b + 0.07 for b in bends))) + 0.05 * within
        size = right - x, bottom - y
        style: dict[str, Any] = {"facecolor": "#eef1f6", "edgecolor": "#cdd2da", "zorder": 0.1 * depth_of[scope]}
        axes.add_patch(FancyBboxPatch((x, y), *size, boxstyle="round,pad=0,rounding_size=0.08", **style))
        axes.text(x + 0.06, y + 0.04, label(e, scope), fontsize=7, va="top", color="0.35", zorder=2)


def _draw_edge(axes: Axes, route: list[tuple[float, float]], source: Shown, target: Shown) -> None:
    """A line that bends between the layers only, so that it crosses no step."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    (x, y), *rest = route
    points, codes = [(x + WIDTH / 2, y)], [Path.MOVETO]
    for i, (u, v) in enumerate(rest):
        end = u - WIDTH / 2
        a, b = points[-1]
        points += [((a + end) / 2, b), ((a + end) / 2, v), (end, v)]
        codes += [Path.CURVE4] * 3
        if i < len(rest) - 1:
            points.append((u + WIDTH / 2, v))
            codes.append(Path.LINETO)
    axes.add_patch(PathPatch(Path(points, codes), facecolor="none", edgecolor="0.55", linewidth=1, zorder=1))


def _draw_step(axes: Axes, e: Explanation, node: Shown, x: float, y: float) -> None:
    from matplotlib.patches import FancyBboxPatch

    leaf = node.step is not None and node.step.op is None
    style: dict[str, Any] = {"facecolor": "white", "edgecolor": "0.5", "linestyle": "--" if leaf else "-", "zorder": 2}
    corner = x - WIDTH / 2 + 0.02, y - HEIGHT / 2 + 0.02
    shape = "round,pad=0.0,rounding_size=0.07"
    axes.add_patch(FancyBboxPatch(corner, WIDTH - 0.04, HEIGHT - 0.04, boxstyle=shape, **style))
    text: dict[str, Any] = {"ha": "center", "va": "center", "zorder": 4}
    if node.step is None:
        axes.text(x, y, "\n".join(node.name.replace("_", " ").split()), fontsize=7, fontweight="bold", **text)
        return
    name = node.path if leaf and not _is_boxed(e, node) else node.name
    axes.text(x, y - 0.25, name, fontsize=7 if len(name) < 11 else 5, fontweight="bold", **text)
    axes.text(x, y - 0.11, "×".join(map(str, node.step.array.shape)) or "number", fontsize=6, color="0.4", **text)
    grad = last_gradient(e, node.step)
    _draw_numbers(axes, node.step.value, (x - 0.34, x - 0.03) if grad is not None else (x - 0.155, x + 0.155), y)
    if grad is not None:
        _draw_numbers(axes, grad, (x + 0.03, x + 0.34), y)


def _is_boxed(e: Explanation, node: Shown) -> bool:
    return any(s.scope == node.scope and s.op for s in e.steps) and bool(node.scope)


def _draw_numbers(axes: Axes, array: Any, xs: tuple[float, float], y: float) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    a = np.atleast_2d(np.asarray(array, np.float64))
    a = a.reshape(a.shape[0], -1)[:ROWS, :COLUMNS]
    if not a.size:
        return
    finite = np.abs(a[np.isfinite(a)])
    top = float(finite.max(initial=0)) or 1.0
    colours = LinearSegmentedColormap.from_list("signed", ["#2b6cb0", "#f4f4f2", "#c2410c"]).with_extremes(bad="#d0f")
    extent = (*xs, y + 0.3, y - 0.01)
    limits = axes.get_xlim(), axes.get_ylim()
    masked = np.ma.masked_invalid(a)
    axes.imshow(
        masked, cmap=colours, vmin=-top, vmax=top, extent=extent, aspect="auto", interpolation="nearest", zorder=3
    )
    axes.set(xlim=limits[0], ylim=limits[1])
