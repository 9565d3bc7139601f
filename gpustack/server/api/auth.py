"""Ways in: which there are, log in, log out, change the password."""

import logging
from typing import Any
from urllib.parse import parse_qs

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sqlmodel import select

from gpustack.errors import (
    BadRequest,
    Conflict,
    Forbidden,
    Invalid,
    TooLarge,
    TooMany,
    Unauthorized,
    raises,
)
from gpustack.schemas.credentials import CredentialKind
from gpustack.schemas.users import AuthConfig, LoggedOut, PasswordUpdate, Source
from gpustack.server.api.context import Db, raw_body
from gpustack.server.api.repeated import Repeated
from gpustack.server.auth import passwords
from gpustack.server.auth.external import Elsewhere
from gpustack.server.auth.principals import LoggedIn, Stranger
from gpustack.server.auth.sessions import begin, cookie, no_cookie
from gpustack.server.auth.throttle import Throttle
from gpustack.server.db.database import Database, find
from gpustack.server.db.tables import Credential, User
from gpustack.server.db.users import expect_local, first_admin, set_password, who_asks

logger = logging.getLogger(__name__)

router = APIRouter(prefix="/auth", tags=["auth"], route_class=Repeated)

LOGIN_BODY_LIMIT = 8192

_WRONG = (
    "the user name or the password is wrong: try again, or ask an administrator for a new "
    "password; `gpustack reset-admin-password` on the server's machine makes the first "
    "administrator one; users of an identity provider have no password here, and log in there"
)


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


@router.get("/config")
async def get_auth_config(request: Request, db: Db) -> AuthConfig:
    """The ways in, for the login page."""
    async with db.read() as session:
        admin = await first_admin(session)
    # Every change of a user is a generation; a password that was reset is not the first one.
    first_time = admin is not None and admin.require_password_change and admin.generation == 1
    there = request.app.state.providers
    return AuthConfig(
        is_local=True,
        is_oidc=Source.OIDC in there,
        is_saml=Source.SAML in there,
        first_time_setup=first_time,
    )


@router.post("/login", status_code=204, openapi_extra=_FORM)
@raises(BadRequest, Unauthorized, Forbidden, TooLarge, TooMany)
async def login(request: Request, db: Db, sender: Stranger) -> Response:
    """Open a session. Body: a form or JSON with username and password."""
    sender.refuse_foreign_page()  # else it could have its visitors act as a user of its choice
    form = await _form(request)
    throttle: Throttle = request.app.state.throttle
    try:
        with throttle.attempt(form.username, sender.peer) as attempt:
            secret = await _open_session(db, form)
            attempt.right = True
    except (Unauthorized, TooMany) as error:
        # Without the name: people type passwords into the wrong field.
        logger.info("a login from %s was refused: %s", sender.peer, error)
        raise
    return Response(status_code=204, headers={"Set-Cookie": cookie(secret, sender.scheme)})


async def _open_session(db: Database, form: LoginForm) -> str:
    """The secret of a new session.

    Raises:
        Unauthorized: user name or password are wrong, or the user has none here. Neither the
        answer nor its time tells which.
    """
    async with db.read() as session:
        user = (
            await session.exec(select(User).where(User.username == form.username))
        ).one_or_none()
    if user is not None and user.username != form.username:
        user = None  # MySQL compares without spaces at the end; the throttle does not
    if not await passwords.matches(form.password, user.password_hash if user else None) or not user:
        raise Unauthorized(_WRONG)
    if not user.is_active:  # nor does anybody learn that it is disabled
        raise Unauthorized(_WRONG)
    async with db.write() as session:
        now = await find(session, User, user.id)
        # Changed while it was compared.
        if now is None or not now.is_active or now.password_hash != user.password_hash:
            raise Unauthorized(_WRONG)
        return begin(session, now)


@router.post("/logout", status_code=204, responses={200: {"model": LoggedOut}})
async def logout(request: Request, db: Db, user: LoggedIn, sender: Stranger) -> Response:
    """End the session that asks, on the server too.

    Where an identity provider has a session of its own, the answer says where to end that.
    """
    kept = None
    if user.kind is CredentialKind.SESSION:
        async with db.write() as session:
            row = await find(session, Credential, user.credential_id)
            if row is not None:
                kept = row.provider_session
                await session.delete(row)
    headers = {"Set-Cookie": no_cookie(sender.scheme)}
    if kept is not None:
        provider: Elsewhere | None = request.app.state.providers.get(kept.get("source"))
        url = await provider.logout_url(kept) if provider is not None else None
        if url is not None:
            return JSONResponse(LoggedOut(logout_url=url).model_dump(), headers=headers)
    return Response(status_code=204, headers=headers)


@router.post("/update-password", status_code=204)
@raises(Conflict, TooMany)
async def update_password(
    request: Request, db: Db, user: LoggedIn, sender: Stranger, change: PasswordUpdate
) -> Response:
    """Change the own password. Every other session of the user ends."""
    async with db.read() as session:
        row = await who_asks(session, user.user_id)
    expect_local(row)
    throttle: Throttle = request.app.state.throttle
    with throttle.attempt(row.username, sender.peer) as attempt:
        if not await passwords.matches(change.current_password, row.password_hash):
            raise Unauthorized(
                "the current password is wrong: try again, or ask an administrator for a new one"
            )
        attempt.right = True
    passwords.check_policy(change.new_password)
    if change.new_password == change.current_password:
        raise Invalid("the new password is the current one: choose another")
    hashed = await passwords.hash_password(change.new_password)
    compared = row.password_hash
    async with db.write() as session:
        row = await who_asks(session, user.user_id)
        if row.password_hash != compared:  # by an administrator, perhaps: that one stands
            raise Unauthorized("the password was changed meanwhile: log in with the new one")
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
