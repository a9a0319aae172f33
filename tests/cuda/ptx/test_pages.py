"""The pages that are printed by programs show what these print now."""

import re
from pathlib import Path

from tests.cuda.ptx.compile import need_compiler
from tests.cuda.ptx.programs import programs
from tests.cuda.ptx.table import reported

PAGES = Path(__file__).parents[3] / "kernels"


def without_compilers_choices(page: str) -> str:
    """The page without the lines and registers of PTX, which differ between compilers."""
    return re.sub(r"line \d+|%\w+", "…", page)


def test_the_page_for_learners_is_what_the_lesson_prints():
    need_compiler()
    from tests.cuda.ptx.lesson import page

    assert without_compilers_choices((PAGES / "block_reduction.md").read_text()) == without_compilers_choices(page())


def test_the_table_has_every_program():
    """Its numbers are the compiler's, and change with it: `python -m tests.cuda.ptx.table` prints it anew."""
    need_compiler()
    names = re.findall(r"^\| `([\w.]+)` \|", (PAGES / "cuda_programs.md").read_text(), re.M)
    assert sorted(names) == sorted(programs())


def test_the_table_says_what_the_report_launches():
    need_compiler()
    names = re.findall(r"^\| `([\w.]+)` \|.*\| yes \|$", (PAGES / "cuda_programs.md").read_text(), re.M)
    assert sorted(names) == sorted(reported())
