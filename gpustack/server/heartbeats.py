"""When each worker was last heard of. Kept in memory, since it is no change of anything."""

from datetime import UTC, datetime, timedelta

from sqlalchemy import update
from sqlmodel import col

from gpustack.schemas.workers import WorkerStatus
from gpustack.server.db.database import Database, WriteSession
from gpustack.server.db.tables import Worker, now

WRITE_EVERY_S = 10.0
SILENT_AFTER = timedelta(seconds=60)


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

    def is_live(self, worker_id: int) -> bool:
        """Whether it was heard of lately, by this server in this life."""
        last = self._heard.get(worker_id)
        return last is not None and datetime.now(UTC) - last < SILENT_AFTER

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
