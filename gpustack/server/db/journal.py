"""What a transaction leaves behind of itself: events for everything that happened, audit entries
for what people changed. Both are made of the rows that it changed, whoever changed them.
"""

import hashlib
from collections.abc import Collection, Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import insert, update
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from gpustack.schemas.events import ActorKind
from gpustack.server.db import audit_log, tables
from gpustack.server.db.acting import Actor, actor
from gpustack.server.db.audited import entries
from gpustack.server.db.diffs import Diff, diffs_of
from gpustack.server.db.transitions import Around, Happening, happenings

#: What happens again within this time of the last time is counted, as one event.
AGAIN_WITHIN = timedelta(hours=1)
_MOST_AT_ONCE = 500  # in one IN (…)


async def keep_events(session: AsyncSession) -> None:
    """Add events of what the transaction, which is flushed, did so far."""
    diffs = list(diffs_of(session.sync_session))
    if not diffs:
        return
    around = await _around(session, diffs)
    happened = [one for diff in diffs for one in happenings(diff, around)]
    if happened:
        await _keep(session, actor(), happened)


async def keep_audit(session: AsyncSession) -> None:
    """Add audit entries of what a person changed, as the last thing before the commit.

    Nobody who holds the end of the chain waits for another then.
    """
    who = actor()
    if not who.is_outside:
        return
    diffs = list(diffs_of(session.sync_session))
    specs = await _specs_before(session, diffs)
    made = [*entries(diffs, specs), *session.info.get("audit", ())]
    if made:
        await audit_log.append(session, who, made)


# --- events --------------------------------------------------------------------------------


async def _around(session: AsyncSession, diffs: Sequence[Diff]) -> Around:
    """What else it takes to tell what happened. Most of it is in the session already."""
    placed, flipped, models, renewed = set[int](), set[int](), set[int](), set[int]()
    for diff in diffs:
        match diff.row:
            case tables.Instance(worker_id=int() as worker_id) if (
                diff.gone or diff.made or diff.changed("worker_id")
            ):
                placed.add(worker_id)
            case tables.ModelFile(worker_id=worker_id) if diff.gone or diff.made:
                placed.add(worker_id)
            case tables.Worker(id=int() as worker_id) if diff.changed("silent") and not diff.gone:
                flipped.add(worker_id)
            case tables.ModelVersion(model_id=model_id) if diff.made:
                renewed.add(model_id)
            case tables.ModelVersion(model_id=model_id) if not diff.gone:
                models.add(model_id)
    workers = [await session.get(tables.Worker, key) for key in placed]
    of_versions = [await session.get(tables.Model, key) for key in models]
    return Around(
        workers={row.id or 0: row.name for row in workers if row},
        models={row.id or 0: row for row in of_versions if row},
        renewed=renewed,
        on_worker={key: await _on_worker(session, key) for key in flipped},
        why=session.info.get("why", {}),
    )


async def _on_worker(session: AsyncSession, worker_id: int) -> Sequence[tables.Instance]:
    query = select(tables.Instance).where(
        tables.Instance.worker_id == worker_id, col(tables.Instance.deleting).is_(False)
    )
    return (await session.exec(query.order_by(col(tables.Instance.id)))).all()


async def _keep(session: AsyncSession, who: Actor, happened: Sequence[Happening]) -> None:
    """One event each, or one more of what happened lately. What users do is never the same."""
    at, by_name = tables.now(), await _name(session, who)
    digests = [hashlib.sha256(one.alike().encode()).hexdigest() for one in happened]
    lately = {} if who.kind is ActorKind.USER else await _lately(session, digests, at)
    new = []
    # Not through the unit of work: this is on the way of every change.
    for one, alike in zip(happened, digests, strict=True):
        if alike in lately:
            again = update(tables.Event).where(col(tables.Event.id) == lately[alike])
            await session.exec(
                again.values(count=tables.Event.count + 1, last_at=at, message=one.message)
            )
            continue
        new.append(
            {
                "kind": one.kind,
                "object_id": one.object_id,
                "name": one.name,
                "type": one.type,
                "message": one.message,
                "codes": list(one.codes),
                "by_kind": who.kind,
                "by_name": by_name,
                "alike": alike,
                "count": 1,
                "first_at": at,
                "last_at": at,
            }
        )
    if new:
        await session.exec(insert(tables.Event), params=new)


async def _lately(session: AsyncSession, digests: Sequence[str], at: datetime) -> dict[str, int]:
    """Of what happened a while ago for the last time: the event, by its digest."""
    found: dict[str, int] = {}
    for part in _parts(digests):
        query = select(tables.Event.alike, tables.Event.id).where(
            col(tables.Event.alike).in_(part), tables.Event.last_at > at - AGAIN_WITHIN
        )
        rows = await session.exec(query.order_by(col(tables.Event.last_at)))
        found |= {alike: event_id or 0 for alike, event_id in rows.all()}
    return found


async def _name(session: AsyncSession, who: Actor) -> str:
    if who.worker_id is None:
        return who.name
    query = select(tables.Worker.name).where(tables.Worker.id == who.worker_id)
    return (await session.exec(query)).first() or who.name


def _parts(keys: Sequence[str]) -> Iterator[Collection[str]]:
    return (keys[at : at + _MOST_AT_ONCE] for at in range(0, len(keys), _MOST_AT_ONCE))


# --- the audit log -------------------------------------------------------------------------


async def _specs_before(session: AsyncSession, diffs: Sequence[Diff]) -> dict[int, Any]:
    """By model, of those that got a version: the spec of the version before."""
    version = tables.ModelVersion
    made = [d.row for d in diffs if isinstance(d.row, version) and d.made]
    specs: dict[int, Any] = {}
    for row in made:
        older = select(version.spec).where(
            version.model_id == row.model_id, version.generation < row.generation
        )
        newest = older.order_by(col(version.generation).desc()).limit(1)
        specs[row.model_id] = (await session.exec(newest)).first() or {}
    return specs
