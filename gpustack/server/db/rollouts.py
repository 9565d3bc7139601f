"""How far models' instances are with the version that is wanted: counted from their rows."""

from collections.abc import Iterable, Mapping

from sqlalchemy import case, func
from sqlmodel import and_, col, or_, select

from gpustack.schemas.instances import InstanceState
from gpustack.schemas.models import Rollout, RolloutState, VersionCount
from gpustack.server.db.database import ReadSession
from gpustack.server.db.tables import Instance, Model, ModelVersion, Worker
from gpustack.server.db.versions import is_same

_Uses = dict[int, tuple[int, int]]  # version id -> instances of it, and those that answer


async def rollouts_of(
    session: ReadSession, models: Mapping[int, Model]
) -> tuple[dict[int, ModelVersion], dict[int, Rollout]]:
    """The wanted version of each model, and its rollout."""
    uses = await _uses(session, models)
    newest = (
        select(func.max(ModelVersion.id))
        .where(col(ModelVersion.model_id).in_(models))
        .group_by(col(ModelVersion.model_id))
    )
    used = {version for of_model in uses.values() for version in of_model}
    query = select(ModelVersion).where(
        or_(col(ModelVersion.id).in_(newest), col(ModelVersion.id).in_(used))
    )
    versions: dict[int, list[ModelVersion]] = {}
    for version in (await session.exec(query.order_by(col(ModelVersion.id)))).all():
        versions.setdefault(version.model_id, []).append(version)
    rollouts = {id: _rollout(models[id], its, uses.get(id, {})) for id, its in versions.items()}
    return {id: its[-1] for id, its in versions.items()}, rollouts


async def _uses(session: ReadSession, models: Iterable[int]) -> dict[int, _Uses]:
    """Of each model, how its instances divide into versions.

    Those being ended are left out, and those that are lost: others are in their places.
    """
    silent = select(Worker.id).where(col(Worker.silent))
    answers = and_(
        col(Instance.reported_state) == InstanceState.RUNNING,
        col(Instance.worker_id).not_in(silent),
    )
    query = (
        select(
            Instance.model_id,
            Instance.version_id,
            func.count(col(Instance.id)),
            func.sum(case((answers, 1), else_=0)),
        )
        .where(
            col(Instance.model_id).in_(models),
            col(Instance.deleting).is_(False),
            col(Instance.lost).is_(False),
        )
        .group_by(col(Instance.model_id), col(Instance.version_id))
    )
    uses: dict[int, _Uses] = {}
    for model_id, version_id, total, ready in (await session.exec(query)).all():
        uses.setdefault(model_id, {})[version_id] = (total, int(ready))
    return uses


def _rollout(model: Model, versions: list[ModelVersion], uses: _Uses) -> Rollout:
    """Of `versions` the last is wanted. What says the same counts as the wanted one."""
    wanted = versions[-1]
    counts: dict[int, VersionCount] = {}
    for version in versions:
        total, ready = uses.get(version.id or 0, (0, 0))
        generation = wanted.generation if is_same(version, wanted) else version.generation
        count = counts.setdefault(generation, VersionCount(generation=generation))
        count.instances += total
        count.ready += ready
    done = counts.pop(wanted.generation)
    old = [count for count in counts.values() if count.instances]
    if not old and done.instances == done.ready == model.replicas:
        state = RolloutState.DONE
    else:
        state = RolloutState.PAUSED if model.rollout_message else RolloutState.ROLLING
    return Rollout(
        generation=wanted.generation,
        state=state,
        message=model.rollout_message,
        versions=sorted([*old, done], key=lambda count: count.generation),
    )
