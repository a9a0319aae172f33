"""What the lessons share: their two languages, figures in one style, and exercises that the engine checks.

A lesson runs in the browser (`make lessons`), and as a script, which prints its text, without pictures, and the answers
of its exercises: `python demos/lessons/chain_rule.py --lang ko`.
"""

from __future__ import annotations

import base64
import inspect
import io
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import marimo as mo
import numpy as np

sys.path.append(str(Path(__file__).parents[2]))  # a lesson started as a script finds the demos

from demos.interval import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LANGUAGES = {"English": "en", "한국어": "ko"}
Check = Callable[[dict[str, Any]], tuple[str, str] | None]


def language_switch() -> Any:
    """The switch at the top of a lesson. `?lang=ko` in the address, or `--lang ko` for a script, begins in Korean."""
    asked = mo.query_params().get("lang") or ("ko" if sys.argv[-2:] == ["--lang", "ko"] else "en")
    names = {code: name for name, code in LANGUAGES.items()}
    return mo.ui.radio(list(LANGUAGES), value=names.get(str(asked), "English"), inline=True, label="Language / 언어")


def is_script() -> bool:
    """Whether the lesson prints, instead of being shown in a browser."""
    return mo.app_meta().mode in ("script", None)


class Say:
    """Text in the chosen language: `say(english, korean, name=value)` shows one of them as Markdown.

    `[[name]]` or `[[name:.2f]]` in the text stands for a number or an array computed in the lesson, or for a control.
    Both texts have to use the same names: a translation cannot leave out a number.
    """

    def __init__(self, switch: Any) -> None:
        self.language = LANGUAGES[switch.value]

    def __call__(self, english: str, korean: str, **values: Any) -> Any:
        used = [set(re.findall(r"\[\[(\w+)", text)) for text in (english, korean)]
        if used[0] != used[1] or used[0] != set(values):
            raise ValueError(f"the texts use {used[0]} and {used[1]}; given are {set(values)}")
        text = inspect.cleandoc(self.pick(english, korean))
        return shown(re.sub(r"\[\[(\w+)(?::([^\]]+))?\]\]", lambda m: inline(m[1], values[m[1]], m[2]), text))

    def pick(self, english: str, korean: str) -> str:
        """One of two short texts, as for a label."""
        return korean if self.language == "ko" else english

    def exercise(self, english: str, korean: str, editor: Any, solution: str, check: Check, **names: Any) -> Any:
        """An exercise: the question, the learner's code, and what the engine says about it.

        Args:
            english, korean: the question.
            editor: from `editor`; its code is run with NumPy as `np` and with `names`.
            solution: code that is right. A script prints it, and raises AssertionError if the check does not pass it,
                or passes the code that the editor begins with.
            check: takes the variables of the code; what is wrong with them, in both languages, or None.
        """
        names, question = {"np": np, **names}, inspect.cleandoc(self.pick(english, korean))
        if is_script():
            assert not verdict(solution, names, check), verdict(solution, names, check)
            assert verdict(editor.value, names, check), "the exercise is solved before it begins"
            right = self.pick("The engine agrees.", "엔진의 값과 같습니다.")
            return shown(f"{question}\n\n```python\n{solution.strip()}\n```\n\n{right}")
        wrong = verdict(editor.value, names, check)
        result = self.pick(*wrong) if wrong else self.pick("✓ The engine agrees.", "✓ 엔진의 값과 같습니다.")
        message = mo.Html(f'<div class="verdict" role="status">{escaped(result)}</div>')
        answer = self.pick("One way to do it", "풀이 보기")
        return mo.vstack([
            mo.md(question),
            editor,
            mo.callout(message, kind="warn" if wrong else "success"),
            mo.accordion({answer: mo.md(f"```python\n{solution.strip()}\n```")}),
        ])  # fmt: skip


def shown(text: str) -> Any:
    """Markdown in the browser; a script prints it."""
    if is_script():
        print(re.sub(r"</?\w[^>]*>", "", text), end="\n\n")
    return mo.md(text)


def inline(name: str, value: Any, spec: str | None) -> str:
    """A value inside a text. In the browser a number carries its name, so that a test can read it back."""
    if hasattr(value, "_mime_"):
        return f"({value.value})" if is_script() else str(mo.as_html(value).text)
    if isinstance(value, str):
        return value
    return f'<span class="number" data-name="{name}">{written(value, spec or ".4g")}</span>'


