"""`gpustack start`, `gpustack restart`: the node on this machine."""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import click

from gpustack.cli.here import here, node_on, place
from gpustack.config import checks, load
from gpustack.config.load import Loaded
from gpustack.config.options import Option, Settings, defaults, options, shown_default
from gpustack.errors import SettingsError
from gpustack.lib import logs
from gpustack.lib.platform import outgoing_ports

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

logger = logging.getLogger(__name__)

HEADINGS = {"common": "Common options", "server": "Server options", "worker": "Worker options"}
RESTART_TIMEOUT_S = 60.0


class StartCommand(click.Command):
    """A command whose options are the table of `gpustack.config`, under its headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for group, heading in HEADINGS.items():
            rows = [_help_row(known) for known in options() if known.group == group]
            with formatter.section(heading):
                formatter.write_dl(rows)
        table = {known.key for known in options()}
        others = [one.get_help_record(ctx) for one in self.get_params(ctx) if one.name not in table]
        with formatter.section("Other options"):
            formatter.write_dl([row for row in others if row])


def start_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give `command` every start option; it is called with those that were given, by key."""
    for known in reversed(list(options())):
        names = (known.flag, *known.aliases_on(sys.platform), known.key)
        # Help is made from the table, under its headings; this one is what shells show.
        more: dict[str, Any] = {"help": known.meaning.en}
        if known.kind == "bool":
            more |= {"is_flag": True, "default": None}
        elif known.repeatable:
            more |= {"multiple": True, "type": str}
        else:
            more |= {"type": str, "default": None, "shell_complete": _completer(known)}
        command = click.option(*names, **more)(command)
    return command


def _completer(known: Option) -> Callable[..., "list[CompletionItem]"]:
    """What a shell offers as the option's value; what is typed is checked elsewhere."""

    def complete(_: Any, __: Any, incomplete: str) -> "list[CompletionItem]":
        from click.shell_completion import CompletionItem

        if known.kind == "path":
            return [CompletionItem(incomplete, type="file")]
        return [CompletionItem(one) for one in known.choices if one.startswith(incomplete)]

    return complete


def _help_row(known: Option) -> tuple[str, str]:
    plain = defaults()[known.key]
    default = known.shown_default.en if known.shown_default else shown_default(plain)
    meaning = known.meaning.en
    if known.choices:
        meaning += f" One of {', '.join(known.choices)}."
    if known.deprecated:
        meaning += f" Deprecated: use {known.deprecated}."
    suffix = f"  [default: {default}]" if default else ""
    return known.usage(sys.platform), f"{meaning}{suffix}"


def loaded_from(
    given: dict[str, Any], overrides: Mapping[str, Any] = MappingProxyType({})
) -> Loaded:
    """The effective settings; `overrides` are what the running node was told.

    Raises:
        SettingsError: some of them are impossible.
    """
    flags = {key: value for key, value in given.items() if value not in (None, ())}
    return load.load(flags, os.environ, overrides)


def doubts(loaded: Loaded) -> Iterator[str]:
    """What of the settings may fail on this machine one day."""
    return checks.doubtful(loaded.settings, loaded.origins, outgoing_ports())


def loaded_or_exit(given: dict[str, Any]) -> Loaded:
    """The effective settings, or exit 1 with a line for each mistake."""
    try:
        return loaded_from(given)
    except SettingsError as error:
        raise click.ClickException(str(error)) from None


@click.command(cls=StartCommand)
@start_options
def start(**given: Any) -> None:
    """Start a node: a server with its worker, or with --server-url a worker alone."""
    loaded = loaded_or_exit(given)
    logs.setup("launcher", debug=loaded.settings.debug)
    for warning in (*loaded.warnings, *doubts(loaded)):
        logger.warning("%s", warning)
    from gpustack.cli.launcher import run  # help needs none of it

    def reload(overrides: Mapping[str, Any]) -> Settings:
        return loaded_from(given, overrides).settings

    sys.exit(run(loaded.settings, sys.argv[2:], reload))


@click.command()
@here
def restart(**given: str | None) -> None:
    """Replace a running node's processes; its engines and open streams go on."""
    data_dir = place(given)
    before = node_on(data_dir)
    os.kill(before["pid"], signal.SIGUSR2)
    deadline = time.monotonic() + RESTART_TIMEOUT_S
    while time.monotonic() < deadline:
        now = node_on(data_dir)
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
