"""When each API key was last used: in memory, and written in groups, since no key changes by it."""

from collections.abc import Mapping
from datetime import UTC, datetime

from sqlalchemy import bindparam, or_, update

from gpustack.errors import Unavailable
from gpustack.server.db.database import Database
from gpustack.server.db.tables import Credential


class LastUses:
    """What this server hears of uses: of the API itself, and from gateways, of models."""

    def __init__(self) -> None:
        self._unwritten: dict[int, datetime] = {}

    def used(self, credential_id: int, at: datetime | None = None) -> None:
        """Note a use; `at` is now unless it is said."""
        at = at or datetime.now(UTC)
        if at > self._unwritten.get(credential_id, datetime.min.replace(tzinfo=UTC)):
            self._unwritten[credential_id] = at

    async def write(self, db: Database) -> None:
        """Write what is news. It takes no revision; an older use never replaces a newer one."""
        unwritten, self._unwritten = self._unwritten, {}
        if not unwritten:
            return
        try:
            await _store(db, unwritten)
        except Unavailable:  # then with the next ones
            for credential_id, at in unwritten.items():
                self.used(credential_id, at)


async def _store(db: Database, uses: Mapping[int, datetime]) -> None:
    table = Credential.__table__  # type: ignore[attr-defined]
    older = or_(table.c.last_used_at.is_(None), table.c.last_used_at < bindparam("at"))
    statement = (
        update(table)
        .where(table.c.id == bindparam("of"), older)
        .values(last_used_at=bindparam("at"))
    )
    rows = [{"of": credential_id, "at": uses[credential_id]} for credential_id in sorted(uses)]
    async with db.write() as session:
        await (await session.connection()).execute(statement, rows)
