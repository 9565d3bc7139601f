"""Bring the database to the schema of this release. Migrations only, never `create_all`."""

import asyncio
import sqlite3
import time
from pathlib import Path

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError, ProgrammingError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from gpustack.errors import Contended, DatabaseAway, SettingsError
from gpustack.server.db.engines import writing
from gpustack.server.db.url import DatabaseUrl, Kind, parse

#: The newest migration. Lets a start that has nothing to migrate skip importing alembic, which
#: takes longer than all else it would do. A test holds it to the folder's head.
HEAD = "0017"
#: How long a server waits for another that migrates.
PATIENCE_S = 300
RETRY_S = 0.05
#: The advisory lock's name, as each database has them: a number, or 64 letters on the whole server.
_PG_LOCK = int.from_bytes(b"gpustack")
_MY_LOCK = "CONCAT('gpustack.', MD5(DATABASE()))"
#: MySQL: there is such a table, column, key or constraint already; or none to drop.
_MY_HALF_DONE = {1050, 1060, 1061, 1091, 1826}


def migrations() -> Path:
    """The folder of the migrations, in a checkout and in an installed wheel alike.

    Raises:
        FileNotFoundError: it is in neither place.
    """
    here = Path(__file__).resolve().parent
    for place in (here / "migrations", here.parents[2] / "alembic"):
        if (place / "env.py").is_file():
            return place
    raise FileNotFoundError(f"no migrations beside {here} nor at the top of its checkout")


def file_of(url: str) -> Path:
    return Path(url.removeprefix("sqlite:///"))


def migrate(url: str, target: str = HEAD, *, patience_s: float = 0.0) -> None:
    """Run the migrations that `url` lacks. Blocks; run before serving, outside an event loop.

    All of them or none, but on MySQL, which cannot undo changes of tables. Servers that start at
    once migrate once: an advisory lock lets one in at a time, on SQLite the file's.

    Args:
        target: the last one to run.
        patience_s: how long to wait for a database server that does not answer.

    Raises:
        SettingsError: the database cannot be used, is of a newer release, or another server has
            been migrating it for `PATIENCE_S`.
    """
    place = parse(url)
    if place.kind is Kind.SQLITE:
        _migrate_file(place, target)
    else:
        asyncio.run(_migrate_server(place, target, patience_s))


def _migrate_file(place: DatabaseUrl, target: str) -> None:
    try:
        version = version_of_file(place.path)
    except (sqlite3.DatabaseError, OSError) as error:
        raise SettingsError(f"--database-url: cannot use {place.path}: {error}") from None
    if not _is_older(version, target, place.shown):
        return
    place.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    place.path.touch(mode=0o600)  # it holds digests and instance secrets
    _upgrade(place, target, None)


def version_of_file(path: Path) -> str | None:
    """The version of an SQLite file; None: there is none, or it was never migrated."""
    if not path.exists():
        return None
    connection = sqlite3.connect(path)
    try:
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.OperationalError as error:
        if "no such table" not in str(error):
            raise
        return None  # never migrated
    finally:
        connection.close()
    return str(row[0]) if row else None


async def _migrate_server(place: DatabaseUrl, target: str, patience_s: float) -> None:
    engine = writing(place)
    try:
        await _answers(engine, patience_s)
        async with engine.connect() as connection:
            if _is_older(await version_of(connection), target, place.shown):
                await _lock(connection, place)
                if _is_older(await version_of(connection), target, place.shown):
                    await connection.run_sync(lambda plain: _upgrade(place, target, plain))
                await connection.commit()
    except DatabaseAway as error:
        raise SettingsError(f"--database-url: {error}") from None
    except DBAPIError as error:
        if place.kind is not Kind.MYSQL or not _is_half_done(error):
            raise
        raise SettingsError(
            f"--database-url: a migration of the database ({place.shown}) was interrupted, and "
            "MySQL cannot undo it: restore its backup, or drop it and create it anew if it is new"
        ) from None
    finally:
        await engine.dispose()


async def _answers(engine: AsyncEngine, patience_s: float) -> None:
    """Return once the database takes connections.

    Raises:
        DatabaseAway: it does not, for `patience_s`.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            async with engine.connect():
                return
        except DatabaseAway:
            if time.monotonic() >= deadline:
                raise
        await asyncio.sleep(RETRY_S)


async def version_of(connection: AsyncConnection) -> str | None:
    """The version that is committed now; None: this database was never migrated."""
    try:
        row = (await connection.execute(text("SELECT version_num FROM alembic_version"))).first()
    except ProgrammingError:  # no such table
        row = None
    await connection.rollback()  # the next look is a new one
    return str(row[0]) if row else None


async def _lock(connection: AsyncConnection, place: DatabaseUrl) -> None:
    """Keep other servers from migrating until the connection closes."""
    if place.kind is Kind.POSTGRESQL:
        await connection.execute(text(f"SET lock_timeout = '{PATIENCE_S}s'"))
        asked = text(f"SELECT pg_advisory_lock({_PG_LOCK}) IS NOT NULL")
    else:
        asked = text(f"SELECT GET_LOCK({_MY_LOCK}, {PATIENCE_S})")
    try:
        locked = bool(await connection.scalar(asked))
        await connection.commit()
    except Contended:
        locked = False
    if not locked:
        raise SettingsError(
            f"--database-url: another server has been migrating the database ({place.shown}) for "
            f"{PATIENCE_S} s"
        )


def _is_half_done(error: DBAPIError) -> bool:
    """Whether a migration found what it was about to make, or lacked what it was about to drop."""
    return bool(error.orig and error.orig.args and error.orig.args[0] in _MY_HALF_DONE)


def _is_older(version: str | None, target: str, shown: str) -> bool:
    """Whether there is something to migrate.

    Raises:
        SettingsError: the database is of a newer release.
    """
    if version is not None and version > HEAD:
        raise SettingsError(
            f"--database-url: the database ({shown}) is of a newer release (schema {version}, this "
            f"one has {HEAD})"
        )
    return version is None or version < target


def _upgrade(place: DatabaseUrl, target: str, connection: Connection | None) -> None:
    """Run the migrations over `connection`, or over one of their own to the SQLite file."""
    from alembic import command  # slow to import, and rarely needed
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(migrations()).replace("%", "%%"))
    config.set_main_option("sqlalchemy.url", f"sqlite:///{place.path}".replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, target)
