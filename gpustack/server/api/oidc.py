"""The way in by OpenID Connect: to the identity provider, and back from it."""

import logging
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse

from gpustack.errors import Forbidden, NotFound, Unauthorized, Unavailable, raises
from gpustack.lib.secrets import new_secret
from gpustack.schemas.users import Source
from gpustack.server.api.context import Db
from gpustack.server.api.pages import Navigated
from gpustack.server.auth.external import log_in
from gpustack.server.auth.principals import Stranger
from gpustack.server.auth.sessions import (
    LOGIN_COOKIE,
    cookie,
    login_cookie,
    no_login_cookie,
)

if TYPE_CHECKING:
    from gpustack.server.auth.oidc import Provider

logger = logging.getLogger(__name__)

router = APIRouter(prefix="/auth/oidc", tags=["auth"], route_class=Navigated)


@router.get("/login", status_code=302, response_class=RedirectResponse)
@raises(NotFound, Unavailable)
async def begin_oidc_login(request: Request, sender: Stranger) -> RedirectResponse:
    """Send the browser to the identity provider."""
    secret = new_secret()
    answer = RedirectResponse(await _provider(request).login_url(secret), 302)
    answer.headers["Set-Cookie"] = login_cookie(secret, sender.scheme)
    return answer


@router.get("/callback", status_code=302, response_class=RedirectResponse)
@raises(NotFound, Unauthorized, Forbidden, Unavailable)
async def finish_oidc_login(request: Request, db: Db, sender: Stranger) -> RedirectResponse:
    """Open a session for whom the identity provider sent back, and go to the first page."""
    provider = _provider(request)
    try:
        who = await provider.logged_in(request.query_params, request.cookies.get(LOGIN_COOKIE))
        session = await log_in(
            db,
            who,
            peer=sender.peer,
            provider_session={"source": Source.OIDC, "issuer": who.issuer},
        )
    except (Unauthorized, Forbidden) as error:
        logger.info("a login from %s was refused: %s", sender.peer, error)
        raise
    answer = RedirectResponse("/", 302)
    answer.headers["Set-Cookie"] = cookie(session, sender.scheme)
    answer.headers.append("Set-Cookie", no_login_cookie(sender.scheme))
    return answer


def _provider(request: Request) -> "Provider":
    provider: Provider | None = request.app.state.providers.get(Source.OIDC)
    if provider is None:
        raise NotFound(
            "OpenID Connect is not configured on this server: an administrator can do that with "
            "--oidc-issuer"
        )
    return provider
