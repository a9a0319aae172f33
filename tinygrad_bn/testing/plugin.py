"""For pytest: `pytest -p tinygrad_bn.testing.plugin --tinygrad-ops FILE` checks every op that a file declares.

Each op is a test of its own, `FILE::check_op[NAME]`. The option may be given several times.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tinygrad_bn.testing.check import check_op
from tinygrad_bn.testing.files import ops_of


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.getgroup("tinygrad_bn").addoption(
        "--tinygrad-ops", action="append", default=[], metavar="FILE", help="check every op that this file declares"
    )


def pytest_collection(session: pytest.Session) -> None:
    """Let pytest collect the files too."""
    files = [str(Path(file).resolve()) for file in session.config.getoption("--tinygrad-ops")]
    session.config.args[:] = (
        [*files, *(a for a in session.config.args if a not in files)] if files else (session.config.args)
    )


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> Any:
    """The ops of a file that the option names."""
    if str(file_path.resolve()) in [str(Path(f).resolve()) for f in parent.config.getoption("--tinygrad-ops")]:
        return OpFile.from_parent(parent, path=file_path)
    return None


class OpFile(pytest.File):
    """A file that declares ops."""

    def collect(self) -> Iterator[pytest.Item]:
        for name in ops_of(self.path):
            yield OpItem.from_parent(self, name=f"check_op[{name}]", op=name)


class OpItem(pytest.Item):
    """The checks of one op."""

    def __init__(self, *, op: str, **options: Any) -> None:
        super().__init__(**options)
        self.op = op

    def runtest(self) -> None:
        self.add_report_section("call", "check_op", str(check_op(self.op)))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> str:
        error = excinfo.value
        return "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, self.name
