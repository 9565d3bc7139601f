"""/v2/api-keys: the keys of the user who asks."""

import secrets
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from fastapi import APIRouter, Response
from sqlmodel import select

from gpustack.errors import BadRequest, Conflict, Forbidden, NotFound, raises
from gpustack.lib.secrets import digest
from gpustack.schemas import wire
from gpustack.schemas.base import Page
from gpustack.schemas.credentials import (
    ApiKey,
    ApiKeyCreate,
    ApiKeyCreated,
    ApiKeyUpdate,
    CredentialKind,
    Scope,
)
from gpustack.server.api.conditions import IfMatch, change, expect, tag
from gpustack.server.api.context import Changes, Db, Id
from gpustack.server.api.lists import Asked, WatchQuery, listed
from gpustack.server.api.repeated import Repeated
from gpustack.server.api.streams import WATCHED
from gpustack.server.auth.principals import AnyUser, Principal
from gpustack.server.db.database import ReadSession, WriteSession, find
from gpustack.server.db.tables import Credential
from gpustack.server.db.users import who_asks
from gpustack.server.views import api_key_view

router = APIRouter(prefix="/v2/api-keys", tags=["api-keys"], route_class=Repeated)


class KeyQuery(WatchQuery):
    TABLE, KIND = Credential, wire.API_KEYS
    SORTED = ("name", "created_at", "expires_at")

    name: str | None = None


@router.get("", response_model=Page[ApiKey], responses=WATCHED)
@raises(BadRequest)
async def list_api_keys(db: Db, feed: Changes, user: AnyUser, query: Asked[KeyQuery]) -> Any:
    return await listed(db, feed, user, query)


@router.post("", status_code=201)
@raises(Conflict)
async def create_api_key(db: Db, user: AnyUser, wanted: ApiKeyCreate) -> ApiKeyCreated:
    """Make a key. Its value is in this answer and nowhere else.

    One that is made with another key can do no more than that one.
    """
    _expect_allowed(user, wanted.scope, wanted.allowed_model_names)
    expires_at = (
        datetime.now(UTC) + timedelta(seconds=wanted.expires_in) if wanted.expires_in else None
    )
    if user.kind is CredentialKind.KEY and user.expires_at is not None:
        if expires_at is None or expires_at > user.expires_at:
            raise Forbidden(
                "the key that you use ends: what it makes cannot end later (expires_in)"
            )
    access, secret = secrets.token_hex(8), secrets.token_hex(16)
    value = f"gpustack_{access}_{secret}"
    row = Credential(
        kind=CredentialKind.KEY,
        digest=digest(value),
        name=wanted.name,
        description=wanted.description,
        prefix=f"gpustack_{access}",
        user_id=user.user_id,
        scopes=[*wanted.scope],
        allowed_model_names=wanted.allowed_model_names,
        expires_at=expires_at,
    )
    async with db.write() as session:
        await who_asks(session, user.user_id)
        await _expect_free(session, user, wanted.name)
        session.add(row)
    return ApiKeyCreated.model_validate(api_key_view(row).model_dump() | {"value": value})


@router.get("/{key_id}")
async def get_api_key(db: Db, user: AnyUser, key_id: Id, response: Response) -> ApiKey:
    """The ETag is the generation: an update may name it in If-Match."""
    async with db.read() as session:
        row = await _own(session, user, key_id)
    tag(response, row.generation)
    return api_key_view(row)


@router.put("/{key_id}")
async def update_api_key(
    db: Db, user: AnyUser, key_id: Id, wanted: ApiKeyUpdate, if_match: IfMatch, response: Response
) -> ApiKey:
    """Change what a key is called and what it may do. Its value and its end stay.

    Made from another generation than the present one, it is refused (409) with the key as it is.
    Without If-Match or `generation`, the last writer wins.
    """
    async with db.write() as session:
        await who_asks(session, user.user_id)
        row = await _own(session, user, key_id)
        expect(
            session,
            f"API key {row.name}",
            row.generation,
            header=if_match,
            body=wanted.generation,
            current=api_key_view(row).model_dump(mode="json"),
        )
        if wanted.name != row.name:
            await _expect_free(session, user, wanted.name)
        values: dict[str, Any] = {"name": wanted.name, "description": wanted.description}
        if wanted.scope is not None:
            values["scopes"] = [*wanted.scope]
        if "allowed_model_names" in wanted.model_fields_set:
            values["allowed_model_names"] = wanted.allowed_model_names
        if values.keys() & {"scopes", "allowed_model_names"}:
            allowed = values.get("allowed_model_names", row.allowed_model_names)
            _expect_allowed(user, values.get("scopes", row.scopes), allowed)
        change(row, values)
    tag(response, row.generation)
    return api_key_view(row)


@router.delete("/{key_id}", status_code=204)
async def delete_api_key(db: Db, user: AnyUser, key_id: Id) -> Response:
    """End a key, everywhere."""
    async with db.write() as session:
        await session.delete(await _own(session, user, key_id))
    return Response(status_code=204)


def _expect_allowed(
    user: Principal, scopes: Sequence[str], allowed_model_names: Sequence[str] | None
) -> None:
    """Raises Forbidden: a key would be given more than the credential that gives it has."""
    if Scope.ALL not in user.scopes and (more := set(scopes) - user.scopes):
        raise Forbidden(f"the key that you use has no scope {min(more)}, so it cannot give it")
    mine = user.allowed_model_names
    if mine is not None and (allowed_model_names is None or not mine >= {*allowed_model_names}):
        raise Forbidden(f"the key that you use is for {', '.join(sorted(mine)) or 'no model'} only")


async def _expect_free(session: WriteSession, user: Principal, name: str) -> None:
    """To a writer that has locked the user, so that nobody gives this name to a key meanwhile.

    Raises:
        Conflict: a key of the user's has it.
    """
    its = (Credential.user_id == user.user_id, Credential.kind == CredentialKind.KEY)
    named = select(Credential.id).where(*its, Credential.name == name)
    if (await session.exec(named)).first() is not None:
        raise Conflict(f"you have an API key named {name} already")


async def _own(session: ReadSession, user: Principal, key_id: int) -> Credential:
    """The key, if it is the user's; another's is as good as none."""
    row = await find(session, Credential, key_id)
    if row is None or row.kind != CredentialKind.KEY or row.user_id != user.user_id:
        raise NotFound(f"you have no API key with id {key_id}")
    return row
