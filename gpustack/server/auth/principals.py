"""Who is asking. Every route names the kind of principal it serves as a parameter type."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import Depends, Request
from sqlmodel import select
from starlette.datastructures import Headers

from gpustack.errors import (
    Contended,
    DatabaseAway,
    Forbidden,
    PasswordChangeRequired,
    Unauthorized,
    raised,
    raises,
)
from gpustack.lib import carriers
from gpustack.lib.origin import is_foreign
from gpustack.lib.secrets import digest, same
from gpustack.schemas import wire
from gpustack.schemas.credentials import CredentialKind, Scope
from gpustack.schemas.events import ActorKind
from gpustack.server.auth.known import Known
from gpustack.server.auth.last_uses import LastUses
from gpustack.server.auth.sessions import SESSION_LIFE, SESSION_STEP, cookie
from gpustack.server.db.access import groups_of
from gpustack.server.db.acting import Actor, become
from gpustack.server.db.database import Database, find
from gpustack.server.db.join_tokens import join_token
from gpustack.server.db.tables import Cluster, Credential, User
from gpustack.server.db.users import first_admin

SAFE_METHODS = {"GET", "HEAD", "OPTIONS"}


@dataclass(frozen=True, slots=True)
class Principal:
    """A checked credential.

    Attributes:
        credential_id: None for the loopback rule, which needs none.
        allowed_model_names: an API key runs no others; None: all.
        group_ids: that its user is in; of an administrator they say nothing, and are left out.
        expires_at: the end of the credential.
        username, credential_name: as the audit log has them.
    """

    kind: CredentialKind
    credential_id: int | None = None
    user_id: int | None = None
    is_admin: bool = False
    worker_id: int | None = None
    scopes: frozenset[Scope] = frozenset()
    allowed_model_names: frozenset[str] | None = None
    group_ids: frozenset[int] = frozenset()
    expires_at: datetime | None = None
    password_change_required: bool = False
    username: str = ""
    credential_name: str = ""

    @property
    def is_limited(self) -> bool:
        """Whether it may do less than its user may."""
        return Scope.ALL not in self.scopes or self.allowed_model_names is not None

    def as_actor(self, peer: str) -> Actor:
        """Who acts, as events and the audit log say it."""
        if self.user_id is None:
            kind = ActorKind.GATEWAY if self.worker_id is None else ActorKind.WORKER
            return Actor(kind, worker_id=self.worker_id)
        return Actor(
            ActorKind.USER,
            self.username,
            user_id=self.user_id,
            credential_kind=self.kind,
            credential_name=self.credential_name,
            peer=peer,
        )


@raises(Unauthorized, Forbidden, Contended, DatabaseAway)
async def principal(request: Request) -> Principal:
    """The one function that every carrier of credentials goes through. Who is found acts from now.

    Raises:
        Unauthorized: there is no credential, or nobody knows it, or it has expired.
        Forbidden: a cookie came with a request that another site made.
    """
    db: Database = request.app.state.db
    known: Known[Principal] = request.app.state.known
    sent = await sender(request)
    shown = presented(request.headers)
    if shown is not None:
        found = await resolve(db, known, shown.secret)
    elif sent.is_local:
        found = await _local_admin(db)
    else:
        raise Unauthorized
    become(found.as_actor(sent.peer))
    if shown is not None and shown.cookie and request.method not in SAFE_METHODS:
        sent.refuse_foreign_page()
    if shown is not None and found.kind is CredentialKind.SESSION and await _slide(db, found):
        if shown.cookie:  # a browser's ends when the session did, unless it is told
            request.state.renewed_cookie = cookie(shown.secret, sent.scheme)
    note_use(found, request.app.state.last_uses)
    return found


def note_use(found: Principal, last_uses: LastUses) -> None:
    """Have an API key show that it was used now; for all else nobody asks when."""
    if found.kind is CredentialKind.KEY and found.credential_id is not None:
        last_uses.used(found.credential_id)


@dataclass(frozen=True, slots=True)
class Sender:
    """Where a request comes from: in its gateway's words, if a gateway passed it on.

    Attributes:
        scheme: by which the client came: http or https.
        is_local: the loopback rule holds.
        is_foreign: a page of another site made it, for which the operator does not vouch.
    """

    peer: str
    scheme: str
    is_local: bool
    is_foreign: bool

    def refuse_foreign_page(self) -> None:
        """Raises:
        Forbidden: a page of another site uses this user's browser.
        """
        if self.is_foreign:
            raise Forbidden(
                "a page of another site asked for this: use the page of this server itself; a "
                "proxy in front of it has to pass on the header Host as it came"
            )


@raises(Contended, DatabaseAway)
async def sender(request: Request) -> Sender:
    """Who sends a request. What its headers say of that counts with a gateway's credential only."""
    headers = request.headers
    db: Database = request.app.state.db
    known: Known[Principal] = request.app.state.known
    if await _shows_gateway(db, known, headers.get(wire.GATEWAY_HEADER)):
        return Sender(
            headers.get(wire.PEER_HEADER, ""),
            headers.get(wire.SCHEME_HEADER, "http"),
            headers.get(wire.LOCAL_HEADER) == "1",
            headers.get(wire.VOUCHED_HEADER) != "1" and _is_foreign(headers),
        )
    peer = request.client.host if request.client else ""
    return Sender(peer, "http", is_local=False, is_foreign=_is_foreign(headers))


