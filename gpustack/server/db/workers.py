"""What a worker says of itself, its silence, and all that shows either."""

import logging
from datetime import datetime
from typing import Any

from sqlalchemy import update
from sqlmodel import col, select

from gpustack.schemas.workers import ProxyMode, Scheduling
from gpustack.server.db.clock import clock
from gpustack.server.db.database import WriteSession, get, touch
from gpustack.server.db.instances import lacking_parts, on_worker
from gpustack.server.db.tables import Instance, Model, Worker

logger = logging.getLogger(__name__)


def by_tunnel(worker: Worker) -> bool:
    """Whether requests get to the worker through tunnels that its relay opens."""
    return worker.proxy_mode == ProxyMode.TUNNEL or bool(worker.unreached)


async def is_back(session: WriteSession, worker: Worker, said: dict[str, Any]) -> None:
    """The worker registers again, and says this of itself."""
    if worker.ip != said["ip"]:
        for instance in await on_worker(session, worker.key()[1]):
            touch(session, instance)
    if worker.certificate and not said["certificate"]:
        # Whoever stands between could else have all that goes there sent in clear.
        logger.warning("worker %s registers without its certificate: it is kept", worker.name)
        said = said | {"certificate": worker.certificate}
    worker.sqlmodel_update(said)
    await is_heard(session, worker)


async def is_heard(session: WriteSession, worker: Worker) -> None:
    """The worker has just said something, which every server knows from now on."""
    its = update(Worker).where(col(Worker.id) == worker.key()[1])
    await session.exec(
        # It has not changed for that.
        its.values(heartbeat_at=clock(), updated_at=col(Worker.updated_at)).execution_options(
            synchronize_session=False
        )
    )
    await set_silent(session, worker, silent=False)


async def is_found(session: WriteSession, instance: Instance) -> None:
    """Its own worker says how a lost instance is; where another part is lost, it stays so."""
    await is_heard(session, await get(session, Worker, instance.worker_id or 0))
    instance.lost = bool(await lacking_parts(session, [instance.key()[1]]))


async def set_silent(
    session: WriteSession,
    worker: Worker,
    *,
    silent: bool,
    lost: bool = False,
    grace_ends_at: datetime | None = None,
) -> None:
    """Say whether the worker is silent; watchers of its instances and their models hear of it.

    Args:
        lost: it is, and has been for longer than the grace period. What is on it is lost then,
            until somebody says otherwise of it.
        grace_ends_at: of one that is silent and not lost.
    """
    if worker.grace_ends_at != grace_ends_at:
        worker.grace_ends_at = grace_ends_at
    elif (worker.silent, worker.lost) == (silent, lost):
        return
    worker.silent, worker.lost = silent, lost
    for instance in await on_worker(session, worker.key()[1]):
        instance.lost = instance.lost or lost
        touch(session, instance)
    await _touch_models(session, worker)


async def turn_drain(session: WriteSession, worker: Worker, to: Scheduling) -> None:
    """Have the models of what is on the worker looked at, if that is to leave, or no longer."""
    if Scheduling.DRAINING in {worker.scheduling, to}:
        await _touch_models(session, worker)


async def _touch_models(session: WriteSession, worker: Worker) -> None:
    on_it = await on_worker(session, worker.key()[1])
    its_models = select(Model).where(col(Model.id).in_({one.model_id for one in on_it}))
    for model in (await session.exec(its_models)).all():
        touch(session, model)
