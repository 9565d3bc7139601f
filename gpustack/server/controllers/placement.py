"""Every pending instance gets a worker, or the reasons why it has none."""

import logging
from collections import Counter

from sqlmodel import col, select

from gpustack.backends import backend_for
from gpustack.lib.secrets import new_secret
from gpustack.scheduler.plan import place
from gpustack.scheduler.snapshot import Snapshot
from gpustack.schemas.models import ModelSpec, VersionSpec
from gpustack.schemas.placements import Claim, Placement, Reason, ReasonCode
from gpustack.schemas.profiles import Profile
from gpustack.server.db.database import Database, WriteSession
from gpustack.server.db.tables import Instance, Model, ModelVersion, Worker
from gpustack.server.views import worker_view

logger = logging.getLogger(__name__)

#: The one key of the placement queue.
ALL = 0


class Placements:
    """One run places all that wait, oldest first, in one transaction.

    So no two decisions are made on the same memory.
    """

    def __init__(self, db: Database) -> None:
        self._db = db

    async def reconcile(self, key: int) -> float | None:
        async with self._db.write() as session:
            query = (
                select(Instance, Model, ModelVersion)
                .join(Model, col(Model.id) == Instance.model_id)
                .join(ModelVersion, col(ModelVersion.id) == Instance.version_id)
                .where(col(Instance.worker_id).is_(None), col(Instance.deleting).is_(False))
                .order_by(col(Instance.id))
            )
            pending = (await session.exec(query)).all()
            if not pending:
                return None
            snapshot, per_model = await _world(session)
            for instance, model, version in pending:
                counts = per_model.setdefault(instance.model_id, Counter())
                decision = _decided(model, version, snapshot.with_instances(counts))
                if isinstance(decision, Placement):
                    snapshot = snapshot.with_claim(decision.worker_id, decision.claim)
                    counts[decision.worker_id] += 1
                    instance.worker_id = decision.worker_id
                    instance.claim = decision.claim.model_dump(mode="json")
                    instance.secret = new_secret()
                    instance.reasons = []
                else:
                    reasons = [reason.model_dump(mode="json") for reason in decision]
                    if instance.reasons != reasons:
                        instance.reasons = reasons
        return None


def _decided(
    model: Model, version: ModelVersion, snapshot: Snapshot
) -> Placement | tuple[Reason, ...]:
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
    spec = ModelSpec.model_validate(version.spec | _spec_columns(model))
    backend = backend_for(VersionSpec.model_validate(version.spec))
    if backend is None:
        message = f"no backend runs {spec.location}" + (f" as {spec.backend}" * bool(spec.backend))
        return (Reason(code=ReasonCode.BACKEND, message=message),)
    if version.profile is None:
        message = version.problem or "the model's files are being read"
        return (Reason(code=ReasonCode.PROFILE, message=message),)
    return place(spec, backend.demands(spec, Profile.model_validate(version.profile)), snapshot)


def _spec_columns(model: Model) -> dict[str, object]:
    return model.model_dump(include=set(ModelSpec.model_fields) - set(VersionSpec.model_fields))


async def _world(session: WriteSession) -> tuple[Snapshot, dict[int, Counter[int]]]:
    """The workers with every claim on them, and where each model's instances are."""
    workers = [worker_view(row) for row in (await session.exec(select(Worker))).all()]
    placed = (
        await session.exec(select(Instance).where(col(Instance.worker_id).is_not(None)))
    ).all()
    claims: list[tuple[int, Claim]] = []
    per_model: dict[int, Counter[int]] = {}
    for instance in placed:
        worker_id = instance.worker_id or 0
        claims.append((worker_id, Claim.model_validate(instance.claim)))
        per_model.setdefault(instance.model_id, Counter())[worker_id] += 1
    return Snapshot.of(workers, claims), per_model
