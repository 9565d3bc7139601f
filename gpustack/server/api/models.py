"""/v2/models: what users deploy."""

from typing import Any

from fastapi import APIRouter, Response
from sqlalchemy.exc import IntegrityError
from sqlmodel import col, select

from gpustack.backends import BACKENDS, backend_for
from gpustack.errors import Conflict, Invalid
from gpustack.schemas import wire
from gpustack.schemas.base import Page
from gpustack.schemas.models import Model, ModelCreate, ModelSpec, ModelUpdate, VersionSpec
from gpustack.server.api.context import Changes, Db, Id, PageNumber, PerPage
from gpustack.server.api.lists import page_of, watch_of
from gpustack.server.auth.principals import Admin, AnyUser
from gpustack.server.db import tables
from gpustack.server.db.database import ReadSession, get, touch
from gpustack.server.db.versions import newest_version
from gpustack.server.views import USER, load

router = APIRouter(prefix="/v2/models", tags=["models"])


@router.get("", response_model=Page[Model])
async def list_models(
    db: Db,
    feed: Changes,
    user: AnyUser,
    page: PageNumber = 1,
    perPage: PerPage = 100,
    name: str | None = None,
    watch: bool = False,
    since: str | None = None,
) -> Any:
    if watch:
        return watch_of(feed, frozenset({wire.MODELS}), user, since)
    where = [col(tables.Model.name) == name] if name is not None else []
    return await page_of(db, wire.MODELS, user, page, perPage, *where)


@router.get("/{model_id}")
async def get_model(db: Db, user: AnyUser, model_id: Id) -> Model:
    async with db.read() as session:
        return await _view(session, model_id)


@router.post("", status_code=201)
async def create_model(db: Db, admin: Admin, spec: ModelCreate) -> Model:
    check(spec)
    try:
        async with db.write() as session:
            row = tables.Model(**_columns(spec))
            session.add(row)
            await session.flush()
            await _add_version(session, row, spec)
            view = await _view(session, row.key()[1])
    except IntegrityError:
        raise Conflict(f"a model named {spec.name} exists already") from None
    return view


@router.put("/{model_id}")
async def update_model(db: Db, admin: Admin, model_id: Id, spec: ModelUpdate) -> Model:
    """Change the spec. New instances start from it; running ones stay as they are."""
    check(spec)
    try:
        async with db.write() as session:
            row = await get(session, tables.Model, model_id)
            if row.deleting:
                raise Conflict(f"model {row.name} is being deleted")
            if spec.generation not in {None, row.generation}:
                raise Conflict(
                    f"model {row.name} is at generation {row.generation}, not {spec.generation}",
                    current=(await _view(session, model_id)).model_dump(mode="json"),
                )
            changes = {k: v for k, v in _columns(spec).items() if getattr(row, k) != v}
            old = (await newest_version(session, model_id)).spec
            is_new = old != spec.version().model_dump(mode="json")
            if changes or is_new:
                row.sqlmodel_update(changes | {"generation": row.generation + 1})
                for instance in await session.exec(
                    select(tables.Instance).where(tables.Instance.model_id == model_id)
                ):
                    touch(session, instance)  # what it shows depends on its model
            if is_new:
                await _add_version(session, row, spec)
            await session.flush()
            view = await _view(session, model_id)
    except IntegrityError:
        raise Conflict(f"a model named {spec.name} exists already") from None
    return view


@router.delete("/{model_id}", status_code=202)
async def delete_model(db: Db, admin: Admin, model_id: Id) -> Response:
    """Answers at once; the model goes with its last instance, and keeps its name until then."""
    async with db.write() as session:
        row = await get(session, tables.Model, model_id)
        row.deleting = True
    return Response(status_code=202)


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


def _columns(spec: ModelSpec) -> dict[str, Any]:
    names = set(ModelSpec.model_fields) - set(VersionSpec.model_fields)
    return spec.model_dump(mode="json", include=names)


async def _add_version(session: ReadSession, row: tables.Model, spec: ModelSpec) -> None:
    session.add(
        tables.ModelVersion(
            model_id=row.key()[1],
            generation=row.generation,
            spec=spec.version().model_dump(mode="json"),
        )
    )
    await session.flush()


async def _view(session: ReadSession, model_id: int) -> Model:
    await get(session, tables.Model, model_id)
    (found,) = await load(session, wire.MODELS, [model_id])
    view = found.view(USER)
    return Model.model_validate(view, from_attributes=True)
