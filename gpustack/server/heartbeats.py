"""When each worker was last heard of, and what it measured: in memory, since nothing changes."""

from collections.abc import Sequence
from datetime import timedelta
from time import monotonic
from typing import Any

from sqlalchemy import bindparam, update
from sqlmodel import col

from gpustack.errors import Unavailable
from gpustack.schemas.workers import WorkerStatus
from gpustack.server.db.clock import clock
from gpustack.server.db.database import Database, WriteSession
from gpustack.server.db.tables import Worker

WRITE_EVERY_S = 10.0
SILENT_AFTER = timedelta(seconds=60)
#: A worker that runs is heard of every 10 s: after this time without, it runs no more.
STOPPED_AFTER = timedelta(seconds=25)


class Heartbeats:
    """What workers say all the time; in memory, written in groups.

    When that was is measured by a clock that nobody can set.

    Attributes:
        runs: the run of each worker that the database is known to have.
        facts: what each worker has, as far as the database is known to have it.
        tunnels: whether requests get to each worker by tunnel, as far as that is known.
        forgotten: counts how often something was: what was read before holds no more.
    """

    def __init__(self) -> None:
        self.runs: dict[int, str] = {}
        self.tunnels: dict[int, bool] = {}
        self.forgotten = 0
        self.facts: dict[int, dict[str, object]] = {}
        self._heard: dict[int, float] = {}
        self._unwritten: dict[int, dict[str, Any]] = {}

    def heard(self, worker_id: int) -> None:
        self._heard[worker_id] = monotonic()
        self._unwritten.setdefault(worker_id, {})

    def measured(self, worker_id: int, status: WorkerStatus) -> None:
        """Keep what a worker measured."""
        self._unwritten[worker_id] = status.measured()

    def unheard(self, worker_id: int) -> timedelta | None:
        """How long it was not heard of by this server; None: never in this life."""
        heard = self._heard.get(worker_id)
        return None if heard is None else timedelta(seconds=monotonic() - heard)

    def is_live(self, worker_id: int, within: timedelta = SILENT_AFTER) -> bool:
        """Whether it was heard of lately, by this server in this life."""
        unheard = self.unheard(worker_id)
        return unheard is not None and unheard < within

    def forget(self, worker_id: int) -> None:
        """The worker's row has changed: what is known of it has to be read again."""
        self.forgotten += 1
        self.runs.pop(worker_id, None)
        self.tunnels.pop(worker_id, None)
        self.facts.pop(worker_id, None)

    async def write(self, db: Database) -> None:
        """One statement for all. None of it is a change: it takes no revision."""
        unwritten, self._unwritten = self._unwritten, {}
        measured = [{"of": key, **values} for key, values in unwritten.items() if values]
        if not unwritten:
            return
        try:
            async with db.write() as session:
                await _store(session, [*unwritten], measured)
        except Unavailable:  # then with the next ones, unless those are newer
            for worker_id, values in unwritten.items():
                self._unwritten[worker_id] = self._unwritten.get(worker_id) or values


async def _store(
    session: WriteSession, heard: Sequence[int], measured: Sequence[dict[str, Any]]
) -> None:
    await session.exec(
        update(Worker)
        .where(col(Worker.id).in_(heard))
        .values(
            heartbeat_at=clock(),
            updated_at=col(Worker.updated_at),  # it has not changed
        )
    )
    if measured:
        table = Worker.__table__  # type: ignore[attr-defined]
        await (await session.connection()).execute(
            update(table)
            .where(table.c.id == bindparam("of"))
            .values(
                {name: bindparam(name) for name in measured[0] if name != "of"}
                | {"updated_at": table.c.updated_at}
            ),
            measured,
        )
