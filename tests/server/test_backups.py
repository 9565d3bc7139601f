"""A backup is one moment of a database of any kind, and a restore brings that moment back."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, insert, select, text
from sqlmodel import SQLModel

from gpustack.errors import SettingsError
from gpustack.server.db import tables
from gpustack.server.db.backups import back_up, restore
from gpustack.server.db.database import Database
from gpustack.server.db.leases import Leases
from gpustack.server.db.migrate import migrate
from gpustack.server.db.tables import Counter, User
from tests.server.test_database import on_servers, user
from tests.server.test_migrate import VERSIONS, differences, first_cluster, on, used_cluster
from tests.support.databases import Databases


@asynccontextmanager
async def closed(db: Database) -> AsyncIterator[Database]:
    """`db`, closed at the end."""
    try:
        yield db
    finally:
        await db.close()


def rows(connection: Connection) -> dict[str, list[dict[str, Any]]]:
    """Every row of every table, alike on every database."""
    assert tables.WATCHED
    return {
        table.name: [
            dict(row)
            for row in connection.execute(select(table).order_by(*table.primary_key)).mappings()
        ]
        for table in SQLModel.metadata.sorted_tables
    }


def without_what_is_new(found: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """What a restore brings back: all but the epoch, and the lease of servers."""
    cluster = [row | {"epoch": ""} for row in found["cluster"]]
    return {name: cluster if name == "cluster" else kept for name, kept in found.items()} | {
        "leases": []
    }


@pytest.fixture
def used_url(empty_url: str) -> str:
    """A database with something in most tables."""
    migrate(empty_url, VERSIONS[0])
    on(empty_url, used_cluster)
    migrate(empty_url)
    return empty_url


def forget(connection: Connection) -> None:
    for table in ("members", "model_instances", "model_versions", "models", "devices"):
        connection.execute(text(f"DELETE FROM {table}"))  # noqa: S608
    connection.execute(text("UPDATE counter SET revision = 900"))


def test_a_restore_brings_back_every_row_and_a_new_epoch(used_url: str, tmp_path: Path) -> None:
    before = on(used_url, rows)
    assert len([name for name, found in before.items() if found]) >= 13
    back_up(used_url, tmp_path / "b")
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o600
    assert on(f"sqlite:///{tmp_path / 'b'}", rows) == before
    on(used_url, forget)
    left = on(used_url, rows)
    done = restore(used_url, tmp_path / "b", tmp_path)
    assert not done.is_another_cluster
    after = on(used_url, rows)
    assert without_what_is_new(after) == without_what_is_new(before)
    assert after["cluster"][0]["epoch"] != before["cluster"][0]["epoch"]
    assert on(used_url, differences) == []
    assert done.kept is not None
    assert done.kept.stat().st_mode & 0o777 == 0o600
    kept = on(f"sqlite:///{done.kept}", rows)
    assert kept | {"leases": []} == left | {"leases": []}


def give_id(connection: Connection) -> int:
    made = connection.execute(insert(User).values(user("new").model_dump(exclude={"id"})))
    assert made.inserted_primary_key
    connection.execute(text("DELETE FROM users WHERE username = 'new'"))
    return int(made.inserted_primary_key[0])


def test_no_id_that_was_given_after_the_backup_is_given_after_its_restore(
    used_url: str, tmp_path: Path
) -> None:
    back_up(used_url, tmp_path / "b")
    given = [on(used_url, give_id) for _ in range(3)]
    for _ in range(2):
        restore(used_url, tmp_path / "b", tmp_path)
        given.append(on(used_url, give_id))
    assert given == sorted(set(given))
    assert given[-1] < 2**53  # what JSON's readers take


@pytest.mark.parametrize("version", VERSIONS)
def test_a_backup_of_an_earlier_schema_is_restored_and_migrated(
    empty_url: str, tmp_path: Path, version: str
) -> None:
    old = f"sqlite:///{tmp_path / 'old.db'}"
    migrate(old, VERSIONS[0])
    on(old, first_cluster)
    migrate(old, version)
    back_up(old, tmp_path / "b")
    if not empty_url.startswith("sqlite:"):
        migrate(empty_url)
    done = restore(empty_url, tmp_path / "b", tmp_path)
    assert done.kept is None
    migrate(empty_url)
    assert on(empty_url, differences) == []
    assert [one["name"] for one in on(empty_url, rows)["models"]] == ["m"]


async def test_a_backup_is_of_one_moment_while_others_write(
    database_url: str, tmp_path: Path
) -> None:
    """Each transaction adds a user and sets the counter to how many there are."""
    first, enough = 3000, False
    async with closed(Database(database_url)) as db:
        async with db.write() as session:
            session.add_all(user(f"user {number}", full_name="x" * 200) for number in range(first))
            session.add(Counter(revision=first))
            session.add(tables.Cluster(cluster_id="c", epoch="e", token_digest="d"))
        written = first

        async def write() -> None:
            nonlocal written
            while not enough:
                async with db.write() as session:
                    session.add(user(f"user {written}"))
                    counter = await session.get(Counter, 1)
                    assert counter is not None
                    counter.revision = written + 1
                written += 1

        disturbed = 0
        async with asyncio.TaskGroup() as group:
            group.create_task(write())
            while disturbed < 3:
                before = written
                await asyncio.to_thread(back_up, database_url, tmp_path / "b")
                disturbed += written > before
                with closing(sqlite3.connect(tmp_path / "b")) as backup:
                    ((users,),) = backup.execute("SELECT count(*) FROM users")
                    ((revision,),) = backup.execute("SELECT revision FROM counter")
                assert before <= users == revision <= written + 1
            enough = True


@on_servers
async def test_while_a_server_leads_nothing_is_restored(
    databases: Databases, used_url: str, tmp_path: Path
) -> None:
    await asyncio.to_thread(back_up, used_url, tmp_path / "b")
    before = await asyncio.to_thread(on, used_url, rows)
    leases = Leases(used_url, "a server")
    token = await leases.take()
    assert token
    with pytest.raises(SettingsError, match="stop every one that does; one that was killed"):
        await asyncio.to_thread(restore, used_url, tmp_path / "b", tmp_path)
    assert (await asyncio.to_thread(on, used_url, rows))["models"] == before["models"]
    await leases.give_back(token)
    await asyncio.to_thread(restore, used_url, tmp_path / "b", tmp_path)
    assert (await leases.take() or 0) > token  # no term's token comes again
    await leases.close()
