"""The node of this machine, as the commands that act on it find it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from gpustack.cli.lock_file import running_node
from gpustack.config import load
from gpustack.errors import SettingsError


def here(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give `command` the options that say which node: `data_dir`, `config_file`."""
    for option in (
        click.option("--config-file", metavar="FILE", help="YAML file that it is started with."),
        click.option("--data-dir", metavar="DIR", help="Data directory of the node here."),
    ):
        command = option(command)
    return command


def place(given: dict[str, str | None]) -> Path:
    """The data directory of the node that the options of `here` and the environment mean.

    Raises:
        SettingsError: they name none.
    """
    flags = {key: value for key, value in given.items() if value is not None}
    return load.data_dir(flags, os.environ)


def node_on(data_dir: Path) -> dict[str, Any]:
    """What the node that runs there says of itself.

    Raises:
        SettingsError: none runs.
    """
    said = running_node(data_dir)
    if said is None:
        raise SettingsError(f"no node runs on data directory {data_dir}")
    return said
