"""Principals that were looked up before: a thousand workers speak many times a second."""

from datetime import UTC, datetime
from typing import Generic, TypeVar

from gpustack.lib.secrets import digest

T = TypeVar("T")

#: More than a large cluster has; beyond it all are looked up anew.
LIMIT = 10_000


class Known(Generic[T]):
    """What secrets stand for, by digest, until any credential or user changes.

    `forget` is called with every commit of this server that changes one, before the change is
    acknowledged; other servers' changes come with the feed.
    """

    def __init__(self) -> None:
        self._found: dict[str, tuple[T, datetime | None]] = {}
        self._changes = 0

    @property
    def mark(self) -> int:
        """To be taken before a look into the database, for `remember`."""
        return self._changes

    def find(self, secret: str) -> T | None:
        entry = self._found.get(digest(secret))
        if entry is None or (entry[1] is not None and entry[1] <= datetime.now(UTC)):
            return None
        return entry[0]

    def remember(self, secret: str, found: T, expires_at: datetime | None, mark: int) -> None:
        """Keep what was found, unless something has changed since `mark`."""
        if mark == self._changes:
            if len(self._found) >= LIMIT:
                self._found.clear()
            self._found[digest(secret)] = (found, expires_at)

    def forget(self) -> None:
        self._changes += 1
        self._found.clear()
