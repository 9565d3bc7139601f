"""What the scheduler reasons on, out of the database; what has not changed is not parsed again."""

from collections import Counter

from sqlmodel import col, select

from gpustack.scheduler.snapshot import Snapshot
from gpustack.schemas.placements import Claim
from gpustack.schemas.workers import Worker as WorkerView
from gpustack.server.db.database import ReadSession
from gpustack.server.db.tables import Instance, Member, Worker
from gpustack.server.views import worker_view


class World:
    """Reads the workers and all claims on them; keeps what it has parsed.

    A worker is as it was while its revision is; a claim is written once.
    """

    def __init__(self) -> None:
        self._workers: dict[int, tuple[int, WorkerView]] = {}
        self._claims: dict[int, Claim | None] = {}

    async def read(self, session: ReadSession) -> tuple[Snapshot, dict[int, Counter[int]]]:
        """The world as `session` sees it, and where each model's instances are."""
        workers = await self._read_workers(session)
        query = select(Instance.id, Instance.model_id, Instance.worker_id).where(
            col(Instance.worker_id).is_not(None)
        )
        placed = (await session.exec(query)).all()
        await self._read_claims(session, {row_id or 0 for row_id, _, _ in placed})
        claims: list[tuple[int, Claim]] = []
        per_model: dict[int, Counter[int]] = {}
        for row_id, model_id, worker_id in placed:
            if (claim := self._claims[row_id or 0]) is not None:
                claims.append((worker_id or 0, claim))
            per_model.setdefault(model_id, Counter())[worker_id or 0] += 1
        for member in (await session.exec(select(Member))).all():
            claims.append((member.worker_id, Claim.model_validate(member.claim)))
        return Snapshot.of(workers, claims), per_model

    async def _read_workers(self, session: ReadSession) -> list[WorkerView]:
        rows = (await session.exec(select(Worker.id, Worker.revision))).all()
        revisions = {row_id or 0: revision for row_id, revision in rows}
        known = self._workers
        self._workers = {
            row_id: known[row_id]
            for row_id, revision in revisions.items()
            if row_id in known and known[row_id][0] == revision
        }
        if changed := revisions.keys() - self._workers.keys():
            query = select(Worker).where(col(Worker.id).in_(changed))
            for row in (await session.exec(query)).all():
                self._workers[row.id or 0] = (row.revision, worker_view(row))
        return [view for _, view in self._workers.values()]

    async def _read_claims(self, session: ReadSession, placed: set[int]) -> None:
        self._claims = {key: claim for key, claim in self._claims.items() if key in placed}
        lacking = sorted(placed - self._claims.keys())
        for begin in range(0, len(lacking), 500):  # databases bound the number of parameters
            query = select(Instance.id, Instance.claim).where(
                col(Instance.id).in_(lacking[begin : begin + 500])
            )
            for row_id, claim in (await session.exec(query)).all():
                self._claims[row_id or 0] = Claim.model_validate(claim) if claim else None
