"""Connections: how each database is asked for transactions, and how long anything may take.

Writers are READ COMMITTED, and alone in their process (see `Database.write`); on SQLite BEGIN
IMMEDIATE keeps other processes out as well. Readers see one snapshot from their first statement to
their last. Drivers are imported where they are used.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Connection, ExceptionContext
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from gpustack.errors import DatabaseAway
from gpustack.server.db.failures import away, failure
from gpustack.server.db.url import DatabaseUrl, Kind

READERS = 4
CONNECT_S = 5.0
#: How long a transaction waits for a lock that another process holds.
LOCK_S = 5
#: Idle connections are replaced before firewalls and MySQL's wait_timeout forget them.
RECYCLE_S = 600
#: A transaction of ours that does nothing for this long has no owner any more.
IDLE_S = 30

#: Said once on each connection. MySQL has no word for a transaction that does nothing, so there a
#: connection that does nothing goes, and the next use opens another; MariaDB has one.
_GREETING = {
    Kind.SQLITE: ("PRAGMA journal_mode=WAL", "PRAGMA synchronous=FULL", "PRAGMA foreign_keys=ON"),
    Kind.POSTGRESQL: (
        f"SET lock_timeout = '{LOCK_S}s'",
        f"SET idle_in_transaction_session_timeout = '{IDLE_S}s'",
    ),
    Kind.MYSQL: (
        f"SET innodb_lock_wait_timeout = {LOCK_S}"
        f" /*M!100301 , idle_transaction_timeout = {IDLE_S} */"
        f" /*!80000 , wait_timeout = {IDLE_S} */",
        "SET sql_mode = CONCAT(@@sql_mode, ',STRICT_ALL_TABLES')",
    ),
}
#: For what the leader writes: frozen, it must not keep another from taking over.
_HURRY_S = 3
_HURRY = {
    Kind.SQLITE: (),
    Kind.POSTGRESQL: (
        f"SET lock_timeout = '{_HURRY_S}s'",
        f"SET idle_in_transaction_session_timeout = '{_HURRY_S}s'",
    ),
    Kind.MYSQL: (
        f"SET innodb_lock_wait_timeout = {_HURRY_S}"
        f" /*M!100301 , idle_transaction_timeout = {_HURRY_S} */"
        f" /*!80000 , wait_timeout = {_HURRY_S} */",
    ),
}
#: Of MySQL's protocol: an UPDATE says how many rows it found, not how many it changed.
_FOUND_ROWS = 2


def writing(url: DatabaseUrl) -> AsyncEngine:
    """One connection to write with."""
    return _engine(url, begin="BEGIN IMMEDIATE", isolation="READ COMMITTED", pool_size=1)


def controlling(url: DatabaseUrl) -> AsyncEngine:
    """One connection to write with that holds no lock for long while it does nothing."""
    engine = writing(url)
    _greet(engine, _HURRY[url.kind])
    return engine


def reading(url: DatabaseUrl) -> AsyncEngine:
    """Connections to read with, each transaction from one snapshot."""
    engine = _engine(url, begin="BEGIN", isolation="REPEATABLE READ", pool_size=READERS)
    if url.kind is Kind.POSTGRESQL:
        return engine.execution_options(postgresql_readonly=True)
    return engine


def _engine(url: DatabaseUrl, *, begin: str, isolation: str, pool_size: int) -> AsyncEngine:
    # Parameters are never shown: secrets and digests are among them.
    common: dict[str, Any] = {"pool_size": pool_size, "max_overflow": 0, "hide_parameters": True}
    if url.kind is Kind.SQLITE:
        engine = create_async_engine(
            f"sqlite+aiosqlite:///{url.path}", async_creator=_opener(url), **common
        )
        _say_begin(engine, begin)
        _end_what_is_cut(engine)
    else:
        driver, connect = _connector(url)
        engine = create_async_engine(
            f"{url.kind}+{driver}://",
            async_creator=connect,
            isolation_level=isolation,
            pool_pre_ping=True,
            pool_recycle=RECYCLE_S,
            **common,
        )
    # It tells with a traceback of each connection that is lost before it is given back. That one is
    # dropped, and whoever needs the next says what is wrong.
    logging.getLogger("sqlalchemy.pool").setLevel(logging.CRITICAL)
    _greet(engine, _GREETING[url.kind])
    _translate(engine, url)
    return engine


def _opener(url: DatabaseUrl) -> Callable[[], Awaitable[Any]]:
    """What opens an SQLite database. Whoever is cancelled meanwhile leaves no thread behind.

    A thread whose event loop is gone when it has opened the file ends with a traceback.
    """
    import aiosqlite as driver

    async def opened() -> Any:
        made: Any = driver.connect(str(url.path), timeout=LOCK_S, check_same_thread=False)
        # As SQLAlchemy's own: a process that is told to exit does. Old ones are threads themselves.
        getattr(made, "_thread", made).daemon = True
        opening = asyncio.ensure_future(made)
        try:
            await asyncio.wait({opening})
        except asyncio.CancelledError:
            await asyncio.wait({opening})
            if not opening.exception():
                await opening.result().close()
            raise
        return opening.result()

    return opened


def _connector(url: DatabaseUrl) -> tuple[str, Callable[[], Awaitable[Any]]]:
    """The driver's name, and what makes a connection with it.

    That raises DatabaseAway when nobody answers; what the database answers comes as it is.
    """
    options = dict(url.driver)
    if url.kind is Kind.POSTGRESQL:
        import asyncpg as driver

        options["timeout"] = CONNECT_S
    else:
        import asyncmy as driver

        options |= {"connect_timeout": CONNECT_S, "client_flag": _FOUND_ROWS}
        # It logs the database's notes on what we asked for on purpose.
        logging.getLogger("asyncmy").setLevel(logging.ERROR)

    async def connected() -> Any:
        # In a task of its own: asyncmy waits with wait_for, which in Python 3.11 may swallow a
        # cancellation, and ours would never end.
        connecting = asyncio.ensure_future(driver.connect(**options))
        try:
            await asyncio.wait({connecting})
        except asyncio.CancelledError:
            connecting.add_done_callback(_drop)
            connecting.cancel()
            await asyncio.wait({connecting}, timeout=CONNECT_S)
            raise
        try:
            return connecting.result()
        except OSError as error:  # time-outs too
            raise away(url, error) from None

    return driver.__name__, connected


def _drop(connecting: "asyncio.Future[Any]") -> None:
    """Close what came of connecting after whoever wanted it had left; nobody else knows of it."""
    if connecting.cancelled() or connecting.exception():
        return
    connection = connecting.result()
    getattr(connection, "terminate", connection.close)()  # asyncpg's, else asyncmy's


def _say_begin(engine: AsyncEngine, begin: str) -> None:
    """SQLite's driver would begin late, and commit before it changes tables."""

    @event.listens_for(engine.sync_engine, "connect")
    def _connect(connection: Any, _: object) -> None:
        connection.isolation_level = None

    @event.listens_for(engine.sync_engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql(begin)


def _end_what_is_cut(engine: AsyncEngine) -> None:
    """Roll back before a connection is dropped because whoever used it was cancelled.

    SQLite lets a connection that is closed in the middle of a statement live on, with its lock,
    until the last of its cursors is collected.
    """

    @event.listens_for(engine.sync_engine, "invalidate")
    def _invalidated(connection: Any, _: object, __: object) -> None:
        with suppress(Exception):  # it is closed next, whatever comes of this
            connection.rollback()


def _greet(engine: AsyncEngine, statements: Iterable[str]) -> None:
    @event.listens_for(engine.sync_engine, "connect")
    def _connect(connection: Any, _: object) -> None:
        cursor = connection.cursor()
        for statement in statements:
            cursor.execute(statement)
        cursor.close()
        if engine.dialect.name != Kind.SQLITE:
            connection.commit()


def _translate(engine: AsyncEngine, url: DatabaseUrl) -> None:
    @event.listens_for(engine.sync_engine, "handle_error")
    def _failed(context: ExceptionContext) -> BaseException | None:
        if context.is_pre_ping:
            return None  # that connection is replaced
        error = failure(context.original_exception, context.sqlalchemy_exception, url)
        if isinstance(error, DatabaseAway) and url.kind is not Kind.SQLITE:
            context.is_disconnect = True
        return error
