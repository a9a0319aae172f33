"""How tensors and modules look in a notebook: numbers on colours, pictures of large arrays, modules that fold.

Colours are as in the pages of `explain`: blue is negative, orange positive, magenta not finite, and stronger is larger.
They are half transparent, so they suit light and dark notebooks. Treescope is used where the notebook uses it.
"""

from __future__ import annotations

import base64
import html
import struct
import zlib
from typing import Any

import numpy as np

CELLS = 10  # rows and columns of a table
TILES = 8  # pictures in a row, and rows of them
PIXELS = 128  # rows and columns of a picture, of the whole array or of one with more than two axes
LOW, HIGH, BAD = (43, 108, 176), (194, 65, 12), (208, 0, 255)


class TensorInNotebook:
    """What makes a notebook show a tensor: its values as a table or a picture, and what it is."""

    __slots__ = ()

    def _repr_html_(self) -> str:
        t: Any = self
        return f"<div><div>{html.escape(' · '.join(_facts(t)))}</div>{array_html(t.numpy())}</div>"

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        t: Any = self
        parts: dict[str, Any] = {"data": t.numpy(), "requires_grad": t.requires_grad}
        if t.device != "cpu":
            parts["device"] = t.device
        if t.node:
            parts["op"] = t.node.op.name
        if t.grad is not None:
            parts["grad"] = t.grad.numpy()
        return constructor(self, parts, path, subtree_renderer)


class ModuleInNotebook:
    """What makes a notebook show a module: its parameters and buffers, and the modules inside, which unfold."""

    __slots__ = ()

    def _repr_html_(self) -> str:
        return _module(self, "", "", opened=True)

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        parts = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return constructor(self, parts, path, subtree_renderer)


def constructor(of: object, parts: dict[str, Any], path: str | None, renderer: Any) -> Any:
    """What Treescope shows of an object: its type and its parts, which unfold."""
    from treescope.repr_lib import render_object_constructor

    return render_object_constructor(object_type=type(of), attributes=parts, path=path, subtree_renderer=renderer)


def _facts(t: Any) -> list[str]:
    origin = f"from {t.node.op.name}" if t.node else "leaf"
    grad = ["requires_grad"] if t.requires_grad else []
    return [f"{type(t).__name__} {t.shape}", str(t.dtype), t.device, origin, *grad]


# ---- arrays ---------------------------------------------------------------------------------------------


def array_html(values: Any, top: float | None = None) -> str:
    """A small array as a table of its numbers, a larger one as a picture.

    `top` is the magnitude that has the strongest colour, by default the largest finite one.
    """
    if not values.size:
        return "<div>no elements</div>"
    small = values.ndim <= 2 and max(values.shape, default=1) <= CELLS
    return _table(values, top) if small else _picture(values, top)


def largest(values: Any) -> float:
    """The largest finite magnitude; 1 if there is none but 0."""
    wide = np.asarray(values, np.float64)
    return float(np.abs(wide[np.isfinite(wide)]).max(initial=0)) or 1.0


def _signed(values: Any, top: float | None) -> tuple[Any, Any]:
    """The values in parts of `top`, from -1 to 1; and which are finite."""
    wide = np.asarray(values, np.float64)
    finite = np.isfinite(wide)
    return np.clip(np.where(finite, wide, 0) / (top or largest(wide)), -1, 1), finite


def _table(values: Any, top: float | None) -> str:
    rows = np.atleast_2d(values)
    parts, finite = _signed(rows, top)
    lines = []
    for row, shares, known in zip(rows, parts, finite, strict=True):
        cells = []
        for value, share, fine in zip(row, shares, known, strict=True):
            colour = (LOW if share < 0 else HIGH) if fine else BAD
            alpha = 0.55 * abs(share) if fine else 0.55
            text = f"{value:.4g}" if values.dtype.kind == "f" else str(value)
            style = f"text-align:right;padding:1px 7px;background:rgba({','.join(map(str, colour))},{alpha:.2f})"
            cells.append(f"<td style='{style}'>{text}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table style='border-collapse:collapse;font-family:monospace'>{''.join(lines)}</table>"


def _picture(values: Any, top: float | None) -> str:
    """The last two axes as a picture; of more axes, pictures side by side."""
    tiles = values.reshape(-1, *values.shape[-2:]) if values.ndim > 2 else np.atleast_2d(values)[None]
    shown = tiles[: TILES * TILES, :PIXELS, :PIXELS]
    count, high, wide = shown.shape
    columns = min(TILES, count)
    parts, finite = _signed(shown, top)
    board = np.zeros((-(-count // columns) * (high + 1) - 1, columns * (wide + 1) - 1, 4), np.uint8)
    for i in range(count):
        y, x = divmod(i, columns)
        pixels = board[y * (high + 1) :, x * (wide + 1) :][:high, :wide]
        pixels[..., :3] = np.where(finite[i, ..., None], np.where(parts[i, ..., None] < 0, LOW, HIGH), BAD)
        pixels[..., 3] = np.where(finite[i], 20 + 235 * np.abs(parts[i]), 255)
    scale = max(1, min(12, 480 // board.shape[1], 320 // board.shape[0]))
    size = f"width:{board.shape[1] * scale}px;max-width:100%;image-rendering:pixelated"
    bad = values.size - np.isfinite(values).sum()
    known = np.asarray(values[np.isfinite(values)], np.float64)
    peak = largest(known)  # the sum of huge numbers would overflow
    facts = [f"{known.min():.4g} to {known.max():.4g}, mean {(known / peak).mean() * peak:.4g}"] if known.size else []
    facts += [f"{bad:,} of {values.size:,} are not finite"] if bad else []
    facts += ["blue is negative, orange positive"]
    if shown.shape != tiles.shape:
        facts.append(f"shown: {count} of {len(tiles)}, {high} × {wide} of {tiles.shape[1]} × {tiles.shape[2]}")
    text = "; ".join(facts)
    return f"<img alt='{text}' style='{size}' src='data:image/png;base64,{_png(board)}'><div>{text}</div>"


def _png(pixels: Any) -> str:
    """Pixels (rows, columns, 4), red, green, blue and opacity in bytes, as a PNG in base64."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    high, wide, _ = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", wide, high, 8, 6, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    data = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)
    return base64.b64encode(data).decode()


# ---- modules --------------------------------------------------------------------------------------------


def _module(module: Any, path: str, name: str, opened: bool = False) -> str:
    own = {key: t for key, t in module.named_tensors() if "." not in key}
    children = list(module.named_children())
    count = sum(p.size for p in module.parameters())
    title = f"{name} {type(module).__name__}({module.extra_repr()})".strip()
    text = f"<code>{html.escape(title)}</code>" + (f" {count:,} parameters" if count else "")
    if not own and not children:
        return f"<div style='margin-left:1.2em'>{text}</div>"
    rows = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in _row(f'{path}{key}', t))}</tr>"
        for key, t in own.items()
    )
    inner = f"<table>{rows}</table>" if rows else ""
    inner += "".join(_module(child, f"{path}{key}.", key) for key, child in children)
    return f"<details style='margin-left:1.2em'{' open' if opened else ''}><summary>{text}</summary>{inner}</details>"


def _row(key: str, t: Any) -> tuple[str, ...]:
    shape = " × ".join(map(str, t.shape)) or "number"
    kind = type(t).__name__.lower() + (", requires_grad" if t.requires_grad else "")
    return key, shape, str(t.dtype), t.device, kind
