"""Sessions: `read` never commits; `write` commits exactly once, at the end, then tells.

A server has one writer: an asyncio.Lock lets one task of this process in at a time, on every
database. Against other processes SQLite is locked from the first statement on, so that no
transaction fails half-way because another one wrote; elsewhere rows are locked as they are taken.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import NamedTuple, NewType, TypeVar

from sqlalchemy import event, func, update
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session as SyncSession
from sqlmodel import SQLModel, col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from gpustack.errors import DatabaseAway, NotFound
from gpustack.lib.tasks import cancellable
from gpustack.server.db import diffs, journal, leases
from gpustack.server.db.engines import controlling, reading, writing
from gpustack.server.db.failures import away
from gpustack.server.db.listening import CHANNEL
from gpustack.server.db.tables import (
    WATCHED,
    Change,
    Counter,
    Credential,
    GroupMember,
    User,
    Watched,
)
from gpustack.server.db.url import Kind, parse

logger = logging.getLogger(__name__)

ReadSession = NewType("ReadSession", AsyncSession)
WriteSession = NewType("WriteSession", ReadSession)
Row = TypeVar("Row", bound=Watched)
AnyRow = TypeVar("AnyRow", bound=SQLModel)


class Touch(NamedTuple):
    """What a transaction did to an object, as one kind of its watchers hears of it."""

    deleted: bool
    user_id: int | None


Touched = dict[tuple[str, int], Touch]  # by kind and id

#: A write that has waited for the others of this server for this long is given up.
TURN_S = 30.0
#: So is a transaction that takes longer: the database says nothing, or far too much.
TRANSACTION_S = 30.0


class Database:
    """Owns the connections.

    What another transaction was in the way of raises Contended, with nothing changed; while the
    database cannot be used, everything raises DatabaseAway.

    Args:
        url: sqlite:///PATH, postgresql://… or mysql://….
        committed: called after each commit that changed something watched, with kind and id of
            each.

    Raises:
        SettingsError: the URL is none.
    """

    def __init__(
        self, url: str, committed: Callable[[Iterable[tuple[str, int]]], None] = lambda _: None
    ) -> None:
        self.url = url
        self._place = parse(url)
        self._committed = committed
        self._writer = writing(self._place)
        sqlite = self._place.kind is Kind.SQLITE
        self._controller = self._writer if sqlite else controlling(self._place)
        self._readers = reading(self._place)
        self._turn = asyncio.Lock()
        self._away = False

    @property
    def kind(self) -> Kind:
        return self._place.kind

    @asynccontextmanager
    async def read(self) -> AsyncIterator[ReadSession]:
        """One consistent view of the database."""
        async with (
            self._watching(),
            asyncio.timeout(TRANSACTION_S),
            AsyncSession(self._readers, expire_on_commit=False) as session,
        ):
            yield ReadSession(session)

    @asynccontextmanager
    async def write(self) -> AsyncIterator[WriteSession]:
        """One transaction. Watchers hear of it only once it is durable.

        No network call and no other session inside: everybody else's write waits for this one.

        Raises:
            LeaseLost: it is the leader's, and another server leads now.
        """
        async with (
            self._watching(),
            self._in_turn(),
            asyncio.timeout(TRANSACTION_S),
            AsyncSession(
                self._controller if leases.is_leading() else self._writer, expire_on_commit=False
            ) as session,
        ):
            await leases.check(session)
            touched: Touched = session.info.setdefault("touched", {})
            event.listen(session.sync_session, "after_flush", _note_changes)
            event.listen(session.sync_session, "after_flush", diffs.note)
            yield WriteSession(ReadSession(session))
            await session.flush()
            await _touch_credentials(session, touched)
            await journal.keep_events(session)
            if touched:
                await _stamp(session, touched, self._place.kind)
            await journal.keep_audit(session)
            await session.commit()  # an exception above skips this: the context rolls back
        if touched:
            self._committed(touched)

    async def close(self) -> None:
        for engine in {self._writer, self._controller, self._readers}:
            await engine.dispose()

    @asynccontextmanager
    async def _in_turn(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(TURN_S):
                await self._turn.acquire()
        except TimeoutError:
            raise away(self._place, "too many writes wait for it") from None
        try:
            yield
        finally:
            self._turn.release()

    @asynccontextmanager
    async def _watching(self) -> AsyncIterator[None]:
        """Say once when the database goes away, and once when it is back."""
        try:
            with cancellable():
                yield
        except (PoolTimeout, TimeoutError, DatabaseAway) as error:
            # The log says where it is and what it said; that is not for whoever asks.
            self._is_away(error if isinstance(error, DatabaseAway) else away(self._place, error))
            raise DatabaseAway from None
        if self._away:
            self._away = False
            logger.info("the database (%s) can be used again", self._place.shown)

    def _is_away(self, error: DatabaseAway) -> None:
        if not self._away:
            self._away = True
            logger.error("%s", error)


def touch(session: WriteSession, row: Watched) -> None:
    """Make watchers look at `row` again although none of its columns changed."""
    touched: Touched = session.info["touched"]
    for key, done in _touches(row, deleted=False).items():
        touched.setdefault(key, done)


async def get(session: ReadSession, table: type[Row], row_id: int) -> Row:
    """The row, as `find` finds it.

    Raises:
        NotFound: there is none with this id.
    """
    row = await find(session, table, row_id)
    if row is None:
        raise NotFound(f"there is no {table.KIND.removesuffix('s')} with id {row_id}")
    return row


async def find(session: ReadSession, table: type[AnyRow], row_id: int | None) -> AnyRow | None:
    """The row; None: there is none with this id.

    To a writer it is locked, so that what is compared with it holds until the commit, and no other
    server deletes it meanwhile.
    """
    writes = "touched" in session.info
    return await session.get(table, row_id, with_for_update=True if writes else None)


async def current_revision(session: ReadSession) -> int:
    return (await session.exec(select(Counter.revision))).one()


def _note_changes(session: SyncSession, _: object) -> None:
    touched: Touched = session.info["touched"]
    for row in _watched(session.deleted):
        touched |= _touches(row, deleted=True)
    changed = [row for row in session.dirty if session.is_modified(row)]
    session.info.setdefault("users", set()).update(
        row.id for row in changed if isinstance(row, User)
    )
    session.info["users"].update(
        row.user_id for row in [*session.new, *session.deleted] if isinstance(row, GroupMember)
    )
    for row in _watched([*session.new, *changed]):
        touched |= _touches(row, deleted=False)


async def _touch_credentials(session: AsyncSession, touched: Touched) -> None:
    """What a user may do is part of what every credential of that user stands for."""
    users = session.info.get("users")
    if users:
        theirs = select(Credential.id).where(col(Credential.user_id).in_(users))
        for credential_id in (await session.exec(theirs)).all():
            key = (Credential.KIND, credential_id or 0)
            touched.setdefault(key, Touch(deleted=False, user_id=None))


def _touches(row: Watched, *, deleted: bool) -> Touched:
    _, row_id = row.key()
    return {(kind, row_id): Touch(deleted, user) for kind, user in row.shown_as().items()}


def _watched(rows: Iterable[object]) -> Iterable[Watched]:
    return (row for row in rows if isinstance(row, Watched))


async def _stamp(session: AsyncSession, touched: Touched, kind: Kind) -> None:
    """Take the next revision and write it to every row that changed, and into the history.

    The counter's row is the last that a transaction takes, so commits happen in revision order and
    nobody who holds it waits for another.
    """
    changed = {
        table: [row_id for (of, row_id), done in touched.items() if of == name and not done.deleted]
        for name, table in WATCHED.items()
    }
    rows = [(table, col(table.id).in_(sorted(ids))) for table, ids in changed.items() if ids]
    if kind is not Kind.SQLITE:  # some were only touched, so nothing holds them yet
        for table, are_these in rows:
            await session.exec(
                select(table.id).where(are_these).order_by(col(table.id)).with_for_update()
            )
    await session.exec(update(Counter).values(revision=Counter.revision + 1))
    revision = await current_revision(ReadSession(session))
    if kind is Kind.POSTGRESQL:  # goes out with the commit
        await session.exec(select(func.pg_notify(CHANNEL, str(revision))))
    for table, are_these in rows:
        await session.exec(
            update(table)
            .where(are_these)
            .values(revision=revision)
            .execution_options(synchronize_session=False)
        )
    session.add_all(
        Change(revision=revision, kind=of, object_id=row_id, **done._asdict())
        for (of, row_id), done in touched.items()
    )
