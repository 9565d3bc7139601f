"""How far the drain of a worker is: counted from the rows of what is still on it."""

from collections.abc import Iterable

from sqlmodel import col, select

from gpustack.schemas.instances import InstanceState
from gpustack.schemas.workers import Leaving, Scheduling
from gpustack.server.db.database import ReadSession
from gpustack.server.db.instances import on_worker
from gpustack.server.db.tables import Instance, Model, Worker
from gpustack.server.db.versions import newest_version


async def leaving_of(session: ReadSession, workers: Iterable[Worker]) -> dict[int, list[Leaving]]:
    """What is still on each of those workers that are being drained, by instance."""
    drained = [one for one in workers if one.scheduling == Scheduling.DRAINING]
    return {one.key()[1]: await _leaving(session, one) for one in drained}


async def _leaving(session: ReadSession, worker: Worker) -> list[Leaving]:
    rows = await on_worker(session, worker.key()[1])
    ids = {row.model_id for row in rows}
    found = (await session.exec(select(Model).where(col(Model.id).in_(ids)))).all()
    models = {model.key()[1]: model for model in found}
    troubles = {id: await _trouble(session, model) for id, model in models.items()}
    successors = await _successors(session, ids) if ids else {}
    leaving = []
    for row in rows:
        model = models[row.model_id]
        if row.deleting:
            waits = worker.silent
            said = "it is to end, but its worker is silent" if waits else "it ends its requests"
        elif troubles[row.model_id]:
            waits, said = True, troubles[row.model_id]
        elif successor := successors.get(row.model_id):
            waits, said = False, f"{successor} is to take its place"
        else:
            waits, said = worker.silent, "its worker is silent" if worker.silent else "it is next"
        leaving.append(
            Leaving(
                id=row.key()[1], name=row.name, model_name=model.name, waits=waits, message=said
            )
        )
    return leaving


async def _trouble(session: ReadSession, model: Model) -> str:
    """Why nothing of a model moves; empty: it does."""
    wanted = await newest_version(session, model.key()[1])
    unread = "" if wanted.profile else wanted.problem or "the model's files are being read"
    return model.rollout_message or unread


async def _successors(session: ReadSession, models: Iterable[int]) -> dict[int, str]:
    """Of each model that has one: an instance that does not answer yet, where it may stay."""
    query = (
        select(Instance.model_id, Instance.name)
        .outerjoin(Worker, col(Worker.id) == Instance.worker_id)
        .where(
            col(Instance.model_id).in_(models),
            col(Instance.deleting).is_(False),
            col(Instance.lost).is_(False),
            col(Instance.reported_state).is_distinct_from(InstanceState.RUNNING),
            col(Worker.scheduling).is_distinct_from(Scheduling.DRAINING),
        )
    )
    return dict((await session.exec(query.order_by(col(Instance.id)))).all())
