"""The schema that migrations make is the one that the code means, on every database."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, inspect
from sqlmodel import SQLModel

from gpustack.server.db import tables
from gpustack.server.db.migrate import migrate, migrations
from tests.server.test_migrate import on
from tests.support.databases import Databases


@pytest.fixture
async def other_url(databases: Databases, tmp_path: Path) -> AsyncIterator[str]:
    """One more database without a table."""
    (tmp_path / "other").mkdir()
    url = await databases.empty(tmp_path / "other")
    yield url
    await databases.drop(url)


def alembic_check(connection: Connection | None, url: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(migrations()))
    config.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    config.attributes["connection"] = connection
    command.check(config)  # fails where there is something to migrate


def test_alembic_check_is_clean(empty_url: str) -> None:
    migrate(empty_url)
    if empty_url.startswith("sqlite:"):
        alembic_check(None, empty_url)  # as env.py connects to a file itself
    else:
        on(empty_url, alembic_check, empty_url)


def schema(connection: Connection) -> dict[str, Any]:
    """What the database says of its tables.

    Not the defaults: a column that came later has one for the rows that were there before it, and
    nobody adds a row without saying all. Which ids are given is a matter of test_migrate.py.
    """
    look = inspect(connection)
    found: dict[str, Any] = {}
    for name in sorted(set(look.get_table_names()) - {"alembic_version"}):
        found[name] = {
            "columns": {
                column["name"]: repr(column["type"]) + ("" if column["nullable"] else " NOT NULL")
                for column in look.get_columns(name)
            },
            "primary key": look.get_pk_constraint(name)["constrained_columns"],
            "foreign keys": sorted(
                (key["constrained_columns"], key["referred_table"], str(key["options"]))
                for key in look.get_foreign_keys(name)
            ),
            "indexes": sorted(
                (str(one["column_names"]), one["unique"]) for one in look.get_indexes(name)
            ),
            "unique": sorted(one["column_names"] for one in look.get_unique_constraints(name)),
        }
    if connection.dialect.name == "sqlite":
        query = "SELECT name FROM sqlite_master WHERE sql LIKE '%AUTOINCREMENT%' ORDER BY name"
        found["autoincrement"] = connection.exec_driver_sql(query).all()
    return found


def from_scratch(connection: Connection) -> None:
    assert tables.WATCHED
    SQLModel.metadata.create_all(connection)


def test_the_schema_by_migrations_is_the_one_from_scratch(empty_url: str, other_url: str) -> None:
    migrate(empty_url)
    on(other_url, from_scratch)
    assert on(empty_url, schema) == on(other_url, schema)
