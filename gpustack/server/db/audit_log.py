"""The audit log: a chain of entries, each tied to the one before by its hash.

An entry's hash covers all that the entry says and the hash before it: whoever changes, removes or
adds one has to write every later one anew, and the last hash is then another than anybody noted.
"""

import hashlib
import json
import logging
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import Any, Final

from sqlalchemy import delete
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from gpustack.schemas.audit import Audited, AuditProblem
from gpustack.server.db.acting import Actor
from gpustack.server.db.audited import Entry
from gpustack.server.db.tables import AuditChain, AuditEntry

logger = logging.getLogger(__name__)

#: Read at a time: what a server does meanwhile waits for no more of them.
_CHUNK: Final = 200


#: What an update is remarked with that named no generation.
LAST_WRITER_WINS: Final = "it named no generation to compare with"


def add(session: AsyncSession, entry: Entry) -> None:
    """Have the transaction keep a change that is none of the database."""
    session.info.setdefault("audit", []).append(entry)


def remark(session: AsyncSession, text: str) -> None:
    """Have every entry that comes of the transaction say this as well."""
    session.info["audit_remark"] = text


async def append(session: AsyncSession, who: Actor, made: Sequence[Entry]) -> None:
    """Write entries to the end of the chain.

    The chain's row is locked until the commit: several servers make one chain.
    """
    chain = (await session.exec(select(AuditChain).with_for_update())).one()
    for entry in made:
        row = AuditEntry(
            id=chain.last_id + 1,
            user_id=who.user_id,
            username=who.name,
            credential_kind=who.credential_kind,
            credential_name=who.credential_name[:255],
            peer=who.peer[:255],
            action=entry.action,
            kind=entry.kind,
            object_id=entry.object_id,
            name=entry.name[:255],
            changed=_canonical(entry.changed()),
            remark=session.info.get("audit_remark", ""),
            previous=chain.last_hash,
            hash="",
        )
        row.hash = hash_of(row)
        session.add(row)
        chain.last_id, chain.last_hash = row.id, row.hash


def hash_of(row: AuditEntry) -> str:
    """SHA-256 of all that the row says but its hash, hex.

    Columns without a value are left out, so that one that is added later changes no old hash.
    """
    content = row.model_dump(exclude={"hash"}, exclude_none=True)
    content["at"] = row.at.isoformat(timespec="microseconds")
    return hashlib.sha256(_canonical(content).encode()).hexdigest()


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


async def verify(session: AsyncSession) -> Audited:
    """Check every entry that is kept against its hash and the one before it.

    The first and the last must be those that the chain's own row names.
    """
    chain = (await session.exec(select(AuditChain))).one_or_none()
    if chain is None:
        why = "the row that names the log's first and last entry is missing"
        return Audited(entries=0, problem=AuditProblem(id=0, why=why))
    last_id, last_hash = chain.pruned_id, chain.pruned_hash
    entries = 0
    problem = None
    async for row in _rows(session):
        if (problem := _problem(row, last_id, last_hash)) is not None:
            break
        last_id, last_hash, entries = row.id, row.hash, entries + 1
    if problem is None and (last_id, last_hash) != (chain.last_id, chain.last_hash):
        missing = chain.last_id > last_id
        problem = AuditProblem(
            id=last_id + missing,
            why="it is missing" if missing else "it is not the last that was written",
        )
    return Audited(
        entries=entries,
        first_id=chain.pruned_id + 1 if entries else None,
        last_id=last_id if entries else None,
        hash=last_hash if entries else "",
        problem=problem,
    )


def _problem(row: AuditEntry, last_id: int, last_hash: str) -> AuditProblem | None:
    if row.id > last_id + 1:
        return AuditProblem(id=last_id + 1, why="it is missing")
    if row.id <= last_id:
        return AuditProblem(id=row.id, why="it should have been pruned")
    if row.previous != last_hash:
        return AuditProblem(id=row.id, why="it does not follow the one before it")
    if row.hash != hash_of(row):
        return AuditProblem(id=row.id, why="it does not say what was written")
    return None


async def _rows(session: AsyncSession) -> AsyncIterator[AuditEntry]:
    """All of them, in order, a part at a time."""
    query = select(AuditEntry).order_by(col(AuditEntry.id)).limit(_CHUNK)
    after: int | None = None
    while True:
        part = query if after is None else query.where(col(AuditEntry.id) > after)
        rows = (await session.exec(part)).all()
        for row in rows:
            yield row
            after = row.id
            session.expunge(row)
        if len(rows) < _CHUNK:
            return


async def prune(session: AsyncSession, before: datetime, keep: int) -> None:
    """Remove entries older than `before`, and the oldest beyond `keep`; a part at a time.

    The chain's row keeps the hash that the oldest entry left follows. Nothing is removed from an
    entry on that is not as it was written.
    """
    chain = (await session.exec(select(AuditChain).with_for_update())).one()
    oldest = select(AuditEntry).order_by(col(AuditEntry.id)).limit(_CHUNK)
    for row in (await session.exec(oldest)).all():
        if row.at >= before and row.id > chain.last_id - keep:
            break
        if (problem := _problem(row, chain.pruned_id, chain.pruned_hash)) is not None:
            logger.error("audit log: entry %d: %s; it is not pruned", problem.id, problem.why)
            break
        chain.pruned_id, chain.pruned_hash = row.id, row.hash
    await session.exec(delete(AuditEntry).where(col(AuditEntry.id) <= chain.pruned_id))
