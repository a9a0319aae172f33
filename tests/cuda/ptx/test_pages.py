"""Generated pages are up to date."""

import re
from pathlib import Path

from tests.cuda.ptx.compile import require_compiler
from tests.cuda.ptx.programs import programs
from tests.cuda.ptx.table import reported

PAGES = Path(__file__).parents[3] / "kernels"


def without_compilers_choices(page: str) -> str:
    """The page without line numbers and registers of PTX, which differ between compilers."""
    return re.sub(r"line \d+|%\w+", "…", page)


def test_the_page_for_learners_is_what_the_lesson_prints():
    require_compiler()
    from tests.cuda.ptx.lesson import page

    assert without_compilers_choices((PAGES / "block_reduction.md").read_text()) == without_compilers_choices(page())


def test_the_table_has_every_program():
    """Names only: registers depend on the compiler. `python -m tests.cuda.ptx.table` prints the table."""
    require_compiler()
    names = re.findall(r"^\| `([\w.]+)` \|", (PAGES / "cuda_programs.md").read_text(), re.M)
    assert sorted(names) == sorted(programs())


def test_the_table_says_what_the_report_launches():
    require_compiler()
    names = re.findall(r"^\| `([\w.]+)` \|.*\| yes \|$", (PAGES / "cuda_programs.md").read_text(), re.M)
    assert sorted(names) == sorted(reported())
