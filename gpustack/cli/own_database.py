"""The database of this machine's server while no server runs."""

import asyncio
import atexit
import os
from typing import TYPE_CHECKING, Any

from gpustack.cli.lock_file import LockFile
from gpustack.errors import SettingsError

if TYPE_CHECKING:
    from gpustack.config.options import Settings

_held: list[LockFile] = []


def settings_of(given: dict[str, Any]) -> "Settings":
    """Start options, from the environment and a configuration file as for `gpustack start`.

    Args:
        given: by option, what the command line says.
    """
    from gpustack.config.load import load  # not for help

    return load(given, os.environ).settings


def url_of(settings: "Settings") -> str:
    """The database's URL.

    Raises:
        SettingsError: no server has run here yet.
    """
    from gpustack.server.db.embedded import database_url, embedded
    from gpustack.server.db.migrate import file_of

    url, own = database_url(settings), embedded(settings)
    # Elsewhere nothing is made by asking, and other URLs carry passwords.
    made = own.data if own else file_of(url) if url.startswith("sqlite:") else None
    if made is not None and not made.exists():
        raise no_server_yet(f"there is no {made}")
    return url


def hold(settings: "Settings", doing: str) -> None:
    """Keep everybody else from the data directory until this process ends.

    A PostgreSQL of the node's own runs until then.

    Args:
        doing: the command that is at work, as others who want the directory read it.

    Raises:
        AlreadyRuns: a node runs here now.
        SettingsError: there is no such directory.
    """
    from gpustack.server.db.embedded import embedded

    if not settings.data_dir.is_dir():
        raise SettingsError(
            f"there is no data directory {settings.data_dir}: give the server's, as --data-dir or "
            "GPUSTACK_DATA_DIR"
        )
    lock = LockFile(settings.data_dir, None)
    lock.say({"pid": os.getpid(), "doing": doing})
    _held.append(lock)
    if not lock.left_behind:  # else what stands there still tells the next launcher to be patient
        atexit.register(lock.release)
    if (own := embedded(settings)) is not None:
        asyncio.run(own.start())
        atexit.register(lambda: asyncio.run(own.stop()))


def take(settings: "Settings", doing: str) -> str:
    """The database's URL, once `hold` holds it and it has the schema of this release.

    Raises:
        AlreadyRuns: a node runs here now.
        SettingsError: no server has run here yet.
    """
    from gpustack.server.db.migrate import migrate

    url = url_of(settings)
    hold(settings, doing)
    migrate(url)  # as the next start does
    return url


def no_server_yet(why: str) -> SettingsError:
    """What to say where the database has nothing of a server."""
    return SettingsError(
        f"no server has run here yet: {why}; where one was started with --database-url, "
        "set GPUSTACK_DATABASE_URL to the same"
    )
