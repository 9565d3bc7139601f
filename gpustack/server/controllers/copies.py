"""What the plan of a roll rests on: rows in, facts out."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from sqlalchemy import ColumnElement
from sqlmodel import col, or_, select

from gpustack.scheduler.snapshot import Snapshot
from gpustack.scheduler.standing import standing
from gpustack.schemas.instances import InstanceState
from gpustack.schemas.placements import Claim, Placement, ReasonCode
from gpustack.schemas.workers import Scheduling
from gpustack.server.controllers.placement import decided
from gpustack.server.controllers.rolling import Copy, Facts, Phase, Room, needs_room
from gpustack.server.controllers.world import World
from gpustack.server.db.database import WriteSession
from gpustack.server.db.instances import lacking_parts
from gpustack.server.db.tables import Instance, Member, Model, ModelVersion, Worker
from gpustack.server.db.versions import is_same, newest_version
from gpustack.server.views import whole_spec

#: Old instances, each on another worker, that are looked at for a place for a new one.
WHAT_IFS = 32
#: Reasons that a model shows of those why there is no room.
REASONS_SHOWN = 3


class _Seen(NamedTuple):
    """An instance with what its row refers to."""

    row: Instance
    version: ModelVersion
    worker: Worker | None
    part_lost: bool = False  # a worker other than its own

    @property
    def lost(self) -> bool:
        """Its end is for its own worker to tell; how it is, for all that it is on."""
        if self.row.deleting and self.worker is not None:
            return self.worker.lost
        return self.row.lost


async def facts_of(
    session: WriteSession, model: Model, world: World
) -> tuple[dict[int, Instance], Facts]:
    """The model's instances by id, and what a plan for them rests on."""
    wanted = await newest_version(session, model.key()[1])
    seen = await _instances(session, model)
    rows = {one.row.key()[1]: one.row for one in seen}
    parts = await _parts_leaving(session, model)
    copies = [_copy(one, wanted, parts) for one in seen if not _is_out_of_reach(one)]
    replicas = 0 if model.deleting else model.replicas
    facts = Facts(replicas, wanted.id or 0, copies)
    live = sum(copy.phase is not Phase.STOPPING and not copy.lost for copy in copies)
    is_rolling = needs_room(copies) and replicas > 0
    if not is_rolling and (live <= replicas or not replicas):
        return rows, facts
    snapshot, per_model = await world.read(session)
    counts = per_model.get(model.key()[1], Counter())
    claims = await _claims(session, seen)
    snapshot = snapshot.with_instances(counts)
    copies = [_with_worth(copy, model, seen, snapshot, claims) for copy in copies]
    facts = replace(facts, copies=copies)
    if not is_rolling:
        return rows, facts
    busy = await _busy(session, model, [node.worker.id for node in snapshot.nodes])
    old = (c for c in copies if not (c.wanted or c.leaving or c.lost))
    places = [c for c in old if c.worker is not None and c.worker not in busy]
    room = _room(model, wanted, snapshot, counts, places, claims) if wanted.profile else None
    return rows, replace(facts, room=room, busy=busy)


async def _instances(session: WriteSession, model: Model) -> list[_Seen]:
    query = (
        select(Instance, ModelVersion, Worker)
        .join(ModelVersion, col(ModelVersion.id) == Instance.version_id)
        .outerjoin(Worker, col(Worker.id) == Instance.worker_id)
        .where(Instance.model_id == model.id)
        .order_by(col(Instance.id))
    )
    seen = [_Seen(*row) for row in (await session.exec(query)).all()]
    lacking = await lacking_parts(session, [one.row.key()[1] for one in seen if one.row.lost])
    return [one._replace(part_lost=one.row.id in lacking) for one in seen]


def _is_out_of_reach(one: _Seen) -> bool:
    """It is to stop and nobody can say when it does: a roll does not wait for that.

    Once its worker is lost, nobody waits for it at all.
    """
    worker = one.worker
    return one.row.deleting and worker is not None and worker.silent and not worker.lost


async def _parts_leaving(session: WriteSession, model: Model) -> dict[int, str]:
    """Instances of which a part is on a worker that is being drained, each with its name."""
    query = (
        select(Member.instance_id, Worker.name)
        .join(Instance, col(Instance.id) == Member.instance_id)
        .join(Worker, col(Worker.id) == Member.worker_id)
        .where(Instance.model_id == model.id, Worker.scheduling == Scheduling.DRAINING)
    )
    return dict((await session.exec(query.order_by(col(Member.rank).desc()))).all())


def _copy(one: _Seen, wanted: ModelVersion, parts_leaving: Mapping[int, str] | None = None) -> Copy:
    phase = _phase(one)
    said = one.row.state_message if phase is Phase.FAILED else ""
    if phase is Phase.WAITING:
        # That its files are being read is no trouble; that they cannot be, the version says.
        said = _joined(
            [str(r["message"]) for r in one.row.reasons if r["code"] != ReasonCode.PROFILE]
        )
    leaves = one.worker is not None and one.worker.scheduling == Scheduling.DRAINING
    row_id = one.row.key()[1]
    return Copy(
        id=row_id,
        version=one.row.version_id,
        wanted=is_same(one.version, wanted),
        phase=phase,
        worker=one.row.worker_id,
        fallback=one.row.fallback_version_id,
        name=one.row.name,
        said=said,
        leaving=one.worker.name if one.worker and leaves else (parts_leaving or {}).get(row_id, ""),
        lost=one.lost,
        replaced_by=one.row.replaced_by,
    )


