"""The history of changes is bounded, and what has expired is removed."""

from datetime import UTC, datetime

from sqlalchemy import delete
from sqlmodel import col, select

from gpustack.server.db.database import Database, current_revision
from gpustack.server.db.tables import Change, Credential

#: A watch that was away for longer starts with a full list.
KEPT_REVISIONS = 100_000


async def prune(db: Database) -> None:
    """Forget changes beyond the bound, and credentials that expired."""
    async with db.write() as session:
        oldest = await current_revision(session) - KEPT_REVISIONS
        await session.exec(delete(Change).where(col(Change.revision) <= oldest))
        now = datetime.now(UTC)
        expired = select(Credential).where(col(Credential.expires_at) < now)
        for row in (await session.exec(expired)).all():
            await session.delete(row)
