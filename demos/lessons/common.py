"""What the lessons share: their two languages, figures in one style, and exercises that the engine checks.

A lesson runs in the browser (`make lessons`), and as a script, which prints its text, without pictures, and the answers
of its exercises: `python demos/lessons/lesson_1_chain_rule.py --lang ko`.
"""

from __future__ import annotations

import inspect
import io
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import marimo as mo
import numpy as np

sys.path.append(str(Path(__file__).parents[2]))  # a lesson started as a script finds the demos

from demos.output import replace_unknown_letters
from tinygrad_bn import Tensor
from tinygrad_bn.train.interval import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logging.getLogger("marimo").setLevel(logging.ERROR)  # it warns of the lessons' titles, and uses them all the same
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

    def next(self, lesson: str, english: str, korean: str) -> Any:
        """A link to the next lesson, in the chosen language."""
        if is_script():
            return None
        title = self.pick(f"Next: {english}", f"다음: {lesson[7]}. {korean}")
        return mo.md(f"[{title} →](?file={lesson}.py&lang={self.language})")

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
        kind: Literal["neutral", "warn", "success"]
        if editor.value == editor.waits_with:
            kind, result = "neutral", self.pick("Write your answer above. It is checked as you type.",
                                                "위에 답을 적어 보세요. 적는 대로 채점합니다.")  # fmt: skip
        elif wrong := verdict(editor.value, names, check):
            kind, result = "warn", self.pick(*wrong)
        else:
            kind, result = "success", self.pick("✓ The engine agrees.", "✓ 엔진의 값과 같습니다.")
        message = mo.Html(f'<div class="verdict" role="status">{escaped(result)}</div>')
        answer = self.pick("One way to do it", "풀이 보기")
        named = mo.Html(f'<div role="group" aria-label="{self.pick("answer", "답")}">{mo.as_html(editor).text}</div>')
        return mo.vstack([
            mo.md(question),
            named,
            mo.callout(message, kind=kind),
            mo.accordion({answer: mo.md(f"```python\n{solution.strip()}\n```")}),
        ])  # fmt: skip


def written_out(*words: str, end: str = "\n") -> None:
    """`print`, in any encoding."""
    replace_unknown_letters()
    print(*words, end=end)


def shown(text: str) -> Any:
    """Markdown in the browser; a script prints it."""
    if is_script():
        written_out(re.sub(r"</?\w[^>]*>", "", text), end="\n\n")
    return mo.md(text)


def folded(title: str, text: str) -> Any:
    """Text under a title that opens it."""
    if is_script():
        return shown(f"{title}\n\n{text}")
    return mo.accordion({title: mo.md(text)})


def inline(name: str, value: Any, spec: str | None) -> str:
    """A value inside a text. In the browser a number carries its name, so that a test can read it back."""
    if hasattr(value, "_mime_"):
        return f"({value.value})" if is_script() else str(mo.as_html(value).text)
    if isinstance(value, str):
        return value
    return f'<span class="number" data-name="{name}">{written(value, spec or ".4g")}</span>'


def written(value: Any, spec: str = ".4g") -> str:
    """A number or a small array as text."""
    if isinstance(value, str):
        return value
    if isinstance(value, Interval):
        return typeset(str(value))
    if np.ndim(value):
        return "[" + ", ".join(written(v, spec) for v in np.asarray(value)) + "]"
    return typeset(format(value.item() if hasattr(value, "item") else value, spec))


def typeset(number: str) -> str:
    """Python's -1e-05 as −1·10⁻⁵."""
    powers = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    number = re.sub(r"e([+-]\d+)", lambda m: f"·10{str(int(m[1])).translate(powers)}", number)
    return number.replace("-", "−")


