"""Bring the database to the schema of this release. Migrations only, never `create_all`."""

import sqlite3
from pathlib import Path

from gpustack.errors import SettingsError

#: The newest migration. Lets a start that has nothing to migrate skip importing alembic, which
#: takes longer than all else it would do. A test holds it to the folder's head.
HEAD = "0001"


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


def migrate(url: str) -> None:
    """Run the migrations that `url` lacks, all of them or none. Blocks; run before serving.

    One process at a time: the server's lock on its data directory excludes others.

    Raises:
        SettingsError: the file cannot be opened, is no database, or is of a newer release.
    """
    path = Path(url.removeprefix("sqlite:///"))
    try:
        version = _version(path)
    except (sqlite3.DatabaseError, OSError) as error:
        raise SettingsError(f"--database-url: cannot use {path}: {error}") from None
    if version == HEAD:
        return
    if version is not None and version > HEAD:
        raise SettingsError(
            f"--database-url: {path} is of a newer release (schema {version}, this one has {HEAD})"
        )
    from alembic import command  # slow to import, and rarely needed
    from alembic.config import Config

    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.touch(mode=0o600)  # it holds digests and instance secrets
    config = Config()
    config.set_main_option("script_location", str(migrations()).replace("%", "%%"))
    config.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    command.upgrade(config, "head")


def _version(path: Path) -> str | None:
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
