"""Who is asking. Every route names the kind of principal it serves as a parameter type."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated

from fastapi import Depends, Request
from sqlmodel import select
from starlette.datastructures import Headers

from gpustack.errors import Forbidden, PasswordChangeRequired, Unauthorized
from gpustack.lib import carriers
from gpustack.lib.origin import is_foreign
from gpustack.lib.secrets import digest, same
from gpustack.schemas import wire
from gpustack.schemas.credentials import CredentialKind, Scope
from gpustack.server.db.bootstrap import ADMIN
from gpustack.server.db.database import Database, ReadSession
from gpustack.server.db.tables import Cluster, Credential, User

SESSION_LIFE = timedelta(hours=2)  # sliding
#: A session's end moves at most this often, so that reading pages is not writing.
SESSION_STEP = timedelta(minutes=5)
SAFE_METHODS = {"GET", "HEAD", "OPTIONS"}


@dataclass(frozen=True, slots=True)
class Principal:
    """A checked credential.

    Attributes:
        credential_id: None for the loopback rule, which needs none.
    """

    kind: CredentialKind
    credential_id: int | None = None
    user_id: int | None = None
    is_admin: bool = False
    worker_id: int | None = None
    scopes: frozenset[Scope] = frozenset()
    password_change_required: bool = False


async def principal(request: Request) -> Principal:
    """The one function that every carrier of credentials goes through.

    Raises:
        Unauthorized: there is no credential, or nobody knows it, or it has expired.
        Forbidden: a cookie came with a request that another site made.
    """
    db: Database = request.app.state.db
    headers = request.headers
    async with db.read() as session:
        by_gateway = await _is_gateway(session, headers.get(wire.GATEWAY_HEADER))
        shown = presented(headers)
        if shown is None:
            if by_gateway and headers.get(wire.LOCAL_HEADER) == "1":
                return await _local_admin(session)
            raise Unauthorized
        found = await resolve(session, shown.secret)
    if shown.cookie and request.method not in SAFE_METHODS and _is_foreign(headers):
        raise Forbidden("this request comes from another site: log in here and try again")
    if found.kind is CredentialKind.SESSION:
        await _slide(db, found)
    return found


def presented(headers: Headers) -> carriers.Shown | None:
    """The secret that a request shows, by the rule that gateways read it by as well."""
    return carriers.shown(headers.items(), wire.SESSION_COOKIE)


def _is_foreign(headers: Headers) -> bool:
    return is_foreign(
        origin=headers.get("origin"),
        host=headers.get("host"),
        fetch_site=headers.get("sec-fetch-site"),
    )


async def resolve(session: ReadSession, secret: str) -> Principal:
    """What `secret` stands for.

    Raises:
        Unauthorized: nothing, or no longer.
    """
    row = (
        await session.exec(select(Credential).where(Credential.digest == digest(secret)))
    ).one_or_none()
    if row is None or (row.expires_at and _aware(row.expires_at) <= datetime.now(UTC)):
        raise Unauthorized("this credential is unknown or has expired")
    user = await session.get(User, row.user_id) if row.user_id else None
    return Principal(
        kind=CredentialKind(row.kind),
        credential_id=row.id,
        user_id=row.user_id,
        is_admin=bool(user and user.is_admin),
        worker_id=row.worker_id,
        scopes=frozenset(Scope(scope) for scope in row.scopes),
        password_change_required=bool(
            user and user.require_password_change and row.kind == CredentialKind.SESSION
        ),
    )


async def _is_gateway(session: ReadSession, secret: str | None) -> bool:
    if secret is None:
        return False
    where = (Credential.digest == digest(secret), Credential.kind == CredentialKind.GATEWAY)
    return (await session.exec(select(Credential.id).where(*where))).first() is not None


async def _local_admin(session: ReadSession) -> Principal:
    user = (await session.exec(select(User).where(User.username == ADMIN))).one()
    return Principal(
        CredentialKind.LOCAL, user_id=user.id, is_admin=True, scopes=frozenset({Scope.ALL})
    )


async def _slide(db: Database, found: Principal) -> None:
    async with db.read() as session:
        row = await session.get(Credential, found.credential_id)
    end = datetime.now(UTC) + SESSION_LIFE
    if row is None or row.expires_at is None or end - _aware(row.expires_at) < SESSION_STEP:
        return
    async with db.write() as session:
        row = await session.get(Credential, found.credential_id)
        if row is not None:
            row.expires_at = end


def _aware(time: datetime) -> datetime:
    """SQLite gives back times without their zone; all of ours are UTC."""
    return time if time.tzinfo else time.replace(tzinfo=UTC)


Anyone = Annotated[Principal, Depends(principal)]


def _user(found: Anyone) -> Principal:
    if found.user_id is None or not found.scopes & {Scope.ALL, Scope.MANAGEMENT}:
        raise Forbidden("this needs a user's login, or an API key with scope management")
    return found


def _settled_user(found: Annotated[Principal, Depends(_user)]) -> Principal:
    if found.password_change_required:
        raise PasswordChangeRequired
    return found


def _admin(found: Annotated[Principal, Depends(_settled_user)]) -> Principal:
    if not found.is_admin:
        raise Forbidden("this needs an administrator")
    return found


def _gateway(found: Anyone) -> Principal:
    if found.kind is not CredentialKind.GATEWAY:
        raise Forbidden("this is for gateways")
    return found


def _worker(found: Anyone) -> Principal:
    if found.kind is not CredentialKind.WORKER:
        raise Forbidden("this is for workers")
    return found


def _watcher(found: Anyone) -> Principal:
    if found.user_id is not None:
        return _admin(_settled_user(_user(found)))
    return found


@dataclass(frozen=True, slots=True)
class Joining:
    """A machine that shows a token to join with, and may do nothing else with it.

    Attributes:
        is_embedded: the token is the one of this node's own agent, not the cluster's.
    """

    is_embedded: bool


async def _joiner(request: Request) -> Joining:
    shown = presented(request.headers)
    token = shown.secret if shown is not None and not shown.cookie else None
    own: str | None = request.app.state.join_token
    if token and own and same(token, own):
        return Joining(is_embedded=True)
    db: Database = request.app.state.db
    async with db.read() as session:
        cluster = await session.get_one(Cluster, 1)
    if not token or not same(digest(token), cluster.token_digest):
        raise Unauthorized(
            "this token is not the cluster's: see <data-dir>/token on the server, and --token"
        )
    return Joining(is_embedded=False)


#: A machine with the cluster's token.
Joiner = Annotated[Joining, Depends(_joiner)]
#: A user who may still have to change the password.
LoggedIn = Annotated[Principal, Depends(_user)]
AnyUser = Annotated[Principal, Depends(_settled_user)]
Admin = Annotated[Principal, Depends(_admin)]
Gateway = Annotated[Principal, Depends(_gateway)]
WorkerAgent = Annotated[Principal, Depends(_worker)]
#: An administrator, a worker or a gateway: each sees what is its own.
Watcher = Annotated[Principal, Depends(_watcher)]
