"""The schema comes from migrations alone, in a checkout and in a wheel, on every database."""

import asyncio
import os
import re
import subprocess
import sys
import zipfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, MetaData, insert, select, text
from sqlmodel import SQLModel

from gpustack.errors import SettingsError
from gpustack.server.db import tables
from gpustack.server.db.engines import writing
from gpustack.server.db.migrate import HEAD, migrate, migrations
from gpustack.server.db.url import parse
from tests.server.conftest import Start
from tests.support.databases import Databases

VERSIONS = [f"{number:04}" for number in range(1, int(HEAD))]


def test_the_constant_is_the_newest_migration() -> None:
    config = Config()
    config.set_main_option("script_location", str(migrations()))
    assert ScriptDirectory.from_config(config).get_current_head() == HEAD


def on(url: str, act: Any, *args: Any) -> Any:
    """What `act` answers, given a connection to `url`; committed."""

    async def main() -> Any:
        engine = writing(parse(url))
        try:
            async with engine.begin() as connection:
                return await connection.run_sync(act, *args)
        finally:
            await engine.dispose()

    return asyncio.run(main())


def differences(connection: Connection) -> list[Any]:
    """Between the database and the tables as the code has them."""
    assert tables.WATCHED  # importing them registers them
    context = MigrationContext.configure(connection, opts={"compare_type": True})
    assert context.get_current_revision() == HEAD
    return list(compare_metadata(context, SQLModel.metadata))


def contents(connection: Connection) -> dict[str, list[dict[str, Any]]]:
    """Every row of every table, as this database gives it back."""
    found = MetaData()
    found.reflect(connection)
    return {
        name: [dict(row) for row in connection.execute(select(table)).mappings()]
        for name, table in found.tables.items()
    }


def test_the_migrations_make_exactly_the_tables(empty_url: str) -> None:
    migrate(empty_url)
    assert on(empty_url, differences) == []