def table(rows: Mapping[str, Any], head: tuple[str, ...] = (), spec: str = ".4f") -> Any:
    """A table with one row for each name: its values side by side. In the browser a cell carries its name."""
    lines, width = [], max(np.size(values) for values in rows.values())
    for name, values in rows.items():
        cells = [v if isinstance(v, str) else written(v, spec) for v in np.ravel(np.asarray(values, object))]
        tagged = [
            f'<td class="{"rule" if "=" in cell else "value"}" data-name="{name}[{i}]">{escaped(cell)}</td>'
            for i, cell in enumerate(cells)
        ]
        lines.append((name, cells, f"<tr><th scope='row'>{escaped(name)}</th>{''.join(tagged)}</tr>"))
    if is_script():
        for line in (("", list(head[1:]), ""), *lines):
            written_out(f"{line[0]:24}", *(f"{cell!s:>12}" for cell in line[1]))
        written_out()
    columns = head or ("", *map(str, range(1, width + 1)))
    heads = "".join(f"<th scope='col'>{escaped(h)}</th>" if h else "<td></td>" for h in columns)
    body = "".join(line[2] for line in lines)
    return mo.Html(
        f'<div class="table" role="region" tabindex="0" aria-label="{escaped(", ".join(rows))}"'
        f'><table class="numbers"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def picture(figure: Figure, alternative: str) -> Any:
    """A figure drawn into the page: its text is the page's text, so it has Korean, and is light or dark with it."""
    import matplotlib as mpl

    file = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Matplotlib's own font has no Korean; the browser's has
        figure.savefig(file, format="svg", transparent=True)
    drawing = re.search(r"<svg.*</svg>", file.getvalue(), re.S)[0]  # type: ignore[index]
    for found, instead in (
        (r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", ""),
        (r"<g id=\"[^\"]*\"", "<g"),  # the names are the same in every figure
        (r"#000000", "currentColor"),
        (r"(font: [\d.]+px)[^;\"]*", r"\1 inherit"),
        (r"<svg[^>]*?(viewBox=\"[^\"]*\")[^>]*>", rf"""<svg \1 class="picture" role="img"
         style="max-width: {figure.get_figwidth():.1f}in" aria-label="{escaped(alternative)}">"""),
    ):  # fmt: skip
        drawing = re.sub(found, instead, drawing, flags=re.S)
    return mo.Html(drawing)


def editor(code: str, *, checked: bool = False) -> Any:
    """Where the learner writes Python. `checked` code gets a verdict before the learner has changed it."""
    code = code.strip() + "\n"
    made = mo.ui.code_editor(code, language="python", min_height=90)
    made.waits_with = None if checked else code
    return made


def verdict(code: str, names: Mapping[str, Any], check: Check) -> tuple[str, str] | None:
    """Run the learner's code: what is wrong with it, in both languages, or None."""
    variables = {"__name__": "answer", **names}
    try:
        exec(compile(code, "<answer>", "exec"), variables)  # under this name the engine lets an op be declared again
        return check(variables)
    except (Exception, SystemExit) as error:
        frames = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == "<answer>"]
        line = error.lineno if isinstance(error, SyntaxError) else frames[-1] if frames else None
        text = f"{type(error).__name__}: {error.msg if isinstance(error, SyntaxError) else error}"
        english, korean = (f"Line {line} stopped", f"{line}번째 줄에서") if line else ("This stopped", "실행하다")
        return f"{english} with {text}", f"{korean} 멈췄습니다. {text}"


def expects(**right: Any) -> Check:
    """A check of the learner's variables against the engine's values."""

    def check(variables: dict[str, Any]) -> tuple[str, str] | None:
        if wrong := missing(variables, *right):
            return wrong
        return next((w for name, value in right.items() if (w := difference(name, variables[name], value))), None)

    return check


def missing(variables: Mapping[str, Any], *names: str) -> tuple[str, str] | None:
    """The first of the names that the learner's code does not define, or leaves at None or `...`."""
    for name in names:
        if variables.get(name) is None or variables[name] is ...:
            return f"Give {name} a value.", f"{name}에 값을 넣어 보세요."
    return None


def no_numbers(name: str, mine: Any) -> tuple[str, str] | None:
    """What an answer is, if it is not a number or an array of numbers."""
    try:
        np.asarray(mine.numpy() if isinstance(mine, Tensor) else mine, float)
    except (TypeError, ValueError):
        return (
            f"{name} has to be a number or an array of numbers; it is a {type(mine).__name__}.",
            f"{name}에는 수나 수의 배열이 있어야 하는데, 지금은 {type(mine).__name__}입니다.",
        )
    return None


def difference(name: str, mine: Any, right: Any) -> tuple[str, str] | None:
    """How an answer differs from the engine's value: its shape, sign, a factor, or where most; None if it agrees."""
    right = np.asarray(right)
    if wrong := no_numbers(name, mine):
        return wrong
    mine = np.asarray(mine.numpy() if isinstance(mine, Tensor) else mine, float)
    if mine.shape != right.shape:
        return (
            f"{name} has the shape {mine.shape}, the engine's has {right.shape}.",
            f"{name}의 모양은 {mine.shape}인데, 엔진의 값은 모양이 {right.shape}입니다.",
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
            if right.ndim or 2 * abs(factor) == round(2 * abs(factor)):  # one number is always a multiple of another
                times = written(factor)
                return (
                    f"{name} is {times} times what it should be.",
                    f"{name}에 {times}배가 곱해져 있습니다. 빠뜨리거나 더 곱한 수가 있는지 보세요.",
                )
    at = np.unravel_index(int(off.argmax()), off.shape)
    place = f"{name}[{', '.join(map(str, at))}]" if right.ndim else name
    return (
        f"Not yet: {place} is {written(mine[at])}, the engine has {written(right[at])}.",
        f"아직 아닙니다. {place}의 값이 {written(mine[at])}인데, 엔진의 값은 {written(right[at])}입니다.",
    )


def escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
