"""`gpustack service`: have this machine's service manager run the node."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from gpustack.cli import service_files
from gpustack.cli.service_files import MARK, Places, Service
from gpustack.cli.service_managers import manager
from gpustack.cli.start import StartCommand, loaded_or_exit, start_options
from gpustack.config.load import Loaded
from gpustack.errors import Conflict, NotFound
from gpustack.lib.platform import write_private

#: Exit status for a service that is installed and does not run, as systemctl has it.
STOPPED = 3

for_user_option = click.option(
    "--user", "for_user", is_flag=True, help="A service of this user instead of the machine."
)


@click.group()
def service() -> None:
    """Have this machine's service manager run the node (systemd, launchd, WinSW)."""


@service.command(cls=StartCommand)
@start_options
@for_user_option
@click.option("--dry-run", is_flag=True, help="Print what would be written, and end.")
def install(for_user: bool, dry_run: bool, **given: Any) -> None:
    """Install the node as a service and start it.

    Start options are those of `gpustack start`. What is given, also by variables and --config-file,
    is written to a config file that only its owner reads. A --config-file and nothing else is used
    itself.
    """
    loaded = loaded_or_exit(given)
    places = _places(for_user)
    config = _only_file(loaded) or Path(places.config)
    variables, secret = service_files.passed_on(os.environ)
    node = _node(loaded, places, config, variables, for_user=for_user)
    files = {Path(places.unit): service_files.unit_text(sys.platform, node)}
    if config == Path(places.config):
        files[config] = service_files.config_text(loaded, shown=dry_run)
    for warning in (*loaded.warnings, *(_left_out(name, places) for name in secret)):
        click.echo(f"Warning: {warning}", err=True)
    if dry_run:
        click.echo("\n".join(f"# --- {path}\n{text}" for path, text in files.items()), nl=False)
        return
    managed = manager(sys.platform, for_user=for_user)
    managed.check()
    put(files, private=config)
    managed.enable(Path(places.unit))
    click.echo(f"installed: {places.unit} runs the node with {config}")
    if for_user and sys.platform == "linux":
        click.echo("it ends with your last session, unless `loginctl enable-linger`", err=True)


@service.command()
@for_user_option
def uninstall(for_user: bool) -> None:
    """Stop the node and remove its service; the data directory stays."""
    places = _places(for_user)
    unit, config = Path(places.unit), Path(places.config)
    if unit.exists() or not _is_ours(config):  # where the unit is gone, its config file may not be
        _need_unit(unit)
    managed = manager(sys.platform, for_user=for_user)
    managed.check()
    managed.disable(unit)
    for path in (unit, config):
        if _is_ours(path):
            path.unlink()
            click.echo(f"removed: {path}")
    managed.forget()
    for left in service_files.others(places):
        if Path(left).exists():
            click.echo(f"stays, as it is yours: {left}", err=True)


@service.command()
@for_user_option
@click.pass_context
def status(context: click.Context, for_user: bool) -> None:
    """Say whether the service runs: exit status 0 or 3."""
    unit = Path(_places(for_user).unit)
    _need_unit(unit)
    said = manager(sys.platform, for_user=for_user).status(unit)
    click.echo(said.text)
    context.exit(0 if said.is_running else STOPPED)


def put(files: Mapping[Path, str], *, private: Path) -> None:
    """Write what is not there yet, each file at once; `private` is readable to its owner alone.

    Raises:
        Conflict: one is there with another content; then nothing is written.
    """
    for path, text in files.items():
        if _text(path) not in {None, text}:
            way = "`gpustack service uninstall`" if _is_ours(path) else "it is not gpustack's"
            raise Conflict(f"{path} is there with another content; to install, remove it: {way}")
    for path, text in files.items():
        if not path.exists():
            write_private(path, text)
            if path != private:
                path.chmod(0o644)
        elif path == private:
            path.chmod(0o600)


def _places(for_user: bool) -> Places:
    return service_files.places(sys.platform, os.environ, for_user=for_user)


def _only_file(loaded: Loaded) -> Path | None:
    """The config file that says all that was given; None: there is more, or no file."""
    others = (origin for key, origin in loaded.origins.items() if key != "config_file")
    if all(origin.startswith("config file ") for origin in others):
        return loaded.settings.config_file
    return None


def _node(
    loaded: Loaded, places: Places, config: Path, variables: Mapping[str, str], *, for_user: bool
) -> Service:
    gpustack = (sys.executable, "-m", "gpustack")
    return Service(
        command=(*gpustack, "start", "--config-file", str(config)),
        reload=(*gpustack, "reload-config", "--data-dir", str(loaded.settings.data_dir)),
        environment=variables,
        places=places,
        for_user=for_user,
    )


def _left_out(name: str, places: Places) -> str:
    where = f"in {places.variables}" if places.variables else "for the service yourself"
    return f"variable {name} holds a password, which no unit may: set it {where}"


def _need_unit(unit: Path) -> None:
    if not _is_ours(unit):
        why = "is another program's" if unit.exists() else "is not there"
        raise NotFound(f"gpustack is not installed as a service: {unit} {why}")


def _is_ours(path: Path) -> bool:
    return MARK in (_text(path) or "")


def _text(path: Path) -> str | None:
    """What is in the file; not UTF-8 or not a file: text that is none of ours. None: nothing."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except IsADirectoryError:
        return ""
