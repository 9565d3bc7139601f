"""Every pending instance gets a worker, or the reasons why it has none."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from sqlmodel import col, select

from gpustack.backends import backend_for
from gpustack.lib.secrets import new_secret
from gpustack.scheduler.plan import place
from gpustack.scheduler.snapshot import Snapshot
from gpustack.schemas.models import VersionSpec
from gpustack.schemas.placements import Placement, Reason, ReasonCode
from gpustack.schemas.profiles import Profile
from gpustack.schemas.workers import Scheduling
from gpustack.server.controllers.world import World
from gpustack.server.db.database import Database, ReadSession, WriteSession, touch
from gpustack.server.db.tables import Instance, Model, ModelVersion, Worker
from gpustack.server.views import whole_spec

logger = logging.getLogger(__name__)

#: The one key of the placement queue.
ALL = 0
#: What holds for an instance that has no place and wants one.
WAITS = (col(Instance.worker_id).is_(None), col(Instance.deleting).is_(False))
#: How long one run may go on before others write.
RUN_S = 0.1
#: Instances that a run reads together: it may have no time for more.
READ_AT_ONCE = 50
#: After several runs: until all that wait are looked at again.
AGAIN_S = 10.0


class Placements:
    """One run places what waits, oldest first, in one transaction.

    So no two decisions are made on the same memory. Others write too: a run that takes long is
    followed by another, which goes on with those that this one did not come to.
    """

    def __init__(self, db: Database, world: World) -> None:
        self._db = db
        self._world = world
        self._decided: set[int] = set()  # in the runs since everything was looked at

    async def reconcile(self, key: int) -> float | None:
        async with self._db.read() as reading:
            waiting = [key for key in await _waiting(reading) if key not in self._decided]
        if waiting:
            async with self._db.write() as session:
                if await self._place(session, waiting):
                    return 0.0
        again = bool(self._decided)
        self._decided.clear()
        # Those that the first of several runs refused may fit by now.
        return AGAIN_S if again else None

    async def _place(self, session: WriteSession, waiting: Sequence[int]) -> bool:
        """Decide on these for as long as a run may take; answers whether some are left."""
        snapshot, per_model = await self._world.read(session)
        end = time.monotonic() + RUN_S
        for number, key in enumerate(waiting):
            if number % READ_AT_ONCE == 0:
                rows = await _read(session, waiting[number : number + READ_AT_ONCE])
            if key not in rows:
                continue  # it is not waiting any more
            instance, model, version = rows[key]
            counts = per_model.setdefault(instance.model_id, Counter())
            decision = decided(model, version, snapshot.with_instances(counts))
            if isinstance(decision, Placement) and not await _is_open(session, decision.worker_id):
                continue  # what closed it comes with a hint, and this instance is looked at again
            if isinstance(decision, Placement):
                snapshot = snapshot.with_claim(decision.worker_id, decision.claim)
                counts[decision.worker_id] += 1
            _note(session, instance, model, decision)
            if key != waiting[-1] and time.monotonic() > end:
                self._decided.update(waiting[: number + 1])
                return True
            await asyncio.sleep(0)  # a decision takes milliseconds where there are many workers
        return False


async def _is_open(session: WriteSession, worker_id: int) -> bool:
    """Whether the worker takes new instances, from now until the commit.

    Its row is locked: once a cordon is acknowledged, nothing more is placed there; and once a
    worker is marked as lost, so is all that is on it.
    """
    # More columns than the types of `select` know.
    columns: Any = (Worker.scheduling, Worker.silent)
    row = select(*columns).where(Worker.id == worker_id).with_for_update(read=True)
    with session.no_autoflush:
        found = (await session.exec(row)).one_or_none()
    return found is not None and found[0] == Scheduling.ACTIVE and not found[1]


def _note(
    session: WriteSession,
    instance: Instance,
    model: Model,
    decision: Placement | tuple[Reason, ...],
) -> None:
    """Write down where it goes, or why nowhere."""
    if isinstance(decision, Placement):
        instance.worker_id = decision.worker_id
        instance.claim = decision.claim.model_dump(mode="json")
        instance.secret = new_secret()
        instance.reasons = []
        touch(session, model)  # it shows how its instances are
    else:
        reasons = [reason.model_dump(mode="json") for reason in decision]
        if instance.reasons != reasons:
            instance.reasons = reasons
            touch(session, model)


async def _waiting(session: ReadSession) -> list[int]:
    """Instances without a place, in the order in which they get one."""
    query = (
        select(Instance.id)
        .where(*WAITS)
        # First those for which another was stopped: nobody else gets their place.
        .order_by(col(Instance.fallback_version_id).is_(None), col(Instance.id))
    )
    return [key or 0 for key in (await session.exec(query)).all()]


async def _read(
    session: WriteSession, ids: Sequence[int]
) -> dict[int, tuple[Instance, Model, ModelVersion]]:
    query = (
        select(Instance, Model, ModelVersion)
        .join(Model, col(Model.id) == Instance.model_id)
        .join(ModelVersion, col(ModelVersion.id) == Instance.version_id)
        .where(col(Instance.id).in_(ids), *WAITS)
    )
    return {row[0].key()[1]: row for row in (await session.exec(query)).all()}


def decided(
    model: Model, version: ModelVersion, snapshot: Snapshot
) -> Placement | tuple[Reason, ...]:
    """`decide`, whatever is wrong with the model."""
    try:
        return decide(model, version, snapshot)
    except Exception:  # one model's trouble must not keep the others waiting
        logger.exception("placing an instance of %s failed", model.name)
        message = "the scheduler failed on this model; the server's log says why"
        return (Reason(code=ReasonCode.INTERNAL, message=message),)


def decide(
    model: Model, version: ModelVersion, snapshot: Snapshot
) -> Placement | tuple[Reason, ...]:
    """Where an instance of this version goes, by the facts in `snapshot` alone."""
    spec = whole_spec(model, version)
    backend = backend_for(VersionSpec.model_validate(version.spec))
    if backend is None:
        message = f"no backend runs {spec.location}" + (f" as {spec.backend}" * bool(spec.backend))
        return (Reason(code=ReasonCode.BACKEND, message=message),)
    if version.profile is None:
        message = version.problem or "the model's files are being read"
        return (Reason(code=ReasonCode.PROFILE, message=message),)
    return place(spec, backend.demands(spec, Profile.model_validate(version.profile)), snapshot)
