"""Backups: an SQLite file with every row, whichever kind of database they are of.

An SQLite database is copied as it is. Of PostgreSQL and MySQL the rows are read in one snapshot,
into a file that the same migrations made. So a backup needs no program of the database, fits every
kind of them, and moves a cluster from one kind to another.
"""

import asyncio
import os
import sqlite3
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import Table, delete, func, insert, select, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlmodel import SQLModel, col

from gpustack.errors import SettingsError
from gpustack.lib.platform import give_to_owner_of, sync_folder
from gpustack.lib.secrets import new_secret
from gpustack.server.db.engines import LOCK_S, reading, writing
from gpustack.server.db.leases import LASTS_S, Leases
from gpustack.server.db.migrate import HEAD, migrate, version_of
from gpustack.server.db.tables import Cluster, Lease
from gpustack.server.db.url import DatabaseUrl, Kind, parse

#: Rows in memory at a time.
_CHUNK = 1000
#: It comes with the schema, and its token never goes back.
_LEASES = Lease.__tablename__


class Restored(NamedTuple):
    """What came of a restore.

    Attributes:
        kept: a backup of what was there before; None: there was nothing.
        is_another_cluster: than what was there, so that workers of that one do not come back.
    """

    kept: Path | None = None
    is_another_cluster: bool = False


def back_up(url: str, file: Path) -> None:
    """Write the database, as it is at one moment, to `file`: mode 0600, whole or not at all.

    Blocks. Servers may run, and none of their writes waits.

    Raises:
        SettingsError: it cannot be read, or not be written there.
        DatabaseAway: the database does not answer.
        OSError: `file` cannot be made.
    """
    place = parse(url)
    if place.kind is Kind.SQLITE and _is_part_of(file, place.path):
        raise SettingsError(f"{file} is the database itself: give another name")
    with _replacing(file) as new:
        if place.kind is Kind.SQLITE:
            _copy(place.path, new)
        else:
            migrate(f"sqlite:///{new}")
            asyncio.run(_read(place, new))
            _fold(new)
        _checked(new, f"the database ({place.shown})")


def restore(url: str, file: Path, keep_in: Path) -> Restored:
    """Make the database what it was when the backup `file` was made. Blocks.

    Watchers find that they must list anew, and no id is given that was ever given before.

    Args:
        keep_in: the folder for what was there, unless that is an SQLite file, which stays where
            it is under another name.

    Raises:
        SettingsError: `file` is no backup, damaged, or of a newer release; somebody uses the
            database; it cannot be written.
        DatabaseAway: the database does not answer.
        OSError: a file cannot be read or made.
    """
    place = parse(url)
    if place.kind is Kind.SQLITE:
        return _restore_file(place.path, file)
    with tempfile.TemporaryDirectory(dir=keep_in, prefix=".restore-") as folder:
        new = Path(folder) / "database.db"
        new.touch(mode=0o600)
        cluster = _prepare(file, new)
        migrate(f"sqlite:///{new}")
        return asyncio.run(_restore_server(url, new, cluster, keep_in))


