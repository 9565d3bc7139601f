"""/v2/audit: who changed what, newest first, and whether the log is as it was written."""

import json
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter
from pydantic import Field
from sqlmodel import col, select

from gpustack.schemas.audit import Action, Audited, AuditEntry
from gpustack.schemas.base import Page
from gpustack.server.api.context import Db
from gpustack.server.api.lists import Asked, IdFilter, ListQuery, page_of
from gpustack.server.api.repeated import Repeated
from gpustack.server.auth.principals import Admin
from gpustack.server.db import audit_log, tables
from gpustack.server.db.database import ReadSession

router = APIRouter(prefix="/v2/audit", tags=["audit"], route_class=Repeated)

Word = Annotated[str | None, Field(max_length=255)]


class AuditQuery(ListQuery):
    TABLE = tables.AuditEntry
    COLUMNS = {"at": tables.AuditEntry.id}  # their ids are in the order of their times
    SORTED = ("at",)

    sort_by: str | None = "-at"
    action: list[Action] = []
    kind: Word = None
    object_id: IdFilter = None
    name: Word = None
    username: Word = None


@router.get("")
async def list_audit_entries(db: Db, admin: Admin, query: Asked[AuditQuery]) -> Page[AuditEntry]:
    """Administrative changes, also of objects and by users that are gone. The newest first."""
    return await page_of(db, query, _shown)


async def _shown(session: ReadSession, ids: Sequence[int]) -> dict[int, AuditEntry]:
    table = tables.AuditEntry
    rows = await session.exec(select(table).where(col(table.id).in_(ids)))
    return {
        row.id: AuditEntry.model_validate(row.model_dump() | {"changed": json.loads(row.changed)})
        for row in rows.all()
    }


@router.get("/verify")
async def verify_audit_log(db: Db, admin: Admin) -> Audited:
    """Check every entry that is kept. Takes seconds where there are a hundred thousand."""
    async with db.read() as session:
        return await audit_log.verify(session)
