"""Models' specs: checked, kept, changed. What every way of editing a model has in common."""

from typing import Any

from sqlmodel import col, select

from gpustack.backends import BACKENDS, backend_for
from gpustack.errors import Conflict, Invalid, NotFound
from gpustack.schemas import wire
from gpustack.schemas.models import Model, ModelSpec, VersionSpec
from gpustack.server.db import tables
from gpustack.server.db.database import ReadSession, WriteSession, get, touch
from gpustack.server.db.versions import add_version, newest_version, spec_of
from gpustack.server.views import ADMIN, Audience, load, rows_for


def check(spec: ModelSpec) -> None:
    """Raises:
    Invalid: no backend can do what the spec says.
    """
    if spec.backend is not None and spec.backend not in BACKENDS:
        raise Invalid(f"backend: want one of {', '.join(BACKENDS)}, got {spec.backend}")
    backend = backend_for(spec)
    if backend is None:
        raise Invalid(f"no backend runs {spec.location}: name a .gguf file, or set backend")
    if problem := backend.problem(spec):
        raise Invalid(problem)
    if spec.local_path and not spec.local_path.startswith("/") and spec.local_path[1:3] != ":\\":
        raise Invalid(f"local_path: want an absolute path, got {spec.local_path}")


async def view(session: ReadSession, model_id: int, audience: Audience = ADMIN) -> Model:
    """The model as `audience` sees it.

    Raises:
        NotFound: there is none with this id, for these eyes.
    """
    its = col(tables.Model.id) == model_id
    for found in await load(session, wire.MODELS, its, *rows_for(wire.MODELS, audience)):
        return Model.model_validate(found.view(audience), from_attributes=True)
    raise NotFound(f"there is no model with id {model_id}")


async def create(session: WriteSession, spec: ModelSpec) -> tables.Model:
    """Deploy a model.

    Raises:
        Conflict: its name is taken.
    """
    check(spec)
    await _expect_free(session, spec.name)
    row = tables.Model(**columns(spec))
    session.add(row)
    await session.flush()
    await add_version(session, row, spec.version())
    return row


def name_taken(name: str) -> Conflict:
    return Conflict(f"a model named {name} exists already")


async def _expect_free(session: WriteSession, name: str) -> None:
    """Raises Conflict. Of two at once the database's own rule lets one in."""
    deleting = select(tables.Model.deleting).where(col(tables.Model.name) == name)
    match (await session.exec(deleting)).one_or_none():
        case True:
            raise Conflict(f"a model named {name} is being deleted: its name is free after that")
        case False:
            raise name_taken(name)


async def to_edit(session: WriteSession, model_id: int) -> tables.Model:
    """The model's row, which nobody else changes before this transaction ends.

    Raises:
        NotFound: there is none with this id.
        Conflict: it is being deleted.
    """
    row = await get(session, tables.Model, model_id)
    if row.deleting:
        raise Conflict(f"model {row.name} is being deleted")
    return row


async def change(session: WriteSession, row: tables.Model, spec: ModelSpec) -> None:
    """Make `spec` the model's. What is the same stays untouched, and its generation too.

    Raises:
        Invalid: no backend can do what it says, or it names another model.
    """
    if spec.name != row.name:
        raise Invalid(f"name: model {row.name} keeps its name; deploy another as {spec.name}")
    check(spec)
    changes = {k: v for k, v in columns(spec).items() if getattr(row, k) != v}
    is_new = spec_of(await newest_version(session, row.key()[1])) != spec.version()
    if not changes and not is_new:
        return
    row.sqlmodel_update(changes | {"generation": row.generation + 1})
    its = select(tables.Instance).where(tables.Instance.model_id == row.id)
    for instance in await session.exec(its):
        touch(session, instance)  # what it shows depends on its model
    if is_new:
        await add_version(session, row, spec.version())
    await session.flush()


def columns(spec: ModelSpec) -> dict[str, Any]:
    """The part of `spec` that instances do not depend on, as the model's row keeps it."""
    names = set(ModelSpec.model_fields) - set(VersionSpec.model_fields)
    return spec.model_dump(mode="json", include=names)
