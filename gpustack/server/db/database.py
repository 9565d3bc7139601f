"""Sessions: `read` never commits; `write` commits exactly once, at the end, then tells.

SQLite has one writer: an asyncio.Lock lets one task of this process in at a time, and BEGIN
IMMEDIATE keeps other processes out from the first statement on, so that no transaction fails
half-way because another one wrote.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, NewType, TypeVar

from sqlalchemy import event, update
from sqlalchemy.engine import Connection
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import Session as SyncSession
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from gpustack.errors import NotFound
from gpustack.server.db.tables import WATCHED, Change, Counter, Watched

ReadSession = NewType("ReadSession", AsyncSession)
WriteSession = NewType("WriteSession", ReadSession)
Row = TypeVar("Row", bound=Watched)
Touched = dict[tuple[str, int], bool]  # (kind, id) -> whether it was deleted

BUSY_TIMEOUT_S = 5.0


class Database:
    """Owns the connections.

    Args:
        url: sqlite:///PATH.
        committed: called after each commit that changed something watched.
    """

    def __init__(self, url: str, committed: Callable[[], None] = lambda: None) -> None:
        self.url = url
        self._committed = committed
        self._writer = _engine(url, begin="BEGIN IMMEDIATE", pool_size=1)
        self._readers = _engine(url, begin="BEGIN", pool_size=4)
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def read(self) -> AsyncIterator[ReadSession]:
        """One consistent view of the database."""
        async with AsyncSession(self._readers, expire_on_commit=False) as session:
            yield ReadSession(session)

    @asynccontextmanager
    async def write(self) -> AsyncIterator[WriteSession]:
        """One transaction. Watchers hear of it only once it is durable.

        No network call and no other session inside: everybody else's write waits for this one.
        """
        async with self._turn, AsyncSession(self._writer, expire_on_commit=False) as session:
            touched: Touched = session.info.setdefault("touched", {})
            event.listen(session.sync_session, "after_flush", _note_changes)
            yield WriteSession(ReadSession(session))
            await session.flush()
            if touched:
                await _stamp(session, touched)
            await session.commit()  # an exception above skips this: the context rolls back
        if touched:
            self._committed()

    async def close(self) -> None:
        await self._writer.dispose()
        await self._readers.dispose()


def touch(session: WriteSession, row: Watched) -> None:
    """Make watchers look at `row` again although none of its columns changed."""
    session.info["touched"].setdefault(row.key(), False)


async def get(session: ReadSession, table: type[Row], row_id: int) -> Row:
    """The row.

    Raises:
        NotFound: there is none with this id.
    """
    row = await session.get(table, row_id)
    if row is None:
        raise NotFound(f"there is no {table.KIND.removesuffix('s')} with id {row_id}")
    return row


async def current_revision(session: ReadSession) -> int:
    return (await session.exec(select(Counter.revision))).one()


def _engine(url: str, *, begin: str, pool_size: int) -> AsyncEngine:
    engine = create_async_engine(
        url.replace("sqlite://", "sqlite+aiosqlite://", 1),
        pool_size=pool_size,
        max_overflow=0,
        connect_args={"timeout": BUSY_TIMEOUT_S},
    )

    @event.listens_for(engine.sync_engine, "connect")
    def _connect(connection: Any, _: object) -> None:
        connection.isolation_level = None  # we say BEGIN ourselves, else savepoints are wrong
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine.sync_engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine


def _note_changes(session: SyncSession, _: object) -> None:
    touched: Touched = session.info["touched"]
    for row in _watched(session.deleted):
        touched[row.key()] = True
    changed = (row for row in session.dirty if session.is_modified(row))
    for row in _watched([*session.new, *changed]):
        touched[row.key()] = False


def _watched(rows: Iterable[object]) -> Iterable[Watched]:
    return (row for row in rows if isinstance(row, Watched))


async def _stamp(session: AsyncSession, touched: Touched) -> None:
    """Take the next revision and write it to every row that changed, and into the history.

    The counter's row is the last that a transaction takes, so commits happen in revision order.
    """
    await session.exec(update(Counter).values(revision=Counter.revision + 1))
    revision = await current_revision(ReadSession(session))
    for kind, table in WATCHED.items():
        ids = [row_id for (of, row_id), deleted in touched.items() if of == kind and not deleted]
        if ids:
            where = col(table.id).in_(ids)
            await session.exec(
                update(table)
                .where(where)
                .values(revision=revision)
                .execution_options(synchronize_session=False)
            )
    session.add_all(
        Change(revision=revision, kind=kind, object_id=row_id, deleted=deleted)
        for (kind, row_id), deleted in touched.items()
    )
