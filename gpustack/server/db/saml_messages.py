"""Messages of SAML identity providers: each is taken once, whichever server it comes to."""

from collections.abc import Set
from datetime import datetime
from typing import Any

from sqlalchemy.exc import IntegrityError
from sqlmodel import col, select

from gpustack.errors import Forbidden
from gpustack.lib.secrets import digest
from gpustack.schemas.credentials import CredentialKind
from gpustack.schemas.users import Source
from gpustack.server.db.database import WriteSession
from gpustack.server.db.tables import Credential, Identity, SamlMessage


async def take(
    session: WriteSession,
    message_id: str,
    ends_at: datetime,
    *,
    request_id: str = "",
    ticket: str | None = None,
    content: dict[str, Any] | None = None,
) -> None:
    """Nobody takes the message from now on.

    Args:
        ends_at: it proves nothing from then on.
        ticket: with it, `redeem` gives back request_id and content, once.

    Raises:
        Forbidden: it was taken before.
    """
    session.add(
        SamlMessage(
            digest=digest(message_id),
            ends_at=ends_at,
            request_id=request_id,
            ticket=None if ticket is None else digest(ticket),
            content=content or {},
        )
    )
    try:
        await session.flush()
    except IntegrityError:
        raise Forbidden(
            "this message of the identity provider was used before: begin again"
        ) from None


async def taken_with(session: WriteSession, ticket: str) -> SamlMessage | None:
    """The message that was taken with this ticket, locked; None: none was, or it came back."""
    ours = select(SamlMessage).where(SamlMessage.ticket == digest(ticket))
    return (await session.exec(ours.with_for_update())).one_or_none()


async def redeem(session: WriteSession, message: SamlMessage) -> dict[str, Any]:
    """What was kept of it, which is kept no longer; nor is its ticket good any more."""
    content, message.content, message.ticket = message.content, {}, None
    await session.flush()
    return content


async def end_sessions(
    session: WriteSession, issuer: str, subject: str, session_indexes: Set[str]
) -> None:
    """End what a user's logins at the identity provider opened.

    Args:
        session_indexes: of those logins; empty: all of them.
    """
    these = (
        Identity.source == Source.SAML, Identity.issuer == issuer, Identity.subject == subject,
    )  # fmt: skip
    user_id = (await session.exec(select(Identity.user_id).where(*these))).one_or_none()
    if user_id is None:
        return
    theirs = select(Credential).where(
        col(Credential.user_id) == user_id, Credential.kind == CredentialKind.SESSION
    )
    for one in (await session.exec(theirs)).all():
        index = (one.provider_session or {}).get("session_index")
        if not session_indexes or index is None or index in session_indexes:
            await session.delete(one)
