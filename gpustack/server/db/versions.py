"""What instances of a model are started from: its versions, of which the newest is wanted.

Going back to an earlier one adds a version that says the same.
"""

from typing import Any

from sqlalchemy import func
from sqlalchemy.orm import aliased
from sqlmodel import col, or_, select

from gpustack.errors import NotFound
from gpustack.schemas.models import VersionSpec
from gpustack.server.db.database import ReadSession, WriteSession
from gpustack.server.db.tables import Instance, Model, ModelVersion

#: Of each model; the oldest go, but for those that an instance still needs.
KEPT_VERSIONS = 50


async def newest_version(session: ReadSession, model_id: int) -> ModelVersion:
    """The version that new instances get."""
    query = select(ModelVersion).where(ModelVersion.model_id == model_id)
    return (await session.exec(query.order_by(col(ModelVersion.generation).desc()).limit(1))).one()


def of_newest_version() -> tuple[Any, Any]:
    """Conditions by which a version is the newest one of a model, for queries that join both."""
    of_model = aliased(ModelVersion)
    newest = select(func.max(of_model.generation)).where(of_model.model_id == Model.id)
    its_own = col(ModelVersion.model_id) == col(Model.id)
    return its_own, col(ModelVersion.generation) == newest.correlate(Model).scalar_subquery()


async def version_of(session: ReadSession, model: Model, generation: int) -> ModelVersion:
    """The version that came with this generation of the model.

    Raises:
        NotFound: none did, or it is no longer kept.
    """
    its = (ModelVersion.model_id == model.id, ModelVersion.generation == generation)
    found = (await session.exec(select(ModelVersion).where(*its))).one_or_none()
    if found is None:
        raise NotFound(
            f"model {model.name} has no version of generation {generation}: "
            f"GET /v2/models/{model.id}/versions lists those it has"
        )
    return found


async def version_before(session: ReadSession, model: Model) -> ModelVersion:
    """The newest version that says something else than the wanted one.

    Raises:
        NotFound: there is none.
    """
    wanted, *others = await _all(session, model)
    earlier = next((one for one in others if not is_same(one, wanted)), None)
    if earlier is None:
        raise NotFound(f"model {model.name} has no earlier version")
    return earlier


def is_same(one: ModelVersion, other: ModelVersion) -> bool:
    """Whether an instance of one does what an instance of the other does."""
    return one.id == other.id or spec_of(one) == spec_of(other)


def spec_of(version: ModelVersion) -> VersionSpec:
    return VersionSpec.model_validate(version.spec)


async def add_version(session: WriteSession, model: Model, spec: VersionSpec) -> None:
    """From now on new instances of `model` are started from `spec`, as of its generation.

    What the files say is taken over from an earlier version that says the same.
    """
    version = ModelVersion(
        model_id=model.key()[1], generation=model.generation, spec=spec.model_dump(mode="json")
    )
    earlier = await _all(session, model)
    known = next((one for one in earlier if one.profile and spec_of(one) == spec), None)
    if known is not None:
        version.profile, version.problem = known.profile, known.problem
    session.add(version)
    await _forget(session, earlier[KEPT_VERSIONS - 1 :])
    await session.flush()


async def _all(session: ReadSession, model: Model) -> list[ModelVersion]:
    """The versions of a model, the newest first."""
    its = select(ModelVersion).where(ModelVersion.model_id == model.id)
    return list((await session.exec(its.order_by(col(ModelVersion.generation).desc()))).all())


async def _forget(session: WriteSession, versions: list[ModelVersion]) -> None:
    """Delete those that no instance was made with or may have to go back to."""
    ids = [version.id for version in versions]
    users = select(Instance.version_id, Instance.fallback_version_id).where(
        or_(col(Instance.version_id).in_(ids), col(Instance.fallback_version_id).in_(ids))
    )
    used = {id for row in (await session.exec(users)).all() for id in row}
    for version in versions:
        if version.id not in used:
            await session.delete(version)
