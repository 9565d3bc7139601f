"""What a worker says of itself, its silence, and all that shows either."""

import logging
from typing import Any

from sqlmodel import col, select

from gpustack.schemas.workers import Scheduling
from gpustack.server.db.database import WriteSession, touch
from gpustack.server.db.instances import on_worker
from gpustack.server.db.tables import Model, Worker

logger = logging.getLogger(__name__)


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
    await set_silent(session, worker, silent=False)


async def set_silent(session: WriteSession, worker: Worker, *, silent: bool) -> None:
    """Say whether the worker is silent; watchers of its instances and their models hear of it."""
    if worker.silent == silent:
        return
    worker.silent = silent
    for instance in await on_worker(session, worker.key()[1]):
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
