"""/v2/models: what users deploy."""

import json
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from sqlalchemy import exists, or_
from sqlalchemy.exc import IntegrityError
from sqlmodel import col, select

from gpustack.errors import (
    BadRequest,
    Conflict,
    TooLarge,
    UnsupportedMediaType,
    raises,
)
from gpustack.lib.merge_patch import merged
from gpustack.schemas import wire
from gpustack.schemas.base import Page
from gpustack.schemas.instances import Instance, InstanceState
from gpustack.schemas.models import (
    Category,
    Deletion,
    Deletions,
    Model,
    ModelCreate,
    ModelUpdate,
    ModelVersion,
    Rollback,
)
from gpustack.server.api import specs
from gpustack.server.api.conditions import IfMatch, expect, tag
from gpustack.server.api.context import BODY_BYTES, Changes, Db, Id, raw_body
from gpustack.server.api.instances import InstanceQuery
from gpustack.server.api.lists import Asked, ListQuery, WatchQuery, listed, page_of
from gpustack.server.api.repeated import Repeated
from gpustack.server.api.streams import WATCHED
from gpustack.server.auth.principals import Admin, AnyUser
from gpustack.server.db import tables
from gpustack.server.db.database import ReadSession, WriteSession, get
from gpustack.server.db.json_arrays import has_text
from gpustack.server.db.versions import (
    is_same,
    newest_version,
    of_newest_version,
    spec_of,
    version_before,
    version_of,
)
from gpustack.server.views import ADMIN, Audience, load_ids, whole_spec

router = APIRouter(prefix="/v2/models", tags=["models"], route_class=Repeated)

MERGE_PATCH = "application/merge-patch+json"
#: Models that one request may delete.
DELETIONS = 100
Ids = Annotated[
    str, Query(description="Ids with commas between them.", pattern=r"^[0-9]{1,18}(,[0-9]{1,18})*$")
]


class ModelQuery(WatchQuery):
    TABLE, KIND = tables.Model, wire.MODELS
    SORTED = ("name", "replicas", "created_at", "updated_at")

    name: str | None = None
    categories: list[Category] = []
    deleting: bool | None = None

    def holds(self, name: str, value: Any) -> Any:
        if name != "categories":
            return super().holds(name, value)
        version = tables.ModelVersion
        any_of = or_(*(has_text(col(version.spec), "categories", word) for word in value))
        return exists().where(*of_newest_version(), any_of)


class CopyQuery(ListQuery):
    TABLE, COLUMNS, SORTED = tables.Instance, InstanceQuery.COLUMNS, InstanceQuery.SORTED

    state: list[InstanceState] = []


class VersionQuery(ListQuery):
    TABLE = tables.ModelVersion
    SORTED = ("generation",)

    sort_by: str | None = "-generation"


@router.get("", response_model=Page[Model], responses=WATCHED)
@raises(BadRequest)
async def list_models(db: Db, feed: Changes, user: AnyUser, query: Asked[ModelQuery]) -> Any:
    """The models that the user may use, without what is for who runs them; of administrators all.

    A watch that begins with `since` begins with a whole list, but for administrators.
    """
    return await listed(db, feed, user, query)


@router.get("/{model_id}")
async def get_model(db: Db, user: AnyUser, model_id: Id, response: Response) -> Model:
    """The ETag is the generation: an update may name it in If-Match."""
    async with db.read() as session:
        model = await specs.view(session, model_id, Audience.of(user))
    tag(response, model.generation)
    return model


@router.post("", status_code=201)
@raises(Conflict)
async def create_model(db: Db, admin: Admin, spec: ModelCreate, response: Response) -> Model:
    """Deploy a model."""
    try:
        async with db.write() as session:
            row = await specs.create(session, spec)
            model = await specs.view(session, row.key()[1])
    except IntegrityError:  # another server was faster
        raise specs.name_taken(spec.name) from None
    tag(response, model.generation)
    return model


@router.put("/{model_id}")
async def update_model(
    db: Db, admin: Admin, model_id: Id, spec: ModelUpdate, if_match: IfMatch, response: Response
) -> Model:
    """Change the whole spec; instances that it makes out of date are replaced one by one.

    Made from another generation than the present one, it is refused (409) with the model as it
    is. Without If-Match or `generation`, the last writer wins.
    """
    async with db.write() as session:
        row = await _expected(session, model_id, if_match, spec.generation)
        await specs.change(session, row, spec)
        model = await specs.view(session, model_id)
    tag(response, model.generation)
    return model


