"""Where instances are, and how their rows end.

An instance's model is told each time: what it shows depends on it.
"""

from collections.abc import Collection, Sequence

from sqlmodel import col, or_, select

from gpustack.schemas.workers import Scheduling
from gpustack.server.db.database import ReadSession, WriteSession, touch
from gpustack.server.db.tables import Instance, Member, Model, Worker


async def on_worker(session: ReadSession, worker_id: int) -> Sequence[Instance]:
    """The instances that are on a worker, with all or with a part of them."""
    parts = select(Member.instance_id).where(Member.worker_id == worker_id)
    here = or_(Instance.worker_id == worker_id, col(Instance.id).in_(parts))
    return (await session.exec(select(Instance).where(here).order_by(col(Instance.id)))).all()


async def lacking_parts(session: ReadSession, ids: Collection[int]) -> set[int]:
    """Of these instances, those that have a part on a lost worker other than their own."""
    if not ids:
        return set()
    query = (
        select(Member.instance_id)
        .join(Worker, col(Worker.id) == Member.worker_id)
        .join(Instance, col(Instance.id) == Member.instance_id)
        .where(
            col(Member.instance_id).in_(ids),
            col(Worker.lost),
            Member.worker_id != Instance.worker_id,
        )
    )
    return set((await session.exec(query)).all())


def because(session: WriteSession, row: Instance, why: str) -> None:
    """Have the event that this transaction makes of the instance say why."""
    session.info.setdefault("why", {})[row.name] = why


def begin_end(session: WriteSession, row: Instance, model: Model, why: str) -> None:
    """Have the instance's worker stop it. The row goes when the worker says that it is gone."""
    if not row.deleting:
        because(session, row, why)
        row.deleting = True
        row.generation += 1
        touch(session, model)


async def touch_draining(session: WriteSession, ids: Collection[int]) -> None:
    """Tell whoever watches a drain that something happens to these instances on its worker."""
    if not ids:
        return
    wholes = select(Instance.worker_id).where(col(Instance.id).in_(ids))
    parts = select(Member.worker_id).where(col(Member.instance_id).in_(ids))
    has_them = or_(col(Worker.id).in_(wholes), col(Worker.id).in_(parts))
    query = select(Worker).where(Worker.scheduling == Scheduling.DRAINING, has_them)
    for worker in (await session.exec(query.order_by(col(Worker.id)))).all():
        touch(session, worker)


async def remove(session: WriteSession, row: Instance) -> None:
    """Delete the row: nothing of the instance runs any more."""
    touch(session, await session.get_one(Model, row.model_id))
    await touch_draining(session, [row.key()[1]])
    await session.delete(row)
