"""`gpustack config`: look at start options without starting."""

import json
from typing import Any

import click

from gpustack.cli.start import StartCommand, doubts, loaded_or_exit, start_options
from gpustack.cli.tables import aligned, as_json
from gpustack.config.load import DEFAULT, Loaded
from gpustack.config.options import defaults, options
from gpustack.config.values import setting_shown, to_json


@click.group()
def config() -> None:
    """Look at start options without starting."""


@config.command(cls=StartCommand)
@start_options
def check(**given: Any) -> None:
    """Check start options, the environment and the config file; start nothing."""
    from gpustack.gateway.tls import Certificate  # help needs none of it

    loaded = loaded_or_exit(given)
    for warning in (*loaded.warnings, *doubts(loaded), *Certificate.check(loaded.settings)):
        click.echo(f"Warning: {warning}", err=True)


@config.command(cls=StartCommand)
@start_options
@as_json
def show(as_json: bool, **given: Any) -> None:
    """Print the effective start options and where each value comes from; secrets are hidden."""
    loaded = loaded_or_exit(given)
    rows = [
        {"key": key, "value": _shown(loaded, key), "origin": loaded.origins.get(key, DEFAULT)}
        for key in defaults()
    ]
    if as_json:
        click.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    cells = [[row["key"], _written(row["value"]), row["origin"]] for row in rows]
    click.echo(aligned([["OPTION", "VALUE", "FROM"], *cells]))


def _shown(loaded: Loaded, key: str) -> Any:
    known = {one.key: one for one in options()}.get(key)
    value = getattr(loaded.settings, key)
    return to_json(value) if known is None else setting_shown(known, value)


def _written(value: Any) -> str:
    if value is None or value == [] or value == {}:
        return "-"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
