"""The way in through a SAML identity provider; `server.auth.saml` says how a login goes."""

import logging
from dataclasses import asdict
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any, Final
from urllib.parse import parse_qsl, urlencode

from fastapi import APIRouter, Depends, Query, Request, Response

from gpustack.config.options import Settings
from gpustack.errors import BadRequest, Forbidden, NotFound, TooLarge, TooMany, raises
from gpustack.lib.secrets import new_secret
from gpustack.schemas.users import Source
from gpustack.server.api.context import Db, raw_body
from gpustack.server.api.pages import Navigated
from gpustack.server.api.repeated import Repeated
from gpustack.server.auth import external
from gpustack.server.auth.in_turn import InTurn
from gpustack.server.auth.principals import Sender, Stranger
from gpustack.server.auth.sessions import LOGIN_COOKIE, cookie, login_cookie, no_login_cookie
from gpustack.server.db import saml_messages

if TYPE_CHECKING:  # an extra, and slow to import
    from gpustack.server.auth.saml import ServiceProvider
    from gpustack.server.auth.saml_messages import Assertion

logger = logging.getLogger(__name__)


class _Route(Navigated, Repeated):
    pass


router = APIRouter(prefix="/auth/saml", tags=["auth"], route_class=_Route)

#: Of a form; base64 and percent signs make three bytes of two.
BODY_LIMIT: Final = 512 * 1024
#: An identity provider sends four.
_MOST_FIELDS: Final = 16
METADATA_TYPE: Final = "application/samlmetadata+xml"

_in_turn = InTurn("saml")
_NOT_KEPT: Final = {"Cache-Control": "no-store"}
_FORM: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/x-www-form-urlencoded": {
                "schema": {
                    "type": "object",
                    "properties": {"SAMLResponse": {"type": "string"}},
                    "required": ["SAMLResponse"],
                }
            }
        },
    }
}


@raises(NotFound)
async def _provider(request: Request) -> "ServiceProvider":
    provider: ServiceProvider | None = request.app.state.providers.get(Source.SAML)
    if provider is None:
        raise NotFound(
            "SAML is not configured on this server: an administrator can do that with "
            "--saml-idp-server-url and the options that it needs"
        )
    return provider


Provider = Annotated[Any, Depends(_provider)]


class Metadata(Response):
    media_type = METADATA_TYPE


@router.get("/metadata", response_class=Metadata)
async def get_saml_metadata(provider: Provider) -> Response:
    """What an identity provider has to know of this server: give it the URL or the document."""
    return Metadata(provider.metadata)


@router.get("/login", status_code=303, response_class=Response)
@raises(TooMany)
async def begin_saml_login(provider: Provider, sender: Stranger) -> Response:
    """Send a browser to the identity provider."""
    from gpustack.server.auth.saml import new_browser_secret

    secret = new_browser_secret()
    at = await _in_turn(lambda: provider.login_at(secret))
    return _to(at, login_cookie(secret, sender.scheme))


@router.post("/callback", status_code=303, response_class=Response, openapi_extra=_FORM)
@raises(BadRequest, Forbidden, TooLarge, TooMany)
async def take_saml_response(
    request: Request, db: Db, provider: Provider, sender: Stranger
) -> Response:
    """Take the identity provider's answer, which it has the browser post here."""
    form = _fields(await raw_body(request, BODY_LIMIT))
    answers = [value for name, value in form if name == "SAMLResponse"]
    if len(answers) != 1:
        raise BadRequest("want a form with one SAMLResponse: logins begin at /auth/saml/login")
    said = await _accepted(provider, answers[0], sender)
    who = _profile(said, provider, request.app.state.settings, sender)
    provider_session = {
        "source": Source.SAML,
        "name_id": dict(said.name_id),
        "session_index": said.session_index,
    }
    ticket = new_secret() + new_secret()
    async with db.write() as session:
        await saml_messages.take(
            session,
            said.id,
            said.ends_at,
            request_id=said.request_id,
            ticket=ticket,
            content={"profile": asdict(who), "provider_session": provider_session},
        )
    return _to(f"/auth/saml/callback?{urlencode({'ticket': ticket})}")