def presented(headers: Headers) -> carriers.Shown | None:
    """The secret that a request shows, by the rule that gateways read it by as well."""
    return carriers.shown(headers.items(), wire.SESSION_COOKIE)


def _is_foreign(headers: Headers) -> bool:
    return is_foreign(
        origin=headers.get("origin"),
        host=headers.get("host"),
        fetch_site=headers.get("sec-fetch-site"),
    )


async def resolve(db: Database, known: Known[Principal], secret: str) -> Principal:
    """What `secret` stands for.

    Raises:
        Unauthorized: nothing, or no longer.
    """
    if (remembered := known.find(secret)) is not None:
        return remembered
    mark = known.mark
    async with db.read() as session:
        row = (
            await session.exec(select(Credential).where(Credential.digest == digest(secret)))
        ).one_or_none()
        # A token to join with makes nobody a principal: it is for `_joiner` alone.
        if (
            row is None
            or row.kind == CredentialKind.JOIN
            or (row.expires_at and row.expires_at <= datetime.now(UTC))
        ):
            raise Unauthorized("this credential is unknown or has expired")
        user = await session.get(User, row.user_id) if row.user_id else None
        if user is not None and not user.is_active:
            raise Unauthorized("this user is disabled: ask an administrator")
        groups = frozenset[int]()
        if user is not None and not user.is_admin:
            groups = (await groups_of(session, [user.id])).get(user.id, groups)
    found = replace(_principal(row, user), group_ids=groups)
    known.remember(secret, found, row.expires_at, mark)
    return found


def _principal(row: Credential, user: User | None) -> Principal:
    return Principal(
        kind=CredentialKind(row.kind),
        credential_id=row.id,
        user_id=row.user_id,
        is_admin=bool(user and user.is_admin),
        worker_id=row.worker_id,
        scopes=frozenset(Scope(scope) for scope in row.scopes),
        expires_at=row.expires_at,
        allowed_model_names=(
            None if row.allowed_model_names is None else frozenset(row.allowed_model_names)
        ),
        password_change_required=bool(
            user and user.require_password_change and row.kind == CredentialKind.SESSION
        ),
        username=user.username if user else "",
        credential_name=row.name,
    )


async def _shows_gateway(db: Database, known: Known[Principal], secret: str | None) -> bool:
    if secret is None:
        return False
    try:
        return (await resolve(db, known, secret)).kind is CredentialKind.GATEWAY
    except Unauthorized:
        return False


