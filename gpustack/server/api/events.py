"""/v2/events: what happened, newest first."""

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from pydantic import Field
from sqlalchemy import and_, func, or_
from sqlmodel import col, select

from gpustack.schemas.base import Page
from gpustack.schemas.events import By, Event, EventKind, EventType
from gpustack.server.api.context import Db, Id
from gpustack.server.api.lists import Asked, IdFilter, ListQuery, page_of
from gpustack.server.api.repeated import Repeated
from gpustack.server.auth.principals import Admin
from gpustack.server.db import tables
from gpustack.server.db.database import ReadSession

#: What stands behind an instance's model's name and a dash.
_LETTERS = 5

router = APIRouter(prefix="/v2", tags=["events"], route_class=Repeated)


class HistoryQuery(ListQuery):
    TABLE = tables.Event
    SORTED = ("last_at", "first_at", "count")

    sort_by: str | None = "-last_at"
    type: list[EventType] = []


class EventQuery(HistoryQuery):
    kind: list[EventKind] = []
    object_id: IdFilter = None
    name: str | None = Field(
        None, description="Of an object, or of the model whose instances are meant as well."
    )

    def holds(self, name: str, value: Any) -> Any:
        return _called(value) if name == "name" else super().holds(name, value)


@router.get("/events")
async def list_events(db: Db, admin: Admin, query: Asked[EventQuery]) -> Page[Event]:
    """What happened to objects, also to those that are gone. The newest first."""
    return await page_of(db, query, _shown)


@router.get("/{kind}/{object_id}/events")
async def list_events_of(
    db: Db, admin: Admin, kind: EventKind, object_id: Id, query: Asked[HistoryQuery]
) -> Page[Event]:
    """What happened to one object, which may be gone. The newest first."""
    table = tables.Event
    of_it = (col(table.kind) == kind, col(table.object_id) == object_id)
    return await page_of(db, query, _shown, *of_it)


def _called(name: str) -> Any:
    table = tables.Event
    prefix = f"{name}-"  # instances are called after their model
    copies = and_(
        col(table.kind) == EventKind.INSTANCES,
        func.substr(table.name, 1, len(prefix)) == prefix,
        func.length(table.name) == len(prefix) + _LETTERS,
    )
    return or_(col(table.name) == name, copies)


async def _shown(session: ReadSession, ids: Sequence[int]) -> dict[int, Event]:
    rows = await session.exec(select(tables.Event).where(col(tables.Event.id).in_(ids)))
    return {row.id or 0: _view(row) for row in rows.all()}


def _view(row: tables.Event) -> Event:
    by = By.model_validate({"kind": row.by_kind, "name": row.by_name})
    return Event.model_validate(row.model_dump() | {"by": by})
