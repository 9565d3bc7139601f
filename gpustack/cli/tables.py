"""Lists for people, and the same as JSON for programs."""

import json
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from gpustack.cli.words import line

if TYPE_CHECKING:
    from pydantic import BaseModel

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def show(
    objects: "Sequence[BaseModel]",
    columns: Sequence[str],
    row: Callable[[Any], Iterable[object]],
    *,
    as_json: bool,
) -> None:
    """Print `objects`, one line each, or as one JSON list."""
    if as_json:
        click.echo(json.dumps([one.model_dump(mode="json") for one in objects], indent=2))
    else:
        click.echo(aligned([columns, *([str(cell) for cell in row(one)] for one in objects)]))


def local_time(time: datetime) -> str:
    """A time as clocks here show it."""
    return time.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows as lines whose columns begin below each other, safe to print."""
    flat = [[line(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*flat, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in flat
    )
    return "\n".join(one.rstrip() for one in lines)
