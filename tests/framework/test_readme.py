"""The README's Python runs as it stands there, and its pages link to files and headings that exist."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tinygrad_bn.tensor import OPS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)
PAGES = [*ROOT.glob("*.md"), *(page for part in ("demos", "kernels", "tests") for page in (ROOT / part).rglob("*.md"))]
PAGES = [page.relative_to(ROOT).as_posix() for page in PAGES]


@pytest.fixture(autouse=True)
def registry():
    """Ops that a page declares are forgotten after its test."""
    before = set(OPS)
    yield
    for name in OPS.keys() - before:
        del OPS[name]


def test_every_python_block_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # one writes a page
    assert len(BLOCKS) == 10
    for block in BLOCKS:
        if "onnx.load" in block and not find_spec("onnx"):
            continue  # tests/peers/test_onnx.py does what it shows
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.compiled
def test_the_guides_of_contributing_work_as_they_stand():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 6
    for block in blocks[1:]:
        exec(compile(blocks[0] + block, "CONTRIBUTING.md", "exec"), {"__name__": "guide"})


def test_the_program_that_is_listed_is_the_one_of_its_step(capsys):
    block = next(block for block in BLOCKS if "@capture" in block)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert f"{block}```\n\n```text\n{capsys.readouterr().out}```" in README


def test_the_derivation_comes_first_and_has_15_lines_and_the_result_that_it_names():
    imports, derivation = BLOCKS[0].rstrip().split("\n\n")
    assert README.index(BLOCKS[0]) < README.index("\n## ")
    assert len(derivation.splitlines()) == 15
    names: dict = {}
    exec(f"{imports}\n{derivation}", names)
    shown = [float(number) for number in derivation.splitlines()[-1].split("# ")[1].replace("−", "-").split(", ")]
    assert names["dx"].ravel().round(4).tolist() == shown


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return "#" + re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_of_every_page_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert f"#{anchor}" in map(slug, re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.M)), link


def test_tests_that_the_readme_names_exist():
    named = re.findall(r"`pytest ([\w/. ]+?)(?: -k \"?(\w+)\"?)?`", README)
    assert len(named) >= 8
    for paths, keyword in named:
        for path in paths.split():
            files = [*(ROOT / path).glob("*.py")] or [ROOT / path]
            assert any(keyword in file.read_text(encoding="utf-8") for file in files), (path, keyword)