def written(value: Any, spec: str = ".4g") -> str:
    """A number or a small array as text."""
    if isinstance(value, str | Interval):
        return str(value)
    if np.ndim(value):
        return "[" + ", ".join(written(v, spec) for v in np.asarray(value)) + "]"
    return format(value.item() if hasattr(value, "item") else value, spec).replace("-", "−")


def table(rows: Mapping[str, Any], head: tuple[str, ...] = (), spec: str = ".4f") -> Any:
    """A table with one row for each name: its values side by side. In the browser a cell carries its name."""
    lines, width = [], max(np.size(values) for values in rows.values())
    for name, values in rows.items():
        cells = [v if isinstance(v, str) else written(v, spec) for v in np.ravel(np.asarray(values, object))]
        tagged = [f'<td data-name="{name}[{i}]">{escaped(str(cell))}</td>' for i, cell in enumerate(cells)]
        lines.append((name, cells, f"<tr><th scope='row'>{escaped(name)}</th>{''.join(tagged)}</tr>"))
    if is_script():
        for line in (("", list(head[1:]), ""), *lines):
            print(f"{line[0]:24}", *(f"{cell!s:>12}" for cell in line[1]))
        print()
    heads = "".join(f"<th scope='col'>{escaped(h)}</th>" for h in (head or ("", *map(str, range(width)))))
    body = "".join(line[2] for line in lines)
    return mo.Html(
        f'<div class="table" role="region" tabindex="0" aria-label="{escaped(head[0] if head else "table")}"'
        f'><table class="numbers"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def picture(figure: Figure, alternative: str) -> Any:
    """A figure that is never wider than the page, and says in words what it shows."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    data = base64.b64encode(file.getvalue()).decode()
    return mo.Html(
        f'<img class="picture" style="max-width:{figure.get_figwidth() * 80:.0f}px"'
        f' alt="{escaped(alternative)}" src="data:image/png;base64,{data}">'
    )


def editor(code: str) -> Any:
    """Where the learner writes Python."""
    return mo.ui.code_editor(code.strip() + "\n", language="python", min_height=90)


def verdict(code: str, names: Mapping[str, Any], check: Check) -> tuple[str, str] | None:
    """Run the learner's code: what is wrong with it, in both languages, or None."""
    variables = {"__name__": "answer", **names}
    try:
        exec(compile(code, "<answer>", "exec"), variables)  # under this name the engine lets an op be declared again
        return check(variables)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        return f"This stopped with {text}", f"실행하다 멈췄습니다. {text}"


def expects(**right: Any) -> Check:
    """A check of the learner's variables against the engine's values."""

    def check(variables: dict[str, Any]) -> tuple[str, str] | None:
        for name, value in right.items():
            if variables.get(name, ...) is ...:
                return f"Give {name} a value.", f"{name}에 값을 넣어 보세요."
            if wrong := difference(name, variables[name], np.asarray(value)):
                return wrong
        return None

    return check


def difference(name: str, mine: Any, right: np.ndarray) -> tuple[str, str] | None:
    """How an answer differs from the engine's value: its shape, sign, a factor, or where most; None if it agrees."""
    mine = np.asarray(getattr(mine, "data", mine) if hasattr(mine, "requires_grad") else mine, float)
    if mine.shape != right.shape:
        return (
            f"{name} has the shape {mine.shape}, the engine's has {right.shape}.",
            f"{name}의 모양이 {mine.shape}인데, 엔진의 값은 {right.shape}입니다.",
        )
    scale = np.abs(right).max(initial=0)
    off = np.abs(mine - right)
    if off.max(initial=0) <= 1e-4 * scale + 1e-9:
        return None
    if mine.any() and scale:
        factor = float((mine * right).sum() / (right * right).sum())
        if factor and np.abs(mine - factor * right).max() <= 1e-4 * abs(factor) * scale:
            if abs(factor + 1) < 1e-4:
                return f"{name} has the wrong sign.", f"{name}의 부호가 반대입니다."
            return f"{name} is {factor:.4g} times too large.", f"{name}가 {factor:.4g}배가 되었습니다."
    at = np.unravel_index(int(off.argmax()), off.shape)
    place = f"[{', '.join(map(str, at))}]" if right.ndim else ""
    return (
        f"Not yet: {name}{place} is {mine[at]:.4g}, the engine has {right[at]:.4g}.",
        f"아직 아닙니다. {name}{place}가 {mine[at]:.4g}인데, 엔진의 값은 {right[at]:.4g}입니다.",
    )


def escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
