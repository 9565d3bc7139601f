"""Users, and what goes with them: sessions, API keys, and the nodes' own way in."""

from sqlmodel import col, select

from gpustack.errors import Conflict, Unauthorized
from gpustack.schemas.credentials import CredentialKind
from gpustack.schemas.users import Source
from gpustack.server.db.database import ReadSession, WriteSession, find, touch
from gpustack.server.db.tables import Credential, User

#: Those with a password come first: their way in is never away.
_ADMINS = (
    select(User)
    .where(col(User.is_admin), col(User.is_active))
    .order_by(col(User.source) != Source.LOCAL, col(User.id))
)


async def first_admin(session: ReadSession) -> User | None:
    """An administrator that is not disabled, and has a password if any of them has.

    Of several, the one that was made first. None: there is none yet.
    """
    return (await session.exec(_ADMINS.limit(1))).first()


async def who_asks(session: ReadSession, user_id: int | None) -> User:
    """The user whose credential was shown.

    Raises:
        Unauthorized: the user was deleted meanwhile.
    """
    row = await find(session, User, user_id)
    if row is None:
        raise Unauthorized("your user is gone")
    return row


def expect_local(user: User) -> None:
    """Raises:
    Conflict: it comes from an identity provider, which alone knows its password.
    """
    if user.source != Source.LOCAL:
        raise Conflict(
            f"{user.username} logs in with an identity provider and has no password here: change "
            "it there"
        )


async def set_password(
    session: WriteSession,
    user: User,
    password_hash: str,
    *,
    must_change: bool,
    keep: int | None = None,
) -> None:
    """Give `user` a password. The user's sessions end; API keys stay.

    Args:
        must_change: whoever logs in with it has to choose another before anything else.
        keep: the credential's id of the one session that goes on.

    Raises:
        Conflict: the user has none here.
    """
    expect_local(user)
    user.password_hash = password_hash
    user.generation += 1
    user.require_password_change = must_change
    sessions = (Credential.user_id == user.id, Credential.kind == CredentialKind.SESSION)
    for one in (await session.exec(select(Credential).where(*sessions))).all():
        if one.id == keep:
            touch(session, one)  # what it shows depends on its user
        else:
            await session.delete(one)


async def tell_of(session: WriteSession, user: User) -> None:
    """Make everybody look again at what the user's credentials stand for."""
    for one in (await session.exec(select(Credential).where(Credential.user_id == user.id))).all():
        touch(session, one)


async def disable(session: WriteSession, user: User) -> None:
    """Nothing of `user` opens anything, until it is enabled again; sessions end for good.

    Raises:
        Conflict: it is the last administrator.
    """
    if user.is_admin:
        await _make_way(session, user)
    user.is_active = False
    user.generation += 1
    sessions = (Credential.user_id == user.id, Credential.kind == CredentialKind.SESSION)
    for one in (await session.exec(select(Credential).where(*sessions))).all():
        await session.delete(one)
    await session.flush()


async def step_down(session: WriteSession, user: User) -> None:
    """`user` is no administrator any more.

    Raises:
        Conflict: nobody else is one.
    """
    await _make_way(session, user)
    user.is_admin = False
    user.generation += 1
    await session.flush()


async def _make_way(session: WriteSession, user: User) -> None:
    """Somebody else administrates from now on.

    Raises:
        Conflict: nobody else can.
    """
    # Locked, all of them and in one order: of two that go at once, one sees the other.
    found = await session.exec(_ADMINS.with_for_update())
    other = next((one for one in found if one.id != user.id), None)
    if other is None:
        raise Conflict(f"{user.username} is the last administrator: make another user one first")
    # On its own machine a server's command line acts as an administrator: as another one now.
    local = (Credential.user_id == user.id, Credential.kind == CredentialKind.LOCAL)
    for one in (await session.exec(select(Credential).where(*local))).all():
        one.user_id = other.id


async def remove_user(session: WriteSession, user: User) -> None:
    """Delete the user with all sessions and API keys.

    Raises:
        Conflict: it is the last administrator.
    """
    if user.is_admin:
        await step_down(session, user)
    for one in (await session.exec(select(Credential).where(Credential.user_id == user.id))).all():
        await session.delete(one)
    await session.flush()
    await session.delete(user)
