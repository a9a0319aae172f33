"""The pages of questions and answers: every line runs and prints what stands there, in both languages the same."""

import doctest
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from tinygrad_bn import Tensor
from tinygrad_bn import functional as F

LESSONS = Path(__file__).parents[2] / "demos/lessons"
ENGLISH, KOREAN = ((LESSONS / name).read_text(encoding="utf-8") for name in ("questions.md", "questions.ko.md"))
BLOCK = re.compile(r"```python\n(.*?)```", re.S)
START, *_ = BLOCK.findall(ENGLISH)
ANSWERS = dict(re.findall(r"^### (.*?)\n\n(.*?)(?=\n##|\Z)", ENGLISH, re.S | re.M))


def examples(text: str, name: str) -> doctest.DocTest:
    return doctest.DocTestParser().get_doctest(text, {}, name, "questions.md", 0)


@pytest.fixture
def names():
    """The names that the first block of the page defines."""
    start = examples(START, "the first block")
    assert doctest.DocTestRunner().run(start, clear_globs=False).failed == 0
    return start.globs


@pytest.mark.parametrize("question", ANSWERS)
def test_each_answer_is_a_paragraph_and_lines_that_print_what_stands_there(question, names):
    (block,) = BLOCK.findall(ANSWERS[question])
    paragraph, *rest = ANSWERS[question].split("\n\n```python\n")
    assert "\n\n" not in paragraph
    assert len(rest) == 1
    test = examples(block, question)
    assert any(example.want for example in test.examples)
    assert sum(example.source.count("\n") for example in test.examples) <= 8
    test.globs.update(names)
    report: list[str] = []
    assert doctest.DocTestRunner().run(test, out=report.append).failed == 0, "".join(report)


def test_both_languages_have_the_same_questions_code_and_links():
    assert len(ANSWERS) > 25
    assert BLOCK.findall(KOREAN) == BLOCK.findall(ENGLISH)
    # heading, its level, and a block: in the same order
    outlines = [re.findall(r"^(#+ |```python)", page, re.M) for page in (ENGLISH, KOREAN)]
    assert outlines[0] == outlines[1]
    assert all(re.search("[가-힣]", heading) for heading in re.findall(r"^#+ (.*)", BLOCK.sub("", KOREAN), re.M))
    for page in (ENGLISH, KOREAN):
        for link in re.findall(r"\]\(([^)]+)\)", page):
            assert (LESSONS / link).is_file(), link


def test_demos_that_the_answers_name_exist():
    for page in (ENGLISH, KOREAN):
        named = re.findall(r"`(\w+)`", " ".join(re.findall(r"(?:demos?|데모)\s((?:`\w+`(?:,\s| and )?)+)", page)))
        assert len(named) >= 4
        assert all((LESSONS.parent / f"{name}.py").is_file() for name in named), named


def test_the_picture_shows_the_values_and_gradients_of_the_engine():
    x = Tensor(np.array([[0.0], [2], [3], [4], [6]]), requires_grad=True)
    steps = F.batch_norm_steps(x)
    for step in steps:
        step.retain_grad()
    steps.out.backward([[1.0], [0], [-1], [0], [2]])
    boxes = {g.get("id"): g for g in ET.parse(LESSONS / "batch_norm.svg").iter("{http://www.w3.org/2000/svg}g")}
    assert boxes.keys() == {"x", *steps._fields}
    for name, t in {"x": x, **steps._asdict()}.items():
        for kind, array in (("value", t), ("gradient", t.grad)):
            (text,) = [e.text for e in boxes[name] if e.get("class") == kind]
            shown = [float(number) for number in re.findall(r"-?[\d.]+", text.replace("−", "-"))]
            expected = np.ravel(array) if "for each" not in text else np.unique(np.round(array, 4))
            np.testing.assert_allclose(shown, expected, rtol=0, atol=5e-5)