def test_migrating_again_changes_nothing_and_the_file_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "database.db"
    migrate(f"sqlite:///{path}")
    before = path.stat().st_mtime_ns
    migrate(f"sqlite:///{path}")
    assert path.stat().st_mtime_ns == before
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_start_that_has_nothing_to_migrate_does_not_import_alembic(database_url: str) -> None:
    code = (
        "import sys; from gpustack.server.db.migrate import migrate; migrate(sys.argv[1]); "
        "assert 'alembic' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, database_url], check=True)


def test_sqlite_needs_no_code_of_other_databases(tmp_path: Path) -> None:
    code = (
        "import sys, asyncio\n"
        "from gpustack.server.db.migrate import migrate\n"
        "from gpustack.server.db.database import Database, current_revision\n"
        "import gpustack.server.app\n"
        "migrate(sys.argv[1])\n"
        "async def look():\n"
        "    db = Database(sys.argv[1])\n"
        "    async with db.read() as session: await session.get(__import__('gpustack.server.db."
        "tables', fromlist=['x']).Worker, 1)\n"
        "    await db.close()\n"
        "asyncio.run(look())\n"
        "others = ('asyncpg', 'asyncmy', 'cryptography', 'sqlalchemy.dialects.mysql',\n"
        "          'sqlalchemy.dialects.postgresql')\n"
        "assert not [name for name in others if name in sys.modules]\n"
    )
    url = f"sqlite:///{tmp_path / 'database.db'}"
    migrate(url)  # alembic has code for every database
    subprocess.run([sys.executable, "-c", code, url], check=True)


#: Counts the CREATE TABLEs that go to the database.
COUNTING = """
import os, pathlib, signal, sys, time
from sqlalchemy import Engine, event
from gpustack.errors import SettingsError
from gpustack.server.db import migrate as m
made = 0
@event.listens_for(Engine, "after_cursor_execute")
def count(connection, cursor, statement, *_):
    global made
    made += statement.lstrip().startswith("CREATE TABLE")
    if made == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("statement", [2, 4, 9, 14])
def test_a_migration_that_is_killed_leaves_nothing_and_is_done_again(
    databases: Databases, empty_url: str, statement: int
) -> None:
    """kill -9 after the n-th CREATE TABLE. MySQL cannot undo that, and says what to do."""
    code = COUNTING + "m.migrate(sys.argv[1])"
    command = [sys.executable, "-c", code, empty_url, str(statement)]
    killed = subprocess.run(command, check=False, capture_output=True)
    assert killed.returncode == -9
    if databases.kind == "mysql":
        with pytest.raises(SettingsError, match="interrupted, and MySQL cannot undo it"):
            migrate(empty_url)
        return
    migrate(empty_url)
    assert on(empty_url, differences) == []


#: Of two that start at once, neither goes on before both have seen that there is much to do.
TOGETHER = """
mine, other = (pathlib.Path(name) for name in sys.argv[3:])
is_older = m._is_older
def meet(*facts):
    if not mine.exists():
        mine.touch()
        while not other.exists(): time.sleep(0.01)
    return is_older(*facts)
m._is_older = meet
m.migrate(sys.argv[1])
print(made)
"""


def test_two_servers_that_start_at_once_migrate_once(empty_url: str, tmp_path: Path) -> None:
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    both = [
        subprocess.Popen(
            [sys.executable, "-c", COUNTING + TOGETHER, empty_url, "-1", *places],
            stdout=subprocess.PIPE,
        )
        for places in ((one, two), (two, one))
    ]
    made = sorted(int(process.communicate()[0]) for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert made[0] <= 1  # alembic's own table, on SQLite
    assert made[1] > 10
    assert on(empty_url, differences) == []


#: A cluster as version 0001 kept it: an instance runs, its model was edited, a key was revoked.
FIRST = """
INSERT INTO cluster VALUES (1, 'cluster', 'epoch', 'digest');
INSERT INTO counter VALUES (1, 7);
INSERT INTO changes VALUES (6, 'credentials', 3, TRUE), (7, 'model-instances', 1, FALSE);
INSERT INTO users VALUES (1, 'admin', NULL, 'hash', TRUE, FALSE, '2026-01-01 00:00:00');
INSERT INTO workers (id, revision, name, hostname, machine_id, boot_id, run_id, address, port,
    labels, system_reserved_ram_bytes, system_reserved_vram_bytes, version, cpu_percent,
    memory_used_bytes, agent_secret, silent, created_at, updated_at)
  VALUES (4, 5, 'w1', 'h', 'm', 'b', 'r', '127.0.0.1', 10150, '{"zone": "a"}', 0, 0, '1', 0, 0,
    'secret', FALSE, '2026-01-01 00:00:00', '2026-01-01 00:00:00');
INSERT INTO models (id, revision, name, replicas, placement_strategy, worker_selector,
    restart_on_error, generation, deleting, created_at, updated_at)
  VALUES (1, 6, 'm', 1, 'spread', '{}', TRUE, 1, FALSE, '2026-01-01 00:00:00',
    '2026-01-01 00:00:00');
INSERT INTO model_versions (id, model_id, generation, spec, created_at, problem)
  VALUES (1, 1, 1, '{"source": "local_path", "local_path": "/m.gguf"}', '2026-01-01 00:00:00', '');
INSERT INTO model_instances (id, revision, name, model_id, version_id, generation, worker_id, claim,
    reported_state, state_message, observed_generation, restart_count, reasons, deleting,
    created_at, updated_at)
  VALUES (1, 7, 'm-abcde', 1, 1, 1, 4, '{"ram_bytes": 1}', 'running', '', 1, 0, '[]', FALSE,
    '2026-01-01 00:00:00', '2026-01-01 00:00:00');
"""


def first_cluster(connection: Connection) -> None:
    for statement in FIRST.split(";\n")[:-1]:
        connection.exec_driver_sql(statement)
    if connection.dialect.name == "postgresql":  # which does not notice ids that are given
        for table in ("workers", "models", "model_versions", "model_instances", "users"):
            connection.execute(text(f"SELECT setval('{table}_id_seq', 10)"))


def fill_empty_tables(connection: Connection) -> None:
    """One row, which refers to others where it must."""
    found = MetaData()
    found.reflect(connection)
    for table in found.sorted_tables:
        if connection.execute(select(table)).first() is None:
            row: dict[str, Any] = {"id": 1} if "id" in table.columns else {}
            for column in table.columns:
                if not column.nullable and column.name not in row:
                    refers = [key.column for key in column.foreign_keys]
                    row[column.name] = (
                        connection.scalar(select(refers[0]))
                        if refers
                        else _any_value(column.type.python_type)
                    )
            connection.execute(insert(table).values(row))


@pytest.mark.parametrize("version", VERSIONS)
def test_an_upgrade_of_each_earlier_schema_keeps_what_is_in_it(
    empty_url: str, version: str
) -> None:
    migrate(empty_url, VERSIONS[0])
    on(empty_url, first_cluster)
    migrate(empty_url, version)
    on(empty_url, fill_empty_tables)
    before = on(empty_url, contents)
    assert before.pop("alembic_version") == [{"version_num": version}]
    assert all(before.values())
    migrate(empty_url)
    after = on(empty_url, contents)
    for worker in before["workers"]:
        if "address" in worker:  # until 0008
            worker["ip"] = worker.pop("address")
    for table, rows in before.items():
        kept = [{name: row[name] for name in rows[0]} for row in after[table][: len(rows)]]
        assert kept == rows
    assert on(empty_url, differences) == []


#: Two devices, and requests in two hours by a user and by nobody.
USED = """
UPDATE workers SET facts = '{"gpu_devices": [
    {"index": 0, "name": "H100", "vendor": "NVIDIA", "type": "cuda", "memory_total_bytes": 8},
    {"index": 1, "vendor": "NVIDIA", "memory_total_bytes": 9}]}';
