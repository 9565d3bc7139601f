"""The schema comes from migrations alone, in a checkout and in a wheel."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine
from sqlmodel import SQLModel

from gpustack.errors import SettingsError
from gpustack.server.db import tables
from gpustack.server.db.migrate import HEAD, migrate, migrations


def test_the_constant_is_the_newest_migration() -> None:
    config = Config()
    config.set_main_option("script_location", str(migrations()))
    assert ScriptDirectory.from_config(config).get_current_head() == HEAD


def test_the_migrations_make_exactly_the_tables(migrated: Path) -> None:
    assert tables.WATCHED  # importing them registers them
    engine = create_engine(f"sqlite:///{migrated}")
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, SQLModel.metadata) == []
    engine.dispose()


def test_migrating_again_changes_nothing_and_the_file_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "database.db"
    migrate(f"sqlite:///{path}")
    before = path.stat().st_mtime_ns
    migrate(f"sqlite:///{path}")
    assert path.stat().st_mtime_ns == before
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("statement", [1, 4, 9, 14])
def test_a_migration_that_is_killed_leaves_nothing_and_is_done_again(
    tmp_path: Path, statement: int
) -> None:
    """kill -9 after the n-th CREATE TABLE."""
    code = (
        "import os, signal, sys\n"
        "from sqlalchemy import Engine, event\n"
        "made = 0\n"
        "@event.listens_for(Engine, 'after_cursor_execute')\n"
        "def count(connection, cursor, statement, *_):\n"
        "    global made\n"
        "    made += statement.lstrip().startswith('CREATE TABLE')\n"
        f"    if made == {statement}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from gpustack.server.db.migrate import migrate\n"
        "migrate(sys.argv[1])\n"
    )
    url = f"sqlite:///{tmp_path / 'database.db'}"
    killed = subprocess.run([sys.executable, "-c", code, url], check=False, capture_output=True)
    migrate(url)
    engine = create_engine(url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert context.get_current_revision() == HEAD
        assert compare_metadata(context, SQLModel.metadata) == []
    engine.dispose()
    assert killed.returncode in {-9, 0}  # 0: there are fewer tables than that


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
