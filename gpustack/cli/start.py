"""`gpustack start`, `gpustack restart`, `gpustack config`: the node on this machine."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from gpustack.cli.lock_file import running_node
from gpustack.config.load import load
from gpustack.config.options import Option, Settings, defaults, options
from gpustack.errors import SettingsError
from gpustack.lib import logs

HEADINGS = {"common": "Common options", "server": "Server options", "worker": "Worker options"}
RESTART_TIMEOUT_S = 60.0


class StartCommand(click.Command):
    """A command whose options are the table of `gpustack.config`, under its headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for group, heading in HEADINGS.items():
            rows = [_help_row(known) for known in options() if known.group == group]
            with formatter.section(heading):
                formatter.write_dl(rows)


def start_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give `command` every start option; it is called with those that were given, by key."""
    for known in reversed(list(options())):
        names = (known.flag, *known.aliases, known.key)
        if known.kind == "bool":
            parameter = click.option(*names, is_flag=True, default=None)
        elif known.kind == "list":
            parameter = click.option(*names, multiple=True, type=str)
        else:
            parameter = click.option(*names, type=str, default=None)
        command = parameter(command)
    return command


def _help_row(known: Option) -> tuple[str, str]:
    names = ", ".join((*known.aliases, known.flag))
    if known.kind != "bool":
        names += f" {known.kind.upper()}"
    default = known.shown_default
    if default is None and (plain := defaults()[known.key]) not in (None, False, ()):
        default = str(plain)
    suffix = f"  [default: {default}]" if default else ""
    return names, f"{known.meaning}{suffix}"


def settings_from(given: dict[str, Any]) -> Settings:
    """The effective settings.

    Raises:
        SettingsError: some of them are impossible.
    """
    return load({key: value for key, value in given.items() if value not in (None, ())}, os.environ)


def settings_or_exit(given: dict[str, Any]) -> Settings:
    """The effective settings, or exit 1 with one sentence."""
    try:
        return settings_from(given)
    except SettingsError as error:
        raise click.ClickException(str(error)) from None


@click.command(cls=StartCommand)
@start_options
def start(**given: Any) -> None:
    """Start a node: a server with its worker, or with --server-url a worker alone."""
    settings = settings_or_exit(given)
    logs.setup("launcher", debug=settings.debug)
    from gpustack.cli.launcher import run  # help needs none of it

    sys.exit(run(settings, sys.argv[2:], lambda: settings_from(given)))


@click.group()
def config() -> None:
    """Look at start options without starting."""


@config.command(cls=StartCommand)
@start_options
def check(**given: Any) -> None:
    """Check start options, the environment and the config file; start nothing."""
    settings_or_exit(given)


@click.command()
@click.option("--data-dir", type=str, envvar="GPUSTACK_DATA_DIR")
def restart(data_dir: str | None) -> None:
    """Replace a running node's processes; its engines and open streams go on."""
    given = {} if data_dir is None else {"data_dir": data_dir}
    place = load(given, {}).data_dir
    before = _running_node(place)
    os.kill(before["pid"], signal.SIGUSR2)
    deadline = time.monotonic() + RESTART_TIMEOUT_S
    while time.monotonic() < deadline:
        now = _running_node(place)
        if now["life"] == before["life"]:
            if now["refusals"] != before["refusals"]:
                raise SettingsError(f"not restarted: {now['refused']}")
        elif now["ready"]:
            click.echo(f"restarted; pid {now['pid']}")
            return
        time.sleep(0.05)
    raise SettingsError(
        f"pid {before['pid']} has not restarted within {RESTART_TIMEOUT_S:g} s; see its log"
    )


def _running_node(data_dir: Path) -> dict[str, Any]:
    said = running_node(data_dir)
    if said is None:
        raise SettingsError(f"no node runs on data directory {data_dir}")
    return said
