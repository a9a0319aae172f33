"""The lessons as scripts, in both languages: numbers are printed, and the answers of the exercises are right."""

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from tinygrad_bn_kernels import _kernels

from tinygrad_bn.tensor import OPS

pytest.importorskip("marimo", reason="needs pip install 'tinygrad-bn[lessons]'")

FOLDER = Path(__file__).parents[2] / "demos" / "lessons"
LESSONS = sorted(path.stem for path in FOLDER.glob("lesson_*.py"))
WORDS = {"en": ("Exercises", "The engine agrees."), "ko": ("연습 문제", "엔진의 값과 같습니다.")}


@pytest.fixture(autouse=True)
def registries(monkeypatch):
    """Lessons find their own modules, and ops and kernels that they declare are forgotten."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setitem(sys.modules, "common", None)  # undone at the end, so that it does not hide another `common`
    del sys.modules["common"]
    before = set(OPS)
    yield
    for name in OPS.keys() - before:
        del OPS[name]
        _kernels.pop((name, "cpu"), None)


def test_there_are_six_lessons():
    assert [name[7] for name in LESSONS] == list("123456")


@pytest.mark.compiled
@pytest.mark.parametrize("language", WORDS)
@pytest.mark.parametrize("lesson", LESSONS)
def test_a_lesson_runs_as_a_script_and_its_answers_are_right(lesson, language, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [lesson, "--lang", language])
    with np.errstate(all="ignore"):
        runpy.run_path(str(FOLDER / f"{lesson}.py"), run_name="__main__")
    text = capsys.readouterr().out
    _, right = WORDS[language]
    assert text.startswith(f"# {lesson[7]}. ")
    assert text.count(right) == 2
    assert len(text) > 2500
    assert not re.search(r"\[\[|</?span|\bnan\b", text)
    hangul = sum("가" <= letter <= "힣" for letter in text)
    assert (hangul > 800) if language == "ko" else (hangul == 0)


def test_an_exercise_says_how_an_answer_is_wrong():
    from common import expects, verdict

    right = np.array([[1.0, -2.0], [3.0, 0.5]])
    check = expects(dx=right)
    assert verdict("dx = right.copy()", {"right": right}, check) is None
    wrong = {
        "pass": "Give dx a value",
        "dx = -right": "wrong sign",
        "dx = 4 * right": "4 times",
        "dx = None": "Give dx a value",
        "dx = 'right'": "has to be a number or an array of numbers; it is a str",
        "dx = [[1, 2], [3]]": "it is a list",
        "dx = right.T": r"dx\[0, 1\] is 3, the engine has −2",
        "dx = right[0]": r"shape \(2,\), the engine's has \(2, 2\)",
        "x = 1\ndx = right / 'a'": "Line 2 stopped with",
        "dx = (": "Line 1 stopped with SyntaxError",
        "raise SystemExit": "stopped with",
        "dx = np.full((2, 2), np.nan)": "is nan",
    }
    for code, words in wrong.items():
        english, korean = verdict(code, {"right": right, "np": np}, check)
        assert re.search(words, english), code
        assert re.search("[가-힣]", korean)


def test_a_translation_cannot_leave_out_a_number():
    from common import Say

    class Switch:
        value = "English"

    with pytest.raises(ValueError, match="the texts use"):
        Say(Switch())("[[a]] and [[b]]", "[[a]]", a=1, b=2)
    with pytest.raises(ValueError, match="the texts use"):
        Say(Switch())("[[a]]", "[[a]]", a=1, b=2)
