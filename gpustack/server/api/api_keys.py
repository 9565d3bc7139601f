"""/v2/api-keys: the keys of the user who asks."""

import secrets
from datetime import UTC, datetime, timedelta

from fastapi import APIRouter, Response
from sqlalchemy import func
from sqlmodel import col, select

from gpustack.errors import NotFound
from gpustack.lib.secrets import digest
from gpustack.schemas.base import Page
from gpustack.schemas.credentials import (
    ApiKey,
    ApiKeyCreate,
    ApiKeyCreated,
    ApiKeyUpdate,
    CredentialKind,
    Scope,
)
from gpustack.server.api.context import Db, Id, PageNumber, PerPage, pagination
from gpustack.server.auth.principals import AnyUser, Principal
from gpustack.server.db.database import ReadSession
from gpustack.server.db.tables import Credential

router = APIRouter(prefix="/v2/api-keys", tags=["api-keys"])


@router.get("")
async def list_keys(
    db: Db, user: AnyUser, page: PageNumber = 1, perPage: PerPage = 100
) -> Page[ApiKey]:
    where = (Credential.kind == CredentialKind.KEY, Credential.user_id == user.user_id)
    async with db.read() as session:
        total = (await session.exec(select(func.count(col(Credential.id))).where(*where))).one()
        query = select(Credential).where(*where).order_by(col(Credential.id))
        rows = (await session.exec(query.offset((page - 1) * perPage).limit(perPage))).all()
    return Page(
        items=[ApiKey.model_validate(row, from_attributes=True) for row in rows],
        pagination=pagination(page, perPage, total),
    )


@router.post("", status_code=201)
async def create_key(db: Db, user: AnyUser, wanted: ApiKeyCreate) -> ApiKeyCreated:
    """Make a key. Its value is in this answer and nowhere else."""
    access, secret = secrets.token_hex(8), secrets.token_hex(16)
    value = f"gpustack_{access}_{secret}"
    row = Credential(
        kind=CredentialKind.KEY,
        digest=digest(value),
        name=wanted.name,
        description=wanted.description,
        prefix=f"gpustack_{access}",
        user_id=user.user_id,
        scopes=[Scope.ALL],
        expires_at=(
            datetime.now(UTC) + timedelta(seconds=wanted.expires_in) if wanted.expires_in else None
        ),
    )
    async with db.write() as session:
        session.add(row)
    return ApiKeyCreated.model_validate(row.model_dump() | {"value": value})


@router.get("/{key_id}")
async def get_key(db: Db, user: AnyUser, key_id: Id) -> ApiKey:
    async with db.read() as session:
        return ApiKey.model_validate(await _own(session, user, key_id), from_attributes=True)


@router.put("/{key_id}")
async def update_key(db: Db, user: AnyUser, key_id: Id, wanted: ApiKeyUpdate) -> ApiKey:
    """Change what a key is called. Its value and its end stay."""
    async with db.write() as session:
        row = await _own(session, user, key_id)
        row.sqlmodel_update(wanted.model_dump())
    return ApiKey.model_validate(row, from_attributes=True)


@router.delete("/{key_id}", status_code=204)
async def delete_key(db: Db, user: AnyUser, key_id: Id) -> Response:
    """End a key, everywhere."""
    async with db.write() as session:
        await session.delete(await _own(session, user, key_id))
    return Response(status_code=204)


async def _own(session: ReadSession, user: Principal, key_id: int) -> Credential:
    """The key, if it is the user's; another's is as good as none."""
    row = await session.get(Credential, key_id)
    if row is None or row.kind != CredentialKind.KEY or row.user_id != user.user_id:
        raise NotFound(f"you have no API key with id {key_id}")
    return row
