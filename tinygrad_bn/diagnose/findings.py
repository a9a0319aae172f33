"""What `lint` finds: a list that prints itself as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or useless, in a model."""

    kind: str  # a short name, the same for all findings of its sort
    where: str  # the path of a module and its type
    what: str  # what is the case, with its numbers
    cure: str  # what to do


class Findings(list[Finding]):
    """A list of findings, in the order of the model."""

    @property
    def kinds(self) -> set[str]:
        """The kinds that were found."""
        return {finding.kind for finding in self}

    def __rich__(self) -> Table | str:
        """For `rich.print`: a row for each finding; findings that differ only in the place share one."""
        from rich.table import Table

        if not self:
            return "nothing found"
        table = Table("where", "what", "cure", show_lines=True)
        rows: dict[tuple[str, str], list[str]] = {}
        for finding in self:
            rows.setdefault((finding.what, finding.cure), []).append(finding.where)
        for (what, cure), places in rows.items():
            table.add_row("\n".join(places), what, cure)
        return table