INSERT INTO "usage" (request_id, user_id, credential_id, model_id, model, operation, prompt_tokens,
    completion_tokens, status, estimated, cut, started_at)
  VALUES ('a', 1, 3, 1, 'm', 'chat/completions', 10, 1, 200, FALSE, FALSE, 7200),
    ('b', 1, 3, 1, 'm', 'chat/completions', 20, 2, 500, FALSE, FALSE, 10799.9),
    ('c', 1, 3, 1, 'm', 'chat/completions', 40, 4, 200, FALSE, FALSE, 10800.0),
    ('d', NULL, NULL, 1, 'm', 'chat/completions', 80, 8, 200, FALSE, FALSE, 10800.0);
"""


def used_cluster(connection: Connection) -> None:
    first_cluster(connection)
    quote = "`" if connection.dialect.name == "mysql" else '"'
    for statement in USED.split(";\n")[:-1]:
        connection.exec_driver_sql(statement.replace('"usage"', f"{quote}usage{quote}"))


def test_devices_and_sums_of_usage_are_made_of_what_is_there(empty_url: str) -> None:
    migrate(empty_url, VERSIONS[0])
    on(empty_url, used_cluster)
    migrate(empty_url)
    found = on(empty_url, contents)
    devices = [
        (one["worker_id"], one["position"], one["index"], one["name"], one["type"])
        for one in found["devices"]
    ]
    assert devices == [(4, 0, 0, "H100", "cuda"), (4, 1, 1, "", "nvidia")]
    names = ("hour", "user_id", "credential_id", "requests", "failed", "prompt_tokens")
    sums = sorted(tuple(one[name] for name in names) for one in found["usage_hours"])
    assert sums == [(2, 1, 3, 2, 1, 30), (3, 0, 0, 1, 0, 80), (3, 1, 3, 1, 0, 40)]


async def test_an_upgraded_database_is_served(empty_url: str, start: Start, tmp_path: Path) -> None:
    await asyncio.to_thread(migrate, empty_url, VERSIONS[0])
    await asyncio.to_thread(on, empty_url, first_cluster)
    await asyncio.to_thread(migrate, empty_url)
    admin = await (await start(tmp_path, database_url=empty_url)).admin()
    worker = (await admin.get("/v2/workers/4")).json()
    assert (worker["labels"], worker["admin_labels"]) == ({"zone": "a"}, {})
    instance = (await admin.get("/v2/model-instances/1")).json()
    assert (instance["state"], instance["members"]) == ("running", [])


@pytest.mark.parametrize(
    "table", ["workers", "models", "credentials", "users", "members", "model_files"]
)
def test_ids_are_not_used_again(database_url: str, table: str) -> None:
    """Not even that of the newest row, which SQLite and old MySQL would."""

    def make_and_remove(connection: Connection) -> int:
        found = MetaData()
        found.reflect(connection, only=[table])
        rows = found.tables[table]
        fill = {
            column.name: _any_value(column.type.python_type)
            for column in rows.columns
            if not column.nullable and column.name != "id"
        }
        if connection.dialect.name == "mysql":
            connection.exec_driver_sql("SET foreign_key_checks = 0")
        elif connection.dialect.name == "postgresql":
            connection.exec_driver_sql("SET session_replication_role = replica")
        else:
            connection.exec_driver_sql("PRAGMA defer_foreign_keys = ON")
        made = connection.execute(insert(rows).values(**fill)).inserted_primary_key
        assert made is not None
        connection.execute(rows.delete())
        return int(made[0])

    first, second = (on(database_url, make_and_remove) for _ in range(2))
    assert second > first


def _any_value(kind: type) -> Any:
    # MariaDB keeps JSON as text, and checks it.
    return {dict: {}, str: "{}", datetime: datetime.now(UTC), bool: False}.get(kind, 0)


def test_a_database_of_a_newer_release_is_refused(database_url: str) -> None:
    on(database_url, lambda c: c.execute(text("UPDATE alembic_version SET version_num = '9999'")))
    with pytest.raises(SettingsError, match=re.escape(f"schema 9999, this one has {HEAD}")):
        migrate(database_url)


def test_a_file_that_is_no_database_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "database.db"
    path.write_bytes(b"certainly no database" * 100)
    with pytest.raises(SettingsError, match=r"cannot use .*database\.db"):
        migrate(f"sqlite:///{path}")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    root = Path(__file__).resolve().parents[2]
    subprocess.run([*command, "-q", "-w", str(folder), str(root)], check=True, cwd=folder)
    (built,) = folder.glob("gpustack-*.whl")
    return built


def test_the_wheel_carries_the_migrations_and_no_code_that_runs_by_itself(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "gpustack/server/db/migrations/env.py" in names
    assert not [name for name in names if name.endswith(".pth")]
    tops = {name.split("/")[0].split("-")[0] for name in names}
    assert tops == {"gpustack"}


def test_an_installed_wheel_migrates(wheel: Path, tmp_path: Path) -> None:
    place = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(place)
    code = (
        "import gpustack.server.db.migrate as m; "
        "assert m.migrations().parts[-4:] == ('gpustack', 'server', 'db', 'migrations'); "
        "m.migrate('sqlite:///made.db')"
    )
    subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(place)},
    )
    assert (tmp_path / "made.db").stat().st_size > 0
