"""What a transaction changed: each row as it was found and as it is left."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import inspect
from sqlalchemy.orm import Session as SyncSession


@dataclass(slots=True)
class Diff:
    """One row.

    Attributes:
        old: what columns were before, for those that were written to.
        made, gone: the transaction made the row, deleted it.
    """

    row: Any
    old: dict[str, Any] = field(default_factory=dict)
    made: bool = False
    gone: bool = False

    def was(self, column: str) -> Any:
        return self.old.get(column, getattr(self.row, column))

    def changed(self, *columns: str) -> bool:
        """Whether one of these columns is another now than before. A new row changed nothing."""
        return not self.made and any(self.was(name) != getattr(self.row, name) for name in columns)


def note(session: SyncSession, _: object) -> None:
    """Keep what this flush changes. Listens to `after_flush`: the last moment that rows know it."""
    diffs: dict[int, Diff] = session.info.setdefault("diffs", {})
    for row in session.new:
        _diff(diffs, row).made = True
    for row in session.deleted:
        _diff(diffs, row).gone = True
    for row in session.dirty:
        old = _diff(diffs, row).old
        for column in inspect(row).attrs:
            if column.history.deleted:
                old.setdefault(column.key, column.history.deleted[0])


def _diff(diffs: dict[int, Diff], row: object) -> Diff:
    return diffs.setdefault(id(row), Diff(row))  # the diff keeps the row, so its id stays its own


def diffs_of(session: SyncSession) -> Iterator[Diff]:
    """All that was flushed so far, but for rows that came and went."""
    diffs: dict[int, Diff] = session.info.get("diffs", {})
    return (diff for diff in list(diffs.values()) if not (diff.made and diff.gone))
