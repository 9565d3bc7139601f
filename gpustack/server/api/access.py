"""/v2/models/{id}/access: to whom a model is granted."""

from fastapi import APIRouter

from gpustack.errors import Conflict, raises
from gpustack.schemas import wire
from gpustack.schemas.access import ModelAccess, ModelAccessUpdate
from gpustack.schemas.audit import Action
from gpustack.schemas.models import AccessPolicy
from gpustack.server.api import specs
from gpustack.server.api.context import Db, Id
from gpustack.server.api.repeated import Repeated
from gpustack.server.auth.principals import Admin
from gpustack.server.db import audit_log, tables
from gpustack.server.db.access import grant, granted_groups, granted_users
from gpustack.server.db.audited import Entry
from gpustack.server.db.database import ReadSession, get

router = APIRouter(prefix="/v2/models", tags=["models"], route_class=Repeated)


@router.get("/{model_id}/access")
async def get_model_access(db: Db, admin: Admin, model_id: Id) -> ModelAccess:
    async with db.read() as session:
        return await _access(session, await get(session, tables.Model, model_id))


@router.put("/{model_id}/access")
@raises(Conflict)
async def update_model_access(
    db: Db, admin: Admin, model_id: Id, wanted: ModelAccessUpdate
) -> ModelAccess:
    """Say to whom the model is granted: to these, and to no others.

    That counts while its `access_policy` is `allowed_users`; it is kept while it is not.
    """
    async with db.write() as session:
        row = await specs.to_edit(session, model_id)
        before = await _access(session, row)
        await grant(session, row, wanted.user_ids, wanted.group_ids)
        after = await _access(session, row)
        if before != after:
            entry = Entry(Action.UPDATE, wire.MODELS, row.id, row.name)
            entry.before, entry.after = _names(before), _names(after)
            audit_log.add(session, entry)
    return after


async def _access(session: ReadSession, row: tables.Model) -> ModelAccess:
    model_id = row.key()[1]
    return ModelAccess(
        access_policy=AccessPolicy(row.access_policy),
        users=await granted_users(session, model_id),
        groups=await granted_groups(session, model_id),
    )


def _names(access: ModelAccess) -> dict[str, list[str]]:
    return {
        "granted_users": [user.username for user in access.users],
        "granted_groups": [group.name for group in access.groups],
    }
