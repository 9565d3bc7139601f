"""What one server of the cluster does for all of them, while it holds the lease."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

from sqlmodel import col, select

from gpustack.errors import GPUStackError, LeaseLost, Unavailable
from gpustack.lib.secrets import Secret
from gpustack.lib.tasks import forever, in_own_task
from gpustack.schemas import wire
from gpustack.server import load
from gpustack.server.controllers import placement, runner, workers
from gpustack.server.controllers.models import Models
from gpustack.server.controllers.placement import Placements
from gpustack.server.controllers.profiles import Profiles
from gpustack.server.controllers.queue import WorkQueue
from gpustack.server.controllers.reach import AT_ONCE, Reach
from gpustack.server.controllers.workers import Patience
from gpustack.server.controllers.world import World
from gpustack.server.db import tables
from gpustack.server.db.database import Database
from gpustack.server.db.history import prune
from gpustack.server.db.leases import RENEW_EVERY_S, Leases, leading
from gpustack.server.heartbeats import Heartbeats

logger = logging.getLogger(__name__)

RELIST_S = 180.0
#: A server that leaves tries for this long to let others lead at once.
GIVE_BACK_S = 1.0


class Queues:
    """Which controllers look at what when an object changes."""

    def __init__(self) -> None:
        self.models, self.profiles = WorkQueue[int](), WorkQueue[int]()
        self.placement = WorkQueue[int]()
        self.workers = WorkQueue[int]()
        self.reach = WorkQueue[int]()

    def hint(self, kind: str, row_id: int) -> None:
        if kind == wire.MODELS:
            self.models.add(row_id)
            self.profiles.add(row_id)
        elif kind == wire.WORKERS:
            self.workers.add(workers.ALL)
            self.reach.add(row_id)
        if kind not in {wire.CREDENTIALS, wire.API_KEYS}:
            self.placement.add(placement.ALL)

    async def relist(self, db: Database) -> None:
        """Look at everything: what a hint was lost for is seen here."""
        for kind in (wire.MODELS, wire.WORKERS):
            async with db.read() as session:
                ids = (await session.exec(select(col(tables.WATCHED[kind].id)))).all()
            for row_id in ids:
                self.hint(kind, row_id or 0)


class Control:
    """The controllers. A term begins with a look at everything and remembers nothing of others.

    Args:
        token: for Hugging Face.
        patience: with silent workers; may change.
    """

    def __init__(
        self, db: Database, heartbeats: Heartbeats, token: Secret | None, patience: Patience
    ) -> None:
        self._db = db
        self._heartbeats = heartbeats
        self._token = token
        self._patience = patience
        self._queues: Queues | None = None

    def hint(self, kind: str, row_id: int) -> None:
        """Something has changed; another's business while another leads."""
        if self._queues is not None:
            self._queues.hint(kind, row_id)

    async def run(self) -> None:
        """One term: control until cancelled.

        Raises:
            ExceptionGroup: of LeaseLost, from whatever wrote first when another server led.
        """
        db, world = self._db, World()
        self._queues = queues = Queues()
        controllers = (
            ("models", Models(db, world), queues.models),
            ("profiles", Profiles(db, self._token), queues.profiles),
            ("placement", Placements(db, world), queues.placement),
            ("workers", workers.Workers(db, self._heartbeats, self._patience), queues.workers),
        )
        try:
            async with asyncio.TaskGroup() as group:
                for name, controller, queue in controllers:
                    group.create_task(runner.run(name, controller, queue))
                reach = Reach(db)
                group.create_task(runner.run("reach", reach, queues.reach, workers=AT_ONCE))
                for name, step, every_s in (
                    ("relist", lambda: queues.relist(db), RELIST_S),
                    ("history", lambda: _in_term(prune(db)), RELIST_S),
                    ("load", lambda: _in_term(load.sample(db)), load.SAMPLE_EVERY_S),
                ):
                    group.create_task(forever(name, step, every_s=every_s))
        finally:
            self._queues = None


async def _in_term(step: Awaitable[None]) -> None:
    with suppress(LeaseLost):  # whoever renews the lease says so
        await step


async def lead(
    leases: Leases, work: Callable[[], Awaitable[None]], *, renew_every_s: float = RENEW_EVERY_S
) -> None:
    """Do `work` whenever this server holds the lease, for ever.

    It is cancelled once the lease is lost, or could not be renewed in its time. A server that has
    its database for itself leads without one.
    """
    if not leases.is_shared:
        await work()
    first = True
    while True:
        token = await _taken(leases, from_myself=first, every_s=renew_every_s)
        first = False
        try:
            await in_own_task(_term(leases, token, work, renew_every_s))
        except* LeaseLost as lost:
            logger.warning("term %d of this server has ended: %s", token, _first(lost))


async def _taken(leases: Leases, *, from_myself: bool, every_s: float) -> int:
    while True:
        with suppress(Unavailable):  # Contended: others want it too. Away: the database said so.
            if (token := await leases.take(from_myself=from_myself)) is not None:
                return token
        await asyncio.sleep(every_s)


async def _term(
    leases: Leases, token: int, work: Callable[[], Awaitable[None]], renew_every_s: float
) -> None:
    logger.info("this server leads, term %d", token)
    try:
        async with asyncio.TaskGroup() as group:
            with leading(token):
                group.create_task(_awaited(work))
            group.create_task(_renew(leases, token, renew_every_s))
    finally:
        await _give_back(leases, token)


async def _awaited(work: Callable[[], Awaitable[None]]) -> None:
    await work()


async def _renew(leases: Leases, token: int, every_s: float) -> None:
    loop = asyncio.get_running_loop()
    ends = loop.time() + leases.lasts_s
    while True:
        await asyncio.sleep(every_s)
        began = loop.time()
        try:
            async with asyncio.timeout_at(ends):
                await leases.renew(token)
            ends = began + leases.lasts_s
        except Unavailable:
            continue  # until its end
        except TimeoutError:
            raise LeaseLost(f"the lease could not be renewed for {leases.lasts_s:g} s") from None


async def _give_back(leases: Leases, token: int) -> None:
    with suppress(TimeoutError, GPUStackError):
        async with asyncio.timeout(GIVE_BACK_S):
            await leases.give_back(token)


def _first(group: BaseExceptionGroup[LeaseLost]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
