"""What is kept of the past is bounded, and what has expired is removed."""

from datetime import UTC, datetime, timedelta

from sqlalchemy import delete
from sqlmodel import col, select

from gpustack.server.db import audit_log
from gpustack.server.db.database import Database, WriteSession, current_revision
from gpustack.server.db.tables import Change, Credential, Event, SamlMessage

#: A watch that was away for longer starts with a full list.
KEPT_REVISIONS = 100_000


#: Events go when they are older, or when there are more.
KEPT_EVENTS, EVENTS_KEPT_FOR = 100_000, timedelta(days=30)
#: All of them can be checked within ten seconds.
KEPT_AUDIT_ENTRIES, AUDIT_KEPT_FOR = 200_000, timedelta(days=3 * 365)
#: Servers' clocks differ; none may take a message that another has forgotten.
SAML_MESSAGES_KEPT_FOR = timedelta(hours=1)


async def prune(db: Database) -> None:
    """Forget what is beyond the bounds, and credentials that expired."""
    now = datetime.now(UTC)
    async with db.write() as session:
        oldest = await current_revision(session) - KEPT_REVISIONS
        await session.exec(delete(Change).where(col(Change.revision) <= oldest))
        expired = select(Credential).where(col(Credential.expires_at) < now)
        for row in (await session.exec(expired)).all():
            await session.delete(row)
        ended = col(SamlMessage.ends_at) < now - SAML_MESSAGES_KEPT_FOR
        await session.exec(delete(SamlMessage).where(ended))
        await _prune_events(session, now - EVENTS_KEPT_FOR, KEPT_EVENTS)
        await audit_log.prune(session, now - AUDIT_KEPT_FOR, KEPT_AUDIT_ENTRIES)


async def _prune_events(session: WriteSession, before: datetime, keep: int) -> None:
    newest_first = select(Event.last_at).order_by(col(Event.last_at).desc())
    beyond = (await session.exec(newest_first.offset(keep).limit(1))).first()
    oldest = max(before, beyond) if beyond else before
    await session.exec(delete(Event).where(col(Event.last_at) <= oldest))
