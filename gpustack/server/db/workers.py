"""What a worker says of itself, its silence, and all that shows either."""

import logging
from typing import Any

from sqlmodel import col, select

from gpustack.schemas.workers import ProxyMode
from gpustack.server.db.database import WriteSession, touch
from gpustack.server.db.instances import on_worker
from gpustack.server.db.tables import Model, Worker

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
    await set_silent(session, worker, silent=False)


async def set_silent(session: WriteSession, worker: Worker, *, silent: bool) -> None:
    """Say whether the worker is silent; watchers of its instances and their models hear of it."""
    if worker.silent == silent:
        return
    worker.silent = silent
    on_it = await on_worker(session, worker.key()[1])
    for instance in on_it:
        touch(session, instance)
    its_models = select(Model).where(col(Model.id).in_({one.model_id for one in on_it}))
    for model in (await session.exec(its_models)).all():
        touch(session, model)
