"""`gpustack db`: backup, restore."""

from pathlib import Path

import click

from gpustack.cli.here import here, place
from gpustack.cli.lock_file import running_node
from gpustack.cli.own_database import hold, settings_of, url_of
from gpustack.cli.words import line
from gpustack.errors import SettingsError
from gpustack.lib.units import gib


@click.group()
def db() -> None:
    """Back the server's database up, restore it."""


@db.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--force", is_flag=True, help="Replace FILE if it is there.")
@here
def backup(file: Path, *, force: bool, **given: str | None) -> None:
    """Write the database, as it is at one moment, to FILE; the server may run.

    FILE is a secret, readable to its owner alone: with what is in it, hashes of passwords, digests
    of API keys and the secrets of workers and engines, others can try passwords and ask engines.
    Settings, certificates, the join token's file and models' files are not in it.
    """
    if file.exists() and not file.is_file():  # a device would be replaced, and be gone
        raise SettingsError(f"{file} is no file: a backup must be one")
    if file.exists() and not force:
        raise SettingsError(f"{file} is there already: give another name, or --force")
    settings = settings_of(_flags(given))
    url = url_of(settings)
    if settings.database_url.reveal().startswith("embedded:") and not running_node(place(given)):
        hold(settings, "db backup")

    from gpustack.server.db.backups import back_up

    back_up(url, file)
    click.echo(f"{line(str(file))}: {gib(file.stat().st_size)}; keep it like a password", err=True)


@db.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@here
def restore(file: Path, **given: str | None) -> None:
    """Make the database what it was when the backup FILE was made; no server may run.

    What is there now is kept in a file of its own. Passwords, API keys and models are those of
    the backup: keys that were revoked since are good again, and workers end the instances that it
    does not have. FILE may be of another kind of database, and of an older release.
    """
    from gpustack.server.db.backups import restore
    from gpustack.server.db.embedded import database_url
    from gpustack.server.db.migrate import migrate

    settings = settings_of(_flags(given))
    url = database_url(settings)
    settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    hold(settings, "db restore")
    if not url.startswith("sqlite:"):
        migrate(url)
    done = restore(url, file, settings.data_dir)
    if done.kept is not None:
        click.echo(f"what was there before is now {line(str(done.kept))}", err=True)
    if done.is_another_cluster:
        click.echo("it was another cluster: the workers of that one will not join", err=True)
    click.echo("restored; start the server", err=True)


def _flags(given: dict[str, str | None]) -> dict[str, str]:
    return {key: value for key, value in given.items() if value is not None}
