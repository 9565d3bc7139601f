"""/v2/join-tokens and /v2/cluster-token: with what workers register."""

import asyncio
import logging
import ssl
from collections.abc import Sequence
from urllib.parse import urlsplit

from fastapi import APIRouter, Request, Response
from sqlmodel import col, select

from gpustack.config.options import Settings
from gpustack.errors import NotFound, Unavailable, raises
from gpustack.lib import trust
from gpustack.lib.net import address_towards, url_host
from gpustack.schemas.base import Page
from gpustack.schemas.credentials import (
    ClusterToken,
    CredentialKind,
    JoinToken,
    JoinTokenCreate,
    JoinTokenCreated,
)
from gpustack.server.api.context import Db, Id
from gpustack.server.api.lists import Asked, ListQuery, page_of
from gpustack.server.api.repeated import Repeated
from gpustack.server.auth.principals import Admin
from gpustack.server.db import join_tokens
from gpustack.server.db.database import ReadSession, find
from gpustack.server.db.tables import Credential

HTTPS = 443

logger = logging.getLogger(__name__)

router = APIRouter(prefix="/v2", tags=["join-tokens"], route_class=Repeated)


class TokenQuery(ListQuery):
    TABLE = Credential
    SORTED = ("created_at", "expires_at")


@router.get("/join-tokens")
async def list_join_tokens(db: Db, admin: Admin, query: Asked[TokenQuery]) -> Page[JoinToken]:
    """Those that have been used are among them until they expire, those that have expired until
    another is made.
    """
    return await page_of(db, query, _shown, col(Credential.kind) == CredentialKind.JOIN)


@router.post("/join-tokens", status_code=201)
async def create_join_token(
    request: Request, db: Db, admin: Admin, wanted: JoinTokenCreate
) -> JoinTokenCreated:
    """Make a token with which a worker can register, and nothing else be done.

    Its value is in this answer and nowhere else.
    """
    async with db.write() as session:
        row, value = await join_tokens.create(session, wanted)
    about = await asyncio.to_thread(about_server, request.app.state.settings)
    return JoinTokenCreated.model_validate(row.model_dump() | {"value": value} | about)


@router.delete("/join-tokens/{token_id}", status_code=204)
async def delete_join_token(db: Db, admin: Admin, token_id: Id) -> Response:
    """Nobody registers with it any more. Workers that did go on."""
    async with db.write() as session:
        row = await find(session, Credential, token_id)
        if row is None or row.kind != CredentialKind.JOIN:
            raise NotFound(f"there is no join token with id {token_id}")
        await session.delete(row)
    return Response(status_code=204)


@router.post("/cluster-token/rotate")
@raises(Unavailable)
async def rotate_cluster_token(request: Request, db: Db, admin: Admin) -> ClusterToken:
    """Replace the cluster's own token. Workers that have registered go on.

    The new one is in this answer and in <data-dir>/token of this server.
    """
    settings: Settings = request.app.state.settings
    try:
        async with db.write() as session:
            value = await join_tokens.rotate(session, settings.data_dir)
    except OSError as error:
        raise Unavailable(
            f"{settings.data_dir}/token cannot be written: {error.strerror}"
        ) from None
    return ClusterToken(value=value, is_option=settings.token is not None)


def reached_at(settings: Settings) -> str:
    """Where workers reach this server: as the operator says, else as this machine's routes do."""
    if settings.server_external_url:
        return settings.server_external_url.rstrip("/")
    bound = None if settings.host in {"0.0.0.0", "::"} else settings.host
    host = settings.advertise_address or bound or address_towards(None)
    if settings.ssl_certfile is not None:
        return f"https://{url_host(host)}:{settings.tls_port}"
    return f"http://{url_host(host)}:{settings.port}"


def about_server(settings: Settings) -> dict[str, object]:
    """Where workers reach this server, and how they know it. Blocks."""
    url = reached_at(settings)
    told: dict[str, object] = {"server_url": url}
    parts = urlsplit(url)
    if settings.ssl_certfile is None or (parts.port or HTTPS) != settings.tls_port:
        return told  # what is there shows another key: a proxy's, perhaps
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile, lambda: "")
        pem = settings.ssl_certfile.read_text("latin-1")
        first = pem.partition(ssl.PEM_FOOTER)[0] + ssl.PEM_FOOTER
        told["server_fingerprint"] = trust.fingerprint(
            ssl.PEM_cert_to_DER_cert(first[first.index(ssl.PEM_HEADER) :])
        )
    except (OSError, ValueError) as error:  # the gateway has said what is wrong with it
        logger.warning("no fingerprint for workers: %s", type(error).__name__)
        return told
    vouched = trust.is_vouched_for(context, parts.hostname or "")
    return told | {"server_is_vouched_for": vouched}


async def _shown(session: ReadSession, ids: Sequence[int]) -> dict[int, JoinToken]:
    rows = await session.exec(select(Credential).where(col(Credential.id).in_(ids)))
    return {row.id or 0: JoinToken.model_validate(row, from_attributes=True) for row in rows}
