"""Who is still there, and who has fallen silent."""

from datetime import UTC, datetime, timedelta

from gpustack.server.db.database import Database
from gpustack.server.db.tables import Worker
from gpustack.server.db.workers import set_silent
from gpustack.server.heartbeats import SILENT_AFTER, Heartbeats


class Workers:
    """Marks the silent and the returned.

    Silence counts from the later of the last heartbeat and the moment this server began to look:
    a server that was away must not blame its workers for it.
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
            worker = await session.get(Worker, key)
        if worker is None:
            return None
        heard = self._heartbeats.last(key)
        since = datetime.now(UTC) - (heard or self._began)
        # A server that just began knows nothing: it leaves `silent` as it was until it does.
        silent = since > self._limit if heard or since > self._limit else worker.silent
        if silent != worker.silent:
            await self._mark(key, silent=silent)
        return max((self._limit - since).total_seconds(), 0.0) + 0.1 if not silent else 5.0

    async def _mark(self, worker_id: int, *, silent: bool) -> None:
        async with self._db.write() as session:
            worker = await session.get(Worker, worker_id)
            if worker is None:
                return
            await set_silent(session, worker, silent=silent)
