"""The page for learners shows what its kernels do now."""

import re
from pathlib import Path

from tests.ptx.compile import need_compiler

PAGE = Path(__file__).parents[2] / "kernels" / "block_reduction.md"


def without_compilers_choices(page: str) -> str:
    """The page without the lines and registers of PTX, which differ between compilers."""
    return re.sub(r"line \d+|%\w+", "…", page)


def test_the_page_is_what_the_lesson_prints():
    need_compiler()
    from tests.ptx.lesson import page

    assert without_compilers_choices(PAGE.read_text()) == without_compilers_choices(page())