@router.patch(
    "/{model_id}",
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                kind: {"schema": {"type": "object"}} for kind in (MERGE_PATCH, "application/json")
            },
        }
    },
)
@raises(TooLarge, UnsupportedMediaType)
async def patch_model(
    db: Db, admin: Admin, model_id: Id, request: Request, if_match: IfMatch, response: Response
) -> Model:
    """Change parts of the spec: a JSON merge patch (RFC 7386), in which null means the default.

    The result is checked and compared as PUT has it.
    """
    patch = await _patch(request)
    async with db.write() as session:
        row = await specs.to_edit(session, model_id)
        before = whole_spec(row, await newest_version(session, model_id))
        try:
            spec = ModelUpdate.model_validate(merged(before.model_dump(mode="json"), patch))
        except ValidationError as error:
            raise RequestValidationError(error.errors()) from None
        await _expect(session, row, if_match, spec.generation)
        await specs.change(session, row, spec)
        model = await specs.view(session, model_id)
    tag(response, model.generation)
    return model


@router.get("/{model_id}/instances")
async def list_instances_of(
    db: Db, admin: Admin, model_id: Id, query: Asked[CopyQuery]
) -> Page[Instance]:
    """The model's copies: what GET /v2/model-instances?model_id= lists, where older clients ask."""
    async with db.read() as session:
        await get(session, tables.Model, model_id)

    async def show(session: ReadSession, ids: Sequence[int]) -> dict[int, Any]:
        return {one.id: one.view(ADMIN) for one in await load_ids(session, wire.INSTANCES, ids)}

    return await page_of(db, query, show, col(tables.Instance.model_id) == model_id)


@router.get("/{model_id}/versions")
async def list_model_versions(
    db: Db, admin: Admin, model_id: Id, query: Asked[VersionQuery]
) -> Page[ModelVersion]:
    """What the model's instances were started from, the newest first."""
    async with db.read() as session:
        await get(session, tables.Model, model_id)

    async def show(session: ReadSession, ids: Sequence[int]) -> dict[int, ModelVersion]:
        wanted = await newest_version(session, model_id)
        rows = select(tables.ModelVersion).where(col(tables.ModelVersion.id).in_(ids))
        return {
            row.id or 0: ModelVersion(
                generation=row.generation,
                wanted=is_same(row, wanted),
                spec=spec_of(row),
                created_at=row.created_at,
            )
            for row in (await session.exec(rows)).all()
        }

    return await page_of(db, query, show, col(tables.ModelVersion.model_id) == model_id)


@router.post("/{model_id}/rollback")
async def roll_back_model(
    db: Db, admin: Admin, model_id: Id, body: Rollback, if_match: IfMatch, response: Response
) -> Model:
    """Want an earlier version again: a new generation that says what that one said.

    Replicas, labels and whatever else instances are not started from stay as they are.
    """
    async with db.write() as session:
        row = await _expected(session, model_id, if_match, body.generation)
        if body.to is None:
            earlier = await version_before(session, row)
        else:
            earlier = await version_of(session, row, body.to)
        await specs.change(session, row, whole_spec(row, earlier))
        model = await specs.view(session, model_id)
    tag(response, model.generation)
    return model


@router.delete("/{model_id}", status_code=202, response_class=Response)
async def delete_model(db: Db, admin: Admin, model_id: Id, if_match: IfMatch) -> Response:
    """Answers at once; the model goes with its last instance, and keeps its name until then."""
    async with db.write() as session:
        row = await get(session, tables.Model, model_id)
        if if_match is not None:
            await _expect(session, row, if_match, None)
        row.deleting = True
    return Response(status_code=202)


@router.delete("")
@raises(BadRequest)
async def delete_models(db: Db, admin: Admin, ids: Ids) -> Deletions:
    """Delete several: all that there are, at once; answers for each id what became of it."""
    wanted = list(dict.fromkeys(int(id) for id in ids.split(",")))
    if len(wanted) > DELETIONS:
        raise BadRequest(f"ids: want at most {DELETIONS}, got {len(wanted)}")
    table = tables.Model
    # In one order, so that no two requests wait for each other.
    query = select(table).where(col(table.id).in_(wanted)).order_by(col(table.id))
    async with db.write() as session:
        rows = {row.id: row for row in await session.exec(query.with_for_update())}
        for row in rows.values():
            row.deleting = True
    return Deletions(items=[_deletion(id, there=id in rows) for id in wanted])


def _deletion(id: int, *, there: bool) -> Deletion:
    return Deletion(
        id=id, deleting=there, message="" if there else f"there is no model with id {id}"
    )


async def _expected(
    session: WriteSession, model_id: int, if_match: frozenset[int] | None, body: int | None
) -> tables.Model:
    row = await specs.to_edit(session, model_id)
    await _expect(session, row, if_match, body)
    return row


async def _expect(
    session: WriteSession, row: tables.Model, if_match: frozenset[int] | None, body: int | None
) -> None:
    current = await specs.view(session, row.key()[1])
    expect(
        session,
        f"model {row.name}",
        row.generation,
        header=if_match,
        body=body,
        current=current.model_dump(mode="json"),
    )


async def _patch(request: Request) -> Any:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in {MERGE_PATCH, "application/json"}:
        raise UnsupportedMediaType(f"content-type: want {MERGE_PATCH}, got {kind or 'none'}")
    raw = await raw_body(request, BODY_BYTES)
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        raise BadRequest("the body is not JSON") from None
