"""The README's Python runs as it stands there, and its layout names files that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_python_block_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_files_and_tests_that_the_readme_names_exist():
    headings = {"#" + heading.lower().replace(" ", "-") for heading in re.findall(r"^##+ (.*)", README, re.M)}
    for link in re.findall(r"\]\(([^)]+)\)", README):
        assert link in headings or (ROOT / link).exists(), link
    named = re.findall(r"`pytest ([\w/. ]+?)(?: -k \"?(\w+)\"?)?`", README)
    assert len(named) >= 8
    for paths, keyword in named:
        for path in paths.split():
            files = [*(ROOT / path).glob("*.py")] or [ROOT / path]
            assert any(keyword in file.read_text(encoding="utf-8") for file in files), (path, keyword)
