"""Who is still there, and who has fallen silent."""

from datetime import UTC, datetime, timedelta

from sqlmodel import select

from gpustack.server.db.clock import clock
from gpustack.server.db.database import Database, find
from gpustack.server.db.tables import Worker
from gpustack.server.db.workers import set_silent
from gpustack.server.heartbeats import SILENT_AFTER, Heartbeats

#: The one key of this queue: all workers are looked at together, which costs as much as one.
ALL = 0
#: Until a silent worker is looked at again; and, at least, one whose silence would count.
SILENT_AGAIN_S, SOON_S = 5.0, 1.0


class Workers:
    """Marks the silent and the returned.

    Silence counts from the later of the last heartbeat, to whichever server, and the moment this
    server began to look: servers that were away must not blame their workers for it.
    """

    def __init__(
        self, db: Database, heartbeats: Heartbeats, *, silent_after: timedelta = SILENT_AFTER
    ) -> None:
        self._db = db
        self._heartbeats = heartbeats
        self._began = datetime.now(UTC)
        self._limit = silent_after

    async def reconcile(self, key: int) -> float | None:
        async with self._db.read() as session:
            query = select(Worker.id, Worker.silent, Worker.heartbeat_at)
            workers = (await session.exec(query)).all()
            database_now = (await session.exec(select(clock()))).one()
        again_s = []
        for worker_id, was_silent, heartbeat_at in workers:
            since_written = None if heartbeat_at is None else database_now - heartbeat_at
            silent, due_s = self._judged(worker_id or 0, since_written, was_silent=was_silent)
            if silent != was_silent:
                await self._mark(worker_id or 0, silent=silent)
            again_s.append(due_s)
        return min(again_s, default=None)

    def _judged(
        self, worker_id: int, since_written: timedelta | None, *, was_silent: bool
    ) -> tuple[bool, float]:
        """Whether a worker is silent, and in how many seconds to ask that again.

        Args:
            since_written: since it spoke to any server, as far as that is written.
        """
        now = datetime.now(UTC)
        heard = self._heartbeats.last(worker_id)
        since = [since_written, None if heard is None else now - heard]
        unheard = min((one for one in since if one is not None), default=timedelta.max)
        looking = now - self._began
        # A server that just began knows nothing: it leaves `silent` as it was until it does.
        if unheard > self._limit and (looking > self._limit or was_silent):
            return True, SILENT_AGAIN_S
        left = self._limit - min(unheard, looking)
        return False, max(left.total_seconds(), 0.0) + SOON_S

    async def _mark(self, worker_id: int, *, silent: bool) -> None:
        async with self._db.write() as session:
            worker = await find(session, Worker, worker_id)
            if worker is None:
                return
            await set_silent(session, worker, silent=silent)