async def _local_admin(db: Database) -> Principal:
    async with db.read() as session:
        user = await first_admin(session)
    if user is None:
        raise Unauthorized
    return Principal(
        CredentialKind.LOCAL,
        user_id=user.id,
        is_admin=True,
        scopes=frozenset({Scope.ALL}),
        username=user.username,
    )


async def _slide(db: Database, found: Principal) -> bool:
    """Whether the session lives longer now."""
    async with db.read() as session:
        row = await session.get(Credential, found.credential_id)
    end = datetime.now(UTC) + SESSION_LIFE
    if row is None or row.expires_at is None or end - row.expires_at < SESSION_STEP:
        return False
    async with db.write() as session:
        row = await find(session, Credential, found.credential_id)
        if row is not None:
            row.expires_at = end
    return row is not None


Check = Callable[[Principal], None]


def _who(*checks: Check) -> Any:
    """A principal that all `checks` let pass, as the type of a route's parameter.

    One dependency, not a chain: FastAPI goes through each for every request.
    """

    @raises(*raised(principal), *(error for check in checks for error in raised(check)))
    async def checked(request: Request) -> Principal:
        found = await principal(request)
        for check in checks:
            check(found)
        return found

    return Depends(checked)


def _is_user(found: Principal) -> None:
    if found.user_id is None or not found.scopes & {Scope.ALL, Scope.MANAGEMENT}:
        raise Forbidden("this needs a user's login, or an API key with scope management")


@raises(PasswordChangeRequired)
def _is_settled(found: Principal) -> None:
    if found.password_change_required:
        raise PasswordChangeRequired


def _is_admin(found: Principal) -> None:
    if not found.is_admin:
        raise Forbidden("this needs an administrator")


def _is_gateway(found: Principal) -> None:
    if found.kind is not CredentialKind.GATEWAY:
        raise Forbidden("this is for gateways")


def _is_worker(found: Principal) -> None:
    if found.kind is not CredentialKind.WORKER:
        raise Forbidden("this is for workers")


@raises(PasswordChangeRequired)
def _may_watch(found: Principal) -> None:
    if found.user_id is not None:
        for check in ADMIN:
            check(found)


USER: tuple[Check, ...] = (_is_user, _is_settled)
ADMIN: tuple[Check, ...] = (*USER, _is_admin)


@dataclass(frozen=True, slots=True)
class Joining:
    """A machine that shows a token to join with, and may do nothing else with it.

    Attributes:
        is_embedded: the token is the one of this node's own agent, not the cluster's.
        token_id: of a join token, which may be used up: see `db.join_tokens.admit`.
    """

    is_embedded: bool
    token_id: int | None = None


@raises(Unauthorized, Contended, DatabaseAway)
async def _joiner(request: Request) -> Joining:
    shown = presented(request.headers)
    token = shown.secret if shown is not None and not shown.cookie else None
    own: str | None = request.app.state.join_token
    become(Actor(ActorKind.WORKER))
    if token and own and same(token, own):
        return Joining(is_embedded=True)
    db: Database = request.app.state.db
    async with db.read() as session:
        cluster = await session.get_one(Cluster, 1)
        if token and same(digest(token), cluster.token_digest):
            return Joining(is_embedded=False)
        row = await join_token(session, token) if token else None
    if row is None:
        raise Unauthorized(
            "this token is not the cluster's: see <data-dir>/token on the server, and --token"
        )
    return Joining(is_embedded=False, token_id=row.id)


Anyone = Annotated[Principal, Depends(principal)]
#: Whoever it is.
Stranger = Annotated[Sender, Depends(sender)]
#: A machine with a token to join with.
Joiner = Annotated[Joining, Depends(_joiner)]
#: A user who may still have to change the password.
LoggedIn = Annotated[Principal, _who(_is_user)]
AnyUser = Annotated[Principal, _who(*USER)]
Admin = Annotated[Principal, _who(*ADMIN)]
Gateway = Annotated[Principal, _who(_is_gateway)]
WorkerAgent = Annotated[Principal, _who(_is_worker)]
#: An administrator, a worker or a gateway: each sees what is its own.
Watcher = Annotated[Principal, _who(_may_watch)]
