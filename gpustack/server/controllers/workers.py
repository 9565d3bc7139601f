"""Who is still there, who has fallen silent, and whose silence has lasted too long."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from time import monotonic
from typing import Any

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
#: The end of a grace period, reckoned again, is not the same to the millisecond: no news.
SAME_END = timedelta(seconds=5)


@dataclass
class Patience:
    """How long workers may be silent. A running server may change it.

    Attributes:
        silent_after: from then on what is on them is unreachable.
        grace: from then on it is replaced.
    """

    silent_after: timedelta = SILENT_AFTER
    grace: timedelta = timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class _Judgement:
    """
    Attributes:
        left: until a silent one's grace period is over.
        due_s: until it is judged again.
    """

    silent: bool
    lost: bool
    left: timedelta
    due_s: float


class Workers:
    """Marks the silent, the lost and the returned.

    Silence counts from the later of the last heartbeat, to whichever server, and the moment this
    server began to look: servers that were away must not blame their workers for it. What is
    measured here is measured by a clock that nobody can set.
    """

    def __init__(
        self, db: Database, heartbeats: Heartbeats, patience: Patience | None = None
    ) -> None:
        self._db = db
        self._heartbeats = heartbeats
        self._began = monotonic()
        self._silent_from: dict[int, float] = {}
        self._ahead: dict[int, tuple[datetime, float]] = {}
        self._patience = patience or Patience()

    async def reconcile(self, key: int) -> float | None:
        async with self._db.read() as session:
            # More columns than the types of `select` know.
            columns: Any = (
                Worker.id, Worker.silent, Worker.lost, Worker.grace_ends_at, Worker.heartbeat_at
            )  # fmt: skip
            workers = (await session.exec(select(*columns))).all()
            database_now = (await session.exec(select(clock()))).one()
        again_s = []
        for worker_id, was_silent, was_lost, grace_ends_at, heartbeat_at in workers:
            since_written = self._since_written(worker_id or 0, heartbeat_at, database_now)
            now = self._judged(worker_id or 0, since_written, silent=was_silent, lost=was_lost)
            end = None
            if now.silent and not now.lost:
                end = database_now + now.left
                if grace_ends_at is not None and abs(end - grace_ends_at) < SAME_END:
                    end = grace_ends_at
            is_news = (now.silent, now.lost, end) != (was_silent, was_lost, grace_ends_at)
            seen = (was_silent, was_lost, heartbeat_at)
            is_stale = is_news and not await self._mark(worker_id or 0, seen, now, end)
            again_s.append(SOON_S if is_stale else now.due_s)
        return min(again_s, default=None)

    def _since_written(
        self, worker_id: int, heartbeat_at: datetime | None, database_now: datetime
    ) -> timedelta | None:
        """Since it spoke to any server, as far as that is written; None: it never did."""
        if heartbeat_at is None or heartbeat_at <= database_now:
            self._ahead.pop(worker_id, None)
            return None if heartbeat_at is None else database_now - heartbeat_at
        # The database's clock was set back: what counts is when this was seen first.
        at, seen = self._ahead.get(worker_id, (None, 0.0))
        if at != heartbeat_at:
            seen = monotonic()
            self._ahead[worker_id] = (heartbeat_at, seen)
        return timedelta(seconds=monotonic() - seen)

    def _judged(
        self, worker_id: int, since_written: timedelta | None, *, silent: bool, lost: bool
    ) -> _Judgement:
        """How a worker is, that was this until now.

        Args:
            since_written: since it spoke to any server, as far as that is written.
        """
        now, limit = monotonic(), self._patience.silent_after
        since = [since_written, self._heartbeats.unheard(worker_id)]
        unheard = min((one for one in since if one is not None), default=timedelta.max)
        looking = timedelta(seconds=now - self._began)
        # A server that just began knows nothing: it leaves all as it was until it does.
        if unheard <= limit or (looking <= limit and not silent):
            self._silent_from.pop(worker_id, None)
            due_s = max((limit - min(unheard, looking)).total_seconds(), 0.0) + SOON_S
            return _Judgement(silent=False, lost=False, left=timedelta(0), due_s=due_s)
        # The database's clock may be set forward: only `limit` of what it says counts.
        before = min(unheard, looking, limit).total_seconds()
        began = self._silent_from.setdefault(worker_id, now - before)
        left = self._patience.grace - timedelta(seconds=now - began)
        lost = lost or left <= timedelta(0)
        due_s = SILENT_AGAIN_S if lost else min(left.total_seconds(), SILENT_AGAIN_S)
        return _Judgement(silent=True, lost=lost, left=left, due_s=max(due_s, SOON_S))

    async def _mark(
        self, worker_id: int, seen: tuple[Any, ...], now: _Judgement, end: datetime | None
    ) -> bool:
        """Whether it was still as it was `seen`; what was heard of it since must not be undone."""
        async with self._db.write() as session:
            worker = await find(session, Worker, worker_id)
            if worker is None:
                return True
            if (worker.silent, worker.lost, worker.heartbeat_at) != seen:
                return False
            await set_silent(session, worker, silent=now.silent, lost=now.lost, grace_ends_at=end)
        return True
