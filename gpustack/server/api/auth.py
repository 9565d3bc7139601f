"""Ways in: log in, log out, change the password."""

from datetime import UTC, datetime
from typing import Annotated, Any
from urllib.parse import parse_qs

from fastapi import APIRouter, Header, Request, Response
from pydantic import BaseModel
from sqlmodel import select

from gpustack.errors import BadRequest, Invalid, TooLarge, TooMany, Unauthorized, raises
from gpustack.lib.secrets import digest, new_secret
from gpustack.schemas import wire
from gpustack.schemas.credentials import CredentialKind, Scope
from gpustack.schemas.users import PasswordUpdate
from gpustack.server.api.context import Db, raw_body
from gpustack.server.api.repeated import Repeated
from gpustack.server.auth import passwords
from gpustack.server.auth.principals import SESSION_LIFE, LoggedIn
from gpustack.server.db.database import find
from gpustack.server.db.tables import Credential, User
from gpustack.server.db.users import set_password, who_asks

router = APIRouter(prefix="/auth", tags=["auth"], route_class=Repeated)

LOGIN_BODY_LIMIT = 8192


class LoginForm(BaseModel):
    username: str
    password: str


_FIELDS = {
    "type": "object",
    "properties": {"username": {"type": "string"}, "password": {"type": "string"}},
    "required": ["username", "password"],
}
_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            kind: {"schema": _FIELDS}
            for kind in ("application/json", "application/x-www-form-urlencoded")
        },
    }
}


@router.post("/login", status_code=204, openapi_extra=_FORM)
@raises(BadRequest, Unauthorized, TooLarge, TooMany)
async def login(
    request: Request,
    db: Db,
    scheme: Annotated[str, Header(alias=wire.SCHEME_HEADER, include_in_schema=False)] = "http",
) -> Response:
    """Open a session. Body: a form or JSON with username and password."""
    form = await _form(request)
    async with db.read() as session:
        user = (
            await session.exec(select(User).where(User.username == form.username))
        ).one_or_none()
    wrong = Unauthorized("the user name or the password is wrong")
    if not await passwords.matches(form.password, user.password_hash if user else None) or not user:
        raise wrong
    if not user.is_active:  # nor does anybody learn that it is disabled
        raise wrong
    secret = new_secret() + new_secret()
    async with db.write() as session:
        now = await find(session, User, user.id)
        # Changed while it was compared.
        if now is None or not now.is_active or now.password_hash != user.password_hash:
            raise wrong
        session.add(
            Credential(
                kind=CredentialKind.SESSION,
                digest=digest(secret),
                user_id=user.id,
                scopes=[Scope.ALL],
                expires_at=datetime.now(UTC) + SESSION_LIFE,
            )
        )
    response = Response(status_code=204)
    response.set_cookie(
        wire.SESSION_COOKIE,
        secret,
        max_age=int(SESSION_LIFE.total_seconds()),
        httponly=True,
        samesite="lax",
        secure=scheme == "https",
    )
    return response


@router.post("/logout", status_code=204)
async def logout(db: Db, user: LoggedIn) -> Response:
    """End the session that asks, on the server too."""
    if user.kind is CredentialKind.SESSION:
        async with db.write() as session:
            row = await find(session, Credential, user.credential_id)
            if row is not None:
                await session.delete(row)
    response = Response(status_code=204)
    response.delete_cookie(wire.SESSION_COOKIE)
    return response


@router.post("/update-password", status_code=204)
@raises(TooMany)
async def update_password(db: Db, user: LoggedIn, change: PasswordUpdate) -> Response:
    """Change the own password. Every other session of the user ends."""
    async with db.read() as session:
        row = await who_asks(session, user.user_id)
    if not await passwords.matches(change.current_password, row.password_hash):
        raise Unauthorized("the current password is wrong")
    passwords.check_policy(change.new_password)
    if change.new_password == change.current_password:
        raise Invalid("the new password is the current one: choose another")
    hashed = await passwords.hash_password(change.new_password)
    async with db.write() as session:
        row = await who_asks(session, user.user_id)
        await set_password(session, row, hashed, must_change=False, keep=user.credential_id)
    return Response(status_code=204)


async def _form(request: Request) -> LoginForm:
    raw = await raw_body(request, LOGIN_BODY_LIMIT)
    try:
        if request.headers.get("content-type", "").startswith("application/json"):
            return LoginForm.model_validate_json(raw)
        fields = {key: values[-1] for key, values in parse_qs(raw.decode()).items()}
        return LoginForm.model_validate(fields)
    except ValueError:
        raise BadRequest("want username and password, as a form or as JSON") from None
