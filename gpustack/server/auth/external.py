"""Users from elsewhere: an identity provider says who they are, and its kind,
issuer and subject who is who.

Never by a name: names are chosen by people, there and here.
"""

import asyncio
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

from sqlalchemy.exc import IntegrityError
from sqlmodel import col, select

from gpustack.config.options import Settings
from gpustack.errors import Contended, Forbidden
from gpustack.schemas.events import ActorKind
from gpustack.schemas.users import USERNAME_LENGTH, Source
from gpustack.server.auth import sessions
from gpustack.server.db.acting import Actor, become
from gpustack.server.db.database import Database, WriteSession, find
from gpustack.server.db.tables import ISSUER_LENGTH, SUBJECT_LENGTH, Identity, User

#: What is a user name, and so on, where no option says so; the first that is there.
_NAMES: Final = ("preferred_username", "email")
_FULL_NAME, _AVATAR_URL = "name", "picture"
FULL_NAME_LENGTH: Final = 128
AVATAR_URL_LENGTH: Final = 2048
#: How long to let others go first, at most, before each further try: they made the same user, or
#: one of the same name.
_PAUSES_S: Final = (0.05, 0.1, 0.2, 0.4, 0.8)
#: Names that are looked up at a time.
_CHUNK: Final = 50


class Elsewhere(Protocol):
    """An identity provider, as a logout knows it."""

    async def logout_url(self, provider_session: Mapping[str, Any]) -> str | None:
        """Where a browser ends its session there; None: nowhere.

        Args:
            provider_session: what was kept at the login.
        """


@dataclass(frozen=True, slots=True)
class Profile:
    """What an identity provider says of a user who has logged in there.

    Attributes:
        source, issuer, subject: who it is, for ever.
        username: wanted at the first login; one that may be a user's name.
        full_name: None: the provider says none, and what is known stays.
        avatar_url: of http or https; None: there is none.
    """

    issuer: str
    subject: str
    username: str
    full_name: str | None
    avatar_url: str | None
    source: Source


def profile(
    said: Mapping[str, Any],
    settings: Settings,
    *,
    issuer: str,
    subject: str,
    source: Source,
    name: str | None = None,
    prefix: str = "",
) -> Profile:
    """PURE: a profile of what was checked before.

    Args:
        said: claims or attributes; of several values the first counts.
        name: the user name where nothing else is one; None: the subject.
        prefix: of the names of the attributes that are read.

    Raises:
        Forbidden: nobody can be known by that.
    """
    _expect_key("issuer", issuer, ISSUER_LENGTH)
    _expect_key("subject", subject, SUBJECT_LENGTH)
    if settings.external_auth_name is not None:
        wanted = _text(said.get(prefix + settings.external_auth_name))
        if not wanted:
            raise Forbidden(
                f"the identity provider sent no {prefix}{settings.external_auth_name}, which "
                "--external-auth-name asks for: an administrator has to have it sent, or to name "
                f"another of {', '.join(sorted(said)) or 'nothing'}"
            )
    else:
        wanted = next(
            (text for one in _NAMES if (text := _text(said.get(prefix + one)))), name or subject
        )
    parts = (settings.external_auth_full_name or _FULL_NAME).split("+")
    full_name = " ".join(text for part in parts if (text := _text(said.get(prefix + part.strip()))))
    avatar = _text(said.get(prefix + (settings.external_auth_avatar_url or _AVATAR_URL)))
    return Profile(
        issuer=issuer,
        subject=subject,
        username=_as_username(wanted),
        full_name=full_name[:FULL_NAME_LENGTH].strip() or None,
        avatar_url=avatar if _is_picture(avatar) else None,
        source=source,
    )


def _expect_key(what: str, value: str, longest: int) -> None:
    """Databases compare some texts that differ as if they did not: such is nobody's."""
    if not value or not value.isprintable() or value != value.strip() or len(value) > longest:
        raise Forbidden(
            f"the identity provider's {what} cannot be kept: want 1 to {longest} letters, digits "
            "and signs, without spaces at the ends; its administrator has to have another sent"
        )


def _text(value: Any) -> str:
    """One line of it; empty: there is none."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = next(iter(value), None)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        return ""
    return " ".join("".join(one if one.isprintable() else " " for one in value).split())


def _as_username(wanted: str) -> str:
    return "".join("-" if one.isspace() or one in ":/" else one for one in wanted)[:USERNAME_LENGTH]


def _is_picture(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    fits = len(url) <= AVATAR_URL_LENGTH and " " not in url
    return fits and parts.scheme in {"http", "https"} and bool(parts.netloc)


async def log_in(
    db: Database,
    who: Profile,
    *,
    peer: str,
    provider_session: dict[str, Any] | None = None,
) -> str:
    """The secret of a new session of the user whom `who` describes; made at the first login.

    Args:
        peer: address that the login comes from.
        provider_session: what the identity provider needs to end its own session.

    Raises:
        Forbidden: the user is disabled.
        Contended: others were first, again and again.
    """
    for pause_s in _PAUSES_S:
        try:
            return await _log_in(db, who, peer, provider_session)
        except (IntegrityError, Contended):
            await asyncio.sleep(random.uniform(0, pause_s))  # noqa: S311
    try:
        return await _log_in(db, who, peer, provider_session)
    except IntegrityError:
        raise Contended from None


async def _log_in(
    db: Database, who: Profile, peer: str, provider_session: dict[str, Any] | None
) -> str:
    these = (
        Identity.source == who.source,
        Identity.issuer == who.issuer,
        Identity.subject == who.subject,
    )
    async with db.write() as session:
        found = (await session.exec(select(Identity.user_id).where(*these))).one_or_none()
        user = None if found is None else await find(session, User, found)
        if user is None:
            user = await _make(session, who)
        elif not user.is_active:
            raise Forbidden("this user is disabled: ask an administrator")
        else:
            _update(user, who)
        become(
            Actor(
                ActorKind.USER,
                user.username,
                user_id=user.id,
                credential_kind=who.source,
                credential_name=who.issuer,
                peer=peer,
            )
        )
        return sessions.begin(session, user, provider_session)


async def _make(session: WriteSession, who: Profile) -> User:
    user = User(
        username=await _free_name(session, who.username),
        full_name=who.full_name,
        avatar_url=who.avatar_url,
        source=who.source,
        password_hash="",
    )
    session.add(user)
    await session.flush()
    assert user.id is not None  # noqa: S101  it was flushed
    session.add(
        Identity(user_id=user.id, source=who.source, issuer=who.issuer, subject=who.subject)
    )
    await session.flush()
    return user


def _update(user: User, who: Profile) -> None:
    said = {"full_name": who.full_name or user.full_name, "avatar_url": who.avatar_url}
    changes = {name: value for name, value in said.items() if getattr(user, name) != value}
    if changes:
        user.sqlmodel_update(changes | {"generation": user.generation + 1})


async def _free_name(session: WriteSession, wanted: str) -> str:
    """`wanted`, or that with the first number that makes it nobody's."""
    names = _names(wanted)
    while True:
        some = [next(names) for _ in range(_CHUNK)]
        taken = set(await session.exec(select(User.username).where(col(User.username).in_(some))))
        for name in some:
            if name not in taken:
                return name


def _names(wanted: str) -> Iterator[str]:
    yield wanted
    for number in count(2):
        end = f"-{number}"
        yield wanted[: USERNAME_LENGTH - len(end)] + end
