"""Lists: a page of what there is, or a watch of it; the same for every watched kind."""

from typing import Any

from fastapi.responses import StreamingResponse
from sqlalchemy import func
from sqlmodel import col, select

from gpustack.errors import BadRequest, Forbidden
from gpustack.schemas.base import Page
from gpustack.server.api.context import pagination
from gpustack.server.auth.principals import Principal
from gpustack.server.db import tables
from gpustack.server.db.database import Database
from gpustack.server.feed import Feed
from gpustack.server.views import VISIBLE, Audience, load

NDJSON = "application/x-ndjson"


async def page_of(
    db: Database, kind: str, principal: Principal, page: int, per_page: int, *where: Any
) -> Page[Any]:
    """One page of the objects of `kind`, oldest first, as `principal` sees them."""
    table: Any = tables.WATCHED[kind]
    if principal.worker_id is not None:
        where = (*where, table.worker_id == principal.worker_id)
    async with db.read() as session:
        total = (await session.exec(select(func.count(col(table.id))).where(*where))).one()
        query = select(table.id).where(*where).order_by(col(table.id))
        ids = (await session.exec(query.offset((page - 1) * per_page).limit(per_page))).all()
        found = await load(session, kind, list(ids))
    audience = Audience.of(principal)
    return Page(
        items=[one.view(audience) for one in found], pagination=pagination(page, per_page, total)
    )


def watch_of(
    feed: Feed, kinds: frozenset[str], principal: Principal, since: str | None
) -> StreamingResponse:
    """The stream of changes of `kinds`, as `principal` sees them.

    Raises:
        BadRequest: a kind does not exist.
        Forbidden: a kind is not this principal's to see.
    """
    unknown = kinds - set(tables.WATCHED)
    if unknown or not kinds:
        known = ", ".join(sorted(tables.WATCHED))
        raise BadRequest(f"kinds: want some of {known}, got {','.join(sorted(unknown)) or 'none'}")
    audience = Audience.of(principal)
    hidden = kinds - VISIBLE[audience.kind]
    if hidden:
        raise Forbidden(f"this credential may not watch {', '.join(sorted(hidden))}")
    lines = feed.watch(kinds, audience, since, principal.credential_id)
    return StreamingResponse(lines, media_type=NDJSON)