# --- files ---------------------------------------------------------------------------------


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A new file of mode 0600 that gets the place of `path` once all is well with it."""
    fd, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".unfinished", dir=path.parent)
    os.close(fd)
    new = Path(name)
    try:
        yield new
        with new.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:
        for left in path.parent.glob(f"{new.name}*"):  # SQLite's own beside it
            left.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _is_part_of(file: Path, database: Path) -> bool:
    """Whether `file` is an SQLite database or one of its logs, by whatever name."""
    parts = (Path(f"{database}{end}") for end in ("", "-wal", "-shm"))
    return file.exists() and any(part.exists() and file.samefile(part) for part in parts)


def _opened(path: Path) -> sqlite3.Connection:
    """An SQLite file that is there."""
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=LOCK_S)


def _copy(source: Path, target: Path) -> None:
    """Copy an SQLite database, with what its write-ahead log has."""
    try:
        with closing(_opened(source)) as one, closing(_opened(target)) as two:
            one.backup(two)  # in one step, so of one moment
    except sqlite3.Error as error:
        raise SettingsError(f"cannot copy {source} to {target.parent}: {error}") from None
    _fold(target)


def _fold(path: Path) -> None:
    """Make a database one file, without a write-ahead log beside it.

    Raises:
        SettingsError: somebody else uses it.
    """
    try:
        with closing(_opened(path)) as database:
            database.execute("PRAGMA journal_mode=DELETE")
    except sqlite3.Error as error:
        raise SettingsError(f"{path} is in use or cannot be written: {error}") from None


def _checked(path: Path, shown: str) -> str:
    """The cluster id of a database file.

    Raises:
        SettingsError: it is not whole, or not gpustack's, or of a newer release.
    """
    try:
        with closing(_opened(path)) as database:
            (found,) = database.execute("PRAGMA quick_check(1)").fetchone()
            if found != "ok":
                raise SettingsError(f"{shown} is damaged: {found}")
            ((version,),) = database.execute("SELECT version_num FROM alembic_version")
            if version > HEAD:
                raise SettingsError(
                    f"{shown} is of a newer release (schema {version}, this one has {HEAD}): "
                    "install that release, or a newer one"
                )
            ((cluster,),) = database.execute("SELECT cluster_id FROM cluster")
    except (sqlite3.Error, ValueError) as error:
        raise SettingsError(f"{shown} is no database of gpustack: {error}") from None
    return str(cluster)


def _prepare(file: Path, new: Path) -> str:
    """Copy a backup and make of it what may be used; its cluster id."""
    _copy(file, new)
    cluster = _checked(new, str(file))
    with closing(_opened(new)) as database, database:
        database.execute("UPDATE cluster SET epoch = ?", (new_secret()[:8],))
        # Ids that were given since the backup name other things to workers that are away now. Ten
        # thousand years of milliseconds fit, and nobody gives a thousand ids per second.
        beyond = time.time_ns() // 1_000_000
        database.execute("UPDATE sqlite_sequence SET seq = max(seq, ?)", (beyond,))
        database.execute(
            "INSERT INTO sqlite_sequence SELECT name, ? FROM sqlite_master WHERE type = 'table'"
            " AND sql LIKE '%AUTOINCREMENT%' AND name NOT IN (SELECT name FROM sqlite_sequence)",
            (beyond,),
        )
    return cluster


def _restore_file(path: Path, file: Path) -> Restored:
    with _replacing(path) as new:
        cluster = _prepare(file, new)
        give_to_owner_of(path if path.exists() else path.parent, new)
        if not path.exists():
            return Restored()
        before = None
        with suppress(SettingsError):  # damaged, perhaps: why another is restored
            before = _checked(path, str(path))
        if before is not None:
            _fold(path)
        return Restored(_keep(path), before not in (None, cluster))


def _keep(path: Path) -> Path:
    """Give a database a second name; what is then put at the first replaces it there at once."""
    kept = _free_name(path.parent)
    for log in ("-wal", "-shm"):  # a database that could not be read has them still
        with suppress(FileNotFoundError):
            os.replace(f"{path}{log}", f"{kept}{log}")
    try:
        os.link(path, kept)  # so that no crash leaves a server without a database
    except OSError:
        os.replace(path, kept)  # some file systems have no links
    sync_folder(path.parent)
    return kept


def _free_name(folder: Path) -> Path:
    """Where what is replaced now is kept."""
    begin = f"database-before-restore-{datetime.now():%Y%m%d-%H%M%S}"  # noqa: DTZ005  for people
    names = (folder / f"{begin}{f'-{n}' if n > 1 else ''}.db" for n in count(1))
    return next(name for name in names if not name.exists())


# --- servers -------------------------------------------------------------------------------


async def _read(place: DatabaseUrl, file: Path) -> None:
    """Copy every row of one snapshot into an SQLite file with the newest schema."""
    source, target = reading(place), writing(parse(f"sqlite:///{file}"))
    try:
        async with source.connect() as rows, target.begin() as into:
            if (version := await version_of(rows)) != HEAD:
                raise SettingsError(
                    f"the database ({place.shown}) has schema {version}, this release {HEAD}: "
                    "back it up with the release that runs on it, or start this one first"
                )
            await _replace_rows(rows, into, SQLModel.metadata.sorted_tables)
    finally:
        await source.dispose()
        await target.dispose()


async def _restore_server(url: str, file: Path, cluster: str, keep_in: Path) -> Restored:
    """Replace every row but the lease, in one transaction, while no server leads."""
    place = parse(url)
    source, target = reading(parse(f"sqlite:///{file}")), writing(place)
    try:
        async with _no_server(url) as token:
            kept, before = None, await _cluster_of(target)
            if before is not None:
                kept = _free_name(keep_in)
                await asyncio.to_thread(back_up, url, kept)
            async with source.connect() as rows:
                await _raise_ids(target, await _given_ids(rows))
                async with target.begin() as into:
                    held = select(col(Lease.token)).with_for_update()  # who would lead waits
                    if (await into.execute(held)).scalar_one() != token:
                        raise SettingsError(
                            f"a server has begun to use the database ({place.shown}): stop it, "
                            "and restore again"
                        )
                    tables = SQLModel.metadata.sorted_tables
                    await _replace_rows(rows, into, [one for one in tables if one.name != _LEASES])
    finally:
        await source.dispose()
        await target.dispose()
    return Restored(kept, before not in (None, cluster))


@asynccontextmanager
async def _no_server(url: str) -> AsyncIterator[int]:
    """Hold the lease, which some server has wherever one runs; its token.

    Raises:
        SettingsError: a server has it.
    """
    lease = Leases(url, "gpustack db restore")
    try:
        if (token := await lease.take()) is None:
            raise SettingsError(
                f"a server uses the database ({parse(url).shown}): stop every one that does; one "
                f"that was killed counts for another {LASTS_S:g} s"
            )
        try:
            yield token
        finally:
            await lease.give_back(token)
    finally:
        await lease.close()


async def _cluster_of(engine: AsyncEngine) -> str | None:
    """The id of the cluster that is kept there; None: none is."""
    async with engine.connect() as connection:
        return (await connection.execute(select(col(Cluster.cluster_id)))).scalar()


async def _replace_rows(
    source: AsyncConnection, target: AsyncConnection, tables: Sequence[Table]
) -> None:
    """Have `target` hold the rows of `source`, and no others.

    Args:
        tables: each after those that its rows refer to.
    """
    for table in reversed(tables):
        await target.execute(delete(table))
    for table in tables:
        async with source.stream(select(table)) as found:
            async for rows in found.mappings().partitions(_CHUNK):
                await target.execute(insert(table), [dict(row) for row in rows])


async def _given_ids(file: AsyncConnection) -> dict[str, int]:
    """By table, the last id that counts as given."""
    found = await file.execute(text("SELECT name, seq FROM sqlite_sequence"))
    return {row.name: row.seq for row in found}


async def _raise_ids(engine: AsyncEngine, given: Mapping[str, int]) -> None:
    """Have the database give higher ids only.

    No transaction undoes it, which does no harm; MySQL would end one.
    """
    async with engine.begin() as connection:
        for table, last in given.items():
            if engine.dialect.name == "postgresql":
                setval = func.setval(func.pg_get_serial_sequence(table, "id"), last)
                await connection.execute(select(setval))
            else:
                await connection.execute(text(f"ALTER TABLE `{table}` AUTO_INCREMENT = {last + 1}"))
