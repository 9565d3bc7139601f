"""/v2/users: who may log in."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fastapi import APIRouter, Response
from sqlalchemy.exc import IntegrityError
from sqlmodel import col, select

from gpustack.errors import Conflict, Forbidden, NotFound, TooMany, raises
from gpustack.schemas.base import Page
from gpustack.schemas.users import (
    MeUpdate,
    PasswordReset,
    PasswordSet,
    User,
    UserCreate,
    UserCreated,
    UserUpdate,
)
from gpustack.server.api.conditions import IfMatch, change, expect, tag
from gpustack.server.api.context import Db, Id
from gpustack.server.api.lists import Asked, SearchQuery, page_of
from gpustack.server.api.repeated import Repeated
from gpustack.server.auth import passwords
from gpustack.server.auth.principals import Admin, AnyUser, LoggedIn, Principal
from gpustack.server.db import tables
from gpustack.server.db.bootstrap import new_password
from gpustack.server.db.database import ReadSession, WriteSession, find
from gpustack.server.db.users import (
    disable,
    expect_local,
    remove_user,
    set_password,
    step_down,
    tell_of,
    who_asks,
)

router = APIRouter(prefix="/v2/users", tags=["users"], route_class=Repeated)


#: What an update says that is kept as it is said.
_SAID = {"username", "full_name", "is_admin", "is_active", "require_password_change"}


class UserQuery(SearchQuery):
    TABLE = tables.User
    SEARCHED = ("username", "full_name")
    SORTED = ("username", "full_name", "created_at")

    username: str | None = None
    is_admin: bool | None = None


@router.get("")
async def list_users(db: Db, admin: Admin, query: Asked[UserQuery]) -> Page[User]:
    return await page_of(db, query, _shown)


@router.post("", status_code=201)
@raises(Conflict, TooMany)
async def create_user(db: Db, admin: Admin, wanted: UserCreate) -> UserCreated:
    """Make a user. A password that is generated is in this answer and nowhere else."""
    if wanted.is_admin:
        _expect_unlimited(admin)
    password, hashed = await _password(wanted.password)
    row = tables.User(
        **wanted.model_dump(exclude={"password", "require_password_change"}),
        password_hash=hashed,
        require_password_change=wanted.require_password_change or wanted.password is None,
    )
    with _name_is_free(wanted.username):
        async with db.write() as session:
            session.add(row)
    made = password if wanted.password is None else None
    return UserCreated.model_validate(row.model_dump() | {"password": made})


@router.get("/me")
async def get_me(db: Db, user: LoggedIn, response: Response) -> User:
    """Who is asking. The ETag is the generation: an update may name it in If-Match."""
    async with db.read() as session:
        row = await who_asks(session, user.user_id)
    tag(response, row.generation)
    return _view(row)


@router.put("/me")
async def update_me(
    db: Db, user: AnyUser, wanted: MeUpdate, if_match: IfMatch, response: Response
) -> User:
    """Change the own name; compared as for PUT /v2/users/{id}."""
    async with db.write() as session:
        row = await who_asks(session, user.user_id)
        _expect(session, row, if_match, wanted.generation)
        change(row, {"full_name": wanted.full_name})
    tag(response, row.generation)
    return _view(row)


@router.get("/{user_id}")
async def get_user(db: Db, admin: Admin, user_id: Id, response: Response) -> User:
    """The ETag is the generation: an update may name it in If-Match."""
    async with db.read() as session:
        row = await _get(session, user_id)
    tag(response, row.generation)
    return _view(row)


@router.put("/{user_id}")
@raises(Conflict, TooMany)
async def update_user(
    db: Db, admin: Admin, user_id: Id, wanted: UserUpdate, if_match: IfMatch, response: Response
) -> User:
    """Change a user. The last administrator stays one; a new password ends all sessions.

    Made from another generation than the present one, it is refused (409) with the user as it is.
    Without If-Match or `generation`, the last writer wins.
    """
    if wanted.password is not None:
        _expect_unlimited(admin)
    hashed = (await _password(wanted.password))[1] if wanted.password is not None else None
    with _name_is_free(wanted.username):
        async with db.write() as session:
            row = await _get(session, user_id)
            _expect(session, row, if_match, wanted.generation)
            if wanted.require_password_change:
                expect_local(row)
            if wanted.is_admin and not row.is_admin:
                _expect_unlimited(admin)
            if row.is_admin and not wanted.is_admin:
                await step_down(session, row)
            if row.is_active and wanted.is_active is False:
                await disable(session, row)
            said = wanted.model_dump(include=_SAID, exclude_none=True)
            change(row, {"full_name": None} | said)
            await tell_of(session, row)
            if hashed is not None:
                must_change = row.require_password_change
                await set_password(session, row, hashed, must_change=must_change)
    tag(response, row.generation)
    return _view(row)


@router.delete("/{user_id}", status_code=204)
@raises(Conflict)
async def delete_user(db: Db, admin: Admin, user_id: Id) -> Response:
    """Remove a user; sessions and API keys end, the usage stays. Not the last administrator."""
    async with db.write() as session:
        await remove_user(session, await _get(session, user_id))
    return Response(status_code=204)


@router.put("/{user_id}/password")
@raises(Conflict, TooMany)
async def reset_password(
    db: Db, admin: Admin, user_id: Id, wanted: PasswordReset | None = None
) -> PasswordSet:
    """Replace a user's password; every session of that user ends.

    One that is generated is in this answer and nowhere else, and must be changed at the next login.
    """
    _expect_unlimited(admin)
    given = wanted.password if wanted else None
    password, hashed = await _password(given)
    async with db.write() as session:
        await set_password(session, await _get(session, user_id), hashed, must_change=given is None)
    return PasswordSet(password=password if given is None else None)


async def _password(given: str | None) -> tuple[str, str]:
    """The password that is given, or a new one; and its hash.

    Raises:
        Invalid: it is too easy.
    """
    if given is not None:
        passwords.check_policy(given)
    password = new_password() if given is None else given
    return password, await passwords.hash_password(password)


@contextmanager
def _name_is_free(username: str) -> Iterator[None]:
    try:
        yield
    except IntegrityError:
        raise Conflict(f"a user named {username} exists already") from None


def _expect_unlimited(admin: Principal) -> None:
    """Raises Forbidden: by way of another's login, the key could do what it may not do itself."""
    if admin.is_limited:
        raise Forbidden("an API key with limits sets no passwords and makes no administrators")


def _expect(
    session: WriteSession, row: tables.User, if_match: frozenset[int] | None, body: int | None
) -> None:
    expect(
        session,
        f"user {row.username}",
        row.generation,
        header=if_match,
        body=body,
        current=_view(row).model_dump(mode="json"),
    )


async def _get(session: ReadSession, user_id: int) -> tables.User:
    row = await find(session, tables.User, user_id)
    if row is None:
        raise NotFound(f"there is no user with id {user_id}")
    return row


async def _shown(session: ReadSession, ids: Sequence[int]) -> dict[int, User]:
    rows = await session.exec(select(tables.User).where(col(tables.User.id).in_(ids)))
    return {row.id or 0: _view(row) for row in rows.all()}


def _view(row: tables.User) -> User:
    return User.model_validate(row, from_attributes=True)
