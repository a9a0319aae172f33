"""For pytest: `pytest -p tinygrad_bn.testing.plugin --tinygrad-ops FILE` checks every op that a file declares.

Each op is a test of its own; the argument `FILE::check_op[NAME]` selects it. The option may be given several times.
Other tests run only if the command line names them.
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
    """Collect the files of the option, and nothing else but what the command line names."""
    config = session.config
    named = config.args if config.args_source is config.ArgsSource.ARGS else []
    if files := _files(config):
        in_part = [Path(argument.partition("::")[0]).resolve() for argument in named]  # as FILE::check_op[NAME]
        config.args[:] = [*(str(file) for file in files if file not in in_part), *named]


def _files(config: pytest.Config) -> list[Path]:
    return [Path(file).resolve() for file in config.getoption("--tinygrad-ops")]


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> Any:
    """The ops of a file that the option names."""
    return OpFile.from_parent(parent, path=file_path) if file_path.resolve() in _files(parent.config) else None


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> Any:
    """Of such a file the ops only, not its functions `test_…`."""
    return NoTests.from_parent(parent, path=module_path) if module_path.resolve() in _files(parent.config) else None


class NoTests(pytest.Module):
    """A module whose tests are left out."""

    def collect(self) -> list[Any]:
        return []


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
