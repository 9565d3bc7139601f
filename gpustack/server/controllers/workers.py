"""Who is still there: heartbeats, and the silence of those that send none."""

from datetime import UTC, datetime, timedelta

from sqlalchemy import update
from sqlmodel import col, select

from gpustack.schemas.workers import WorkerStatus
from gpustack.server.db.database import Database, WriteSession, touch
from gpustack.server.db.tables import Instance, Worker, now

SILENT_AFTER_S = 60.0
HEARTBEAT_WRITE_S = 10.0


class Heartbeats:
    """When each worker was last heard of, by this server's clock; in memory, written in groups."""

    def __init__(self) -> None:
        self._heard: dict[int, datetime] = {}
        self._unwritten: set[int] = set()

    def heard(self, worker_id: int) -> None:
        self._heard[worker_id] = datetime.now(UTC)
        self._unwritten.add(worker_id)

    def last(self, worker_id: int) -> datetime | None:
        return self._heard.get(worker_id)

    @staticmethod
    async def measured(session: WriteSession, worker_id: int, status: WorkerStatus) -> None:
        """Keep what a worker measured. It is no change either."""
        await session.exec(
            update(Worker)
            .where(col(Worker.id) == worker_id)
            .values(cpu_percent=status.cpu_percent, memory_used_bytes=status.memory_used_bytes)
        )

    async def write(self, db: Database) -> None:
        """One statement for all. A heartbeat is no change: it takes no revision."""
        ids, self._unwritten = self._unwritten, set()
        if ids:
            async with db.write() as session:
                await session.exec(
                    update(Worker).where(col(Worker.id).in_(ids)).values(heartbeat_at=now())
                )


class Workers:
    """Marks the silent and the returned.

    Silence counts from the later of the last heartbeat and the moment this server began to look:
    a server that was away must not blame its workers for it.
    """

    def __init__(
        self, db: Database, heartbeats: Heartbeats, *, silent_after_s: float = SILENT_AFTER_S
    ) -> None:
        self._db = db
        self._heartbeats = heartbeats
        self._began = datetime.now(UTC)
        self._limit = timedelta(seconds=silent_after_s)

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
            worker.silent = silent
            # The state that users see of its instances depends on it.
            for row in await session.exec(select(Instance).where(Instance.worker_id == worker_id)):
                touch(session, row)