async def _accepted(provider: "ServiceProvider", answer: str, sender: Sender) -> "Assertion":
    from gpustack.server.auth.saml_messages import Refused

    try:
        return await _in_turn(lambda: provider.accept(answer))
    except Refused as error:
        # A stranger may have written it: no line ends, and not too much.
        logger.warning("a SAML answer from %s was refused: %.500r", sender.peer, error.reason)
        raise Forbidden(error.sentence) from None


def _profile(
    said: "Assertion", provider: "ServiceProvider", settings: Settings, sender: Sender
) -> external.Profile:
    try:
        return external.profile(
            said.attributes,
            settings,
            issuer=provider.parties.idp,
            subject=said.subject,
            source=Source.SAML,
            name=said.name_id["Value"],
            prefix=provider.prefix,
        )
    except Forbidden as error:
        logger.warning("a SAML answer from %s was refused: %s", sender.peer, error)
        raise


@router.get("/callback", status_code=303, response_class=Response)
@raises(BadRequest, Forbidden)
async def finish_saml_login(
    request: Request,
    db: Db,
    provider: Provider,
    sender: Stranger,
    ticket: Annotated[str | None, Query(max_length=128)] = None,
) -> Response:
    """Open the session of the browser that asked for the answer."""
    from gpustack.server.auth.saml import asked_for

    if ticket is None:
        raise BadRequest(
            "the identity provider has to post its answer: an administrator has to set the binding "
            f"HTTP-POST there; logins begin at {provider.login_url}"
        )
    async with db.write() as session:
        message = await saml_messages.taken_with(session, ticket)
        if message is None:
            raise Forbidden(f"this login is over: begin again at {provider.login_url}")
        if not asked_for(request.cookies.get(LOGIN_COOKIE, ""), message.request_id):
            raise Forbidden(
                "this browser has not begun this login, or longer ago than 10 minutes, or under "
                f"another address: begin again at {provider.login_url}"
            )
        content = await saml_messages.redeem(session, message)
    who = external.Profile(**content["profile"])
    secret = await external.log_in(
        db, who, peer=sender.peer, provider_session=content["provider_session"]
    )
    return _to("/", cookie(secret, sender.scheme), no_login_cookie(sender.scheme))


@router.get("/logout/callback", status_code=303, response_class=Response)
@raises(BadRequest, Forbidden, TooMany)
async def take_saml_logout(
    request: Request, db: Db, provider: Provider, sender: Stranger
) -> Response:
    """End sessions that the identity provider has ended, or hear that it ended one of ours.

    What it says to the latter changes nothing here: the session was over before it was asked.
    """
    from gpustack.server.auth.saml_messages import Refused

    if not provider.single_logout:
        raise NotFound("this server has no single logout: see --saml-idp-logout-url")
    query: bytes = request.scope["query_string"]
    fields = dict(_fields(query))
    if "SAMLRequest" not in fields:
        return _to("/")
    text = query.decode(errors="replace")
    try:
        wanted = await _in_turn(lambda: provider.accept_logout(text))
    except Refused as error:
        logger.warning("a SAML logout from %s was refused: %.500r", sender.peer, error.reason)
        raise Forbidden(error.sentence) from None
    async with db.write() as session:
        await saml_messages.take(session, wanted.id, wanted.ends_at)
        await saml_messages.end_sessions(
            session, provider.parties.idp, wanted.subject, wanted.session_indexes
        )
    relay_state = fields.get("RelayState")
    return _to(await _in_turn(lambda: provider.logged_out_at(wanted.id, relay_state)))


def _fields(raw: bytes) -> list[tuple[str, str]]:
    """Of a form or a query, in their order.

    Raises:
        BadRequest: there are too many.
    """
    text = raw.decode(errors="replace")
    try:
        return parse_qsl(text, keep_blank_values=True, max_num_fields=_MOST_FIELDS)
    except ValueError:
        raise BadRequest(
            f"want at most {_MOST_FIELDS} fields: logins begin at /auth/saml/login"
        ) from None


def _to(url: str, *cookies: str) -> Response:
    """Send the browser on."""
    answer = Response(status_code=HTTPStatus.SEE_OTHER, headers={"Location": url} | _NOT_KEPT)
    for one in cookies:
        answer.headers.append("Set-Cookie", one)
    return answer