def _phase(one: _Seen) -> Phase:
    row, worker = one.row, one.worker
    if row.deleting:
        return Phase.STOPPING
    if worker is None:
        return Phase.WAITING
    if worker.silent or (row.lost and not one.part_lost):
        return Phase.AWAY
    if row.reported_state == InstanceState.RUNNING:
        return Phase.READY
    # One that is started again has not yet shown that it can run.
    is_failed = row.reported_state == InstanceState.ERROR or row.restart_count > 0
    return Phase.FAILED if is_failed else Phase.STARTING


# --- what the scheduler says -----------------------------------------------------------------

_Claims = dict[int, list[tuple[int, Claim]]]


async def _claims(session: WriteSession, seen: Sequence[_Seen]) -> _Claims:
    """Instance -> (worker, claim) of each part of it; the part that answers comes first."""
    claims: _Claims = {}
    for one in seen:
        if one.row.worker_id is not None and one.row.claim is not None:
            claim = Claim.model_validate(one.row.claim)
            claims[one.row.key()[1]] = [(one.row.worker_id, claim)]
    parts = select(Member).where(col(Member.instance_id).in_([one.row.id for one in seen]))
    for member in (await session.exec(parts.order_by(col(Member.rank)))).all():
        found = (member.worker_id, Claim.model_validate(member.claim))
        claims.setdefault(member.instance_id, []).append(found)
    return claims


def _with_worth(
    copy: Copy, model: Model, seen: Sequence[_Seen], snapshot: Snapshot, claims: _Claims
) -> Copy:
    version = next(one.version for one in seen if one.row.id == copy.id)
    node = next((node for node in snapshot.nodes if node.worker.id == copy.worker), None)
    if node is None:
        return copy
    _, claim = next(iter(claims.get(copy.id, [])), (0, Claim()))
    return replace(copy, worth=standing(whole_spec(model, version), node, claim))


def _room(
    model: Model,
    wanted: ModelVersion,
    snapshot: Snapshot,
    counts: Counter[int],
    places: Sequence[Copy],
    claims: _Claims,
) -> Room:
    decision = decided(model, wanted, snapshot)
    if isinstance(decision, Placement):
        return Room(decision.worker_id)
    why = _joined([reason.message for reason in decision])
    tried: set[int | None] = set()
    for copy in sorted(places, key=lambda copy: copy.worth):
        if copy.phase is Phase.STOPPING or copy.worker in tried or len(tried) >= WHAT_IFS:
            continue
        tried.add(copy.worker)
        without = counts - Counter([copy.worker or 0])
        freed = snapshot.without_claims(claims.get(copy.id, [])).with_instances(without)
        if isinstance(decided(model, wanted, freed), Placement):
            return Room(None, frozenset({copy.id}), why)
    return Room(None, why=why)


def _joined(reasons: Sequence[str]) -> str:
    more = len(reasons) - REASONS_SHOWN
    shown = "; ".join(reasons[:REASONS_SHOWN])
    return f"{shown}; and {more} more" if more > 0 else shown


# --- other models' rolls ---------------------------------------------------------------------


async def _busy(session: WriteSession, model: Model, workers: Sequence[int]) -> dict[int, str]:
    """Workers on which another model's roll is under way, each with that model's name."""
    query = (
        select(Instance, ModelVersion, Worker)
        .join(ModelVersion, col(ModelVersion.id) == Instance.version_id)
        .outerjoin(Worker, col(Worker.id) == Instance.worker_id)
        .where(Instance.model_id != model.id, _under_way())
    )
    moving: dict[int, list[_Seen]] = {}
    for row in (await session.exec(query)).all():
        moving.setdefault(row[0].model_id, []).append(_Seen(*row))
    busy: dict[int, str] = {}
    for model_id, seen in sorted(moving.items(), reverse=True):  # the first model has the word
        other = await session.get_one(Model, model_id)
        if other.deleting:
            continue
        wanted = await newest_version(session, model_id)
        copies = [_copy(one, wanted) for one in seen if not _is_out_of_reach(one)]
        copies = [copy for copy in copies if not copy.lost]
        if any(copy.phase is Phase.WAITING for copy in copies):
            busy |= dict.fromkeys(workers, other.name)  # nobody knows yet where it goes
        if await _is_rolling(session, other, wanted, copies):
            its = (copy.worker for copy in copies if _is_step(copy))
            busy |= {worker: other.name for worker in its if worker is not None}
    return busy


def _under_way() -> ColumnElement[bool]:
    """What of a roll can be under way: an end, a start, and the wait for a place in between."""
    settled = [InstanceState.RUNNING, InstanceState.ERROR]
    state = col(Instance.reported_state)
    is_waiting = col(Instance.worker_id).is_(None)
    return or_(
        col(Instance.deleting).is_(True),
        is_waiting & col(Instance.fallback_version_id).is_not(None),
        ~is_waiting & (state.is_(None) | state.not_in(settled)),
    )


def _is_step(copy: Copy) -> bool:
    return copy.phase is (Phase.STARTING if copy.wanted else Phase.STOPPING)


async def _is_rolling(
    session: WriteSession, model: Model, wanted: ModelVersion, copies: Sequence[Copy]
) -> bool:
    if any(copy.fallback is not None or not copy.wanted for copy in copies):
        return True
    used = select(Instance.version_id).where(Instance.model_id == model.id)
    its = select(ModelVersion).where(col(ModelVersion.id).in_(used))
    return any(not is_same(one, wanted) for one in (await session.exec(its)).all())
