"""`gpustack apply`, `diff` and `export`: what a cluster should be, as a file."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gpustack.cli.connection import Connection, connected
from gpustack.cli.manifest import Source, read, render
from gpustack.cli.words import line
from gpustack.errors import GPUStackError, Invalid
from gpustack.lib import platform

if TYPE_CHECKING:
    from gpustack.client import Client
    from gpustack.schemas.apply import Applied, ObjectChange

#: `diff --exit-code` when something would change.
CHANGES = 3
FILE = click.Path(path_type=Path, allow_dash=True)
NEW_FILE = click.Path(path_type=Path, allow_dash=True, dir_okay=False)
_SIGNS = {"create": "+", "update": "~", "delete": "-"}

file_option = click.option(
    "--file", "-f", "file", type=FILE, required=True, metavar="FILE",
    help="YAML with the models that should be there; - is the standard input.",
)  # fmt: skip
prune_option = click.option(
    "--prune", is_flag=True, help="Also delete models that FILE does not name."
)


@click.command()
@file_option
@prune_option
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@connected
def apply(server: Connection, file: Path, prune: bool, yes: bool) -> None:
    """Bring the cluster to what FILE says; nothing else is touched.

    Shows what would change and asks. All of it is done, or nothing.
    """
    from gpustack.schemas.apply import Apply

    manifest, source = read(file)
    body = Apply(models=manifest.models, prune=prune)

    async def look(client: "Client") -> "Applied":
        return await client.apply(body.model_copy(update={"dry_run": True}))

    planned = _asked(server, look, source)
    show(planned)
    if not planned.changes or not (yes or _agreed(file)):
        return

    async def act(client: "Client") -> "Applied":
        return await client.apply(body.model_copy(update={"plan": planned.plan}))

    done = _asked(server, act, source)
    click.echo(f"{_count(done)} done", err=True)


@click.command()
@file_option
@prune_option
@click.option("--exit-code", is_flag=True, help=f"Exit with status {CHANGES} if there are changes.")
@connected
def diff(server: Connection, file: Path, prune: bool, exit_code: bool) -> int:
    """Show what `gpustack apply` would change."""
    from gpustack.schemas.apply import Apply

    manifest, source = read(file)
    body = Apply(models=manifest.models, prune=prune, dry_run=True)

    async def look(client: "Client") -> "Applied":
        return await client.apply(body)

    planned = _asked(server, look, source)
    show(planned)
    return CHANGES if exit_code and planned.changes else 0


@click.command()
@click.argument("file", type=NEW_FILE, required=False)
@connected
def export(server: Connection, file: Path | None) -> None:
    """Write what the cluster should be to FILE, or print it, so that it can be applied.

    Variables of models' environments are in it.
    """

    async def act(client: "Client") -> str:
        return render([model for model in await client.models.list() if not model.deleting])

    text = server.run(act)
    if file is None or str(file) == "-":
        click.echo(text, nl=False)
        return
    _write(file, text)
    click.echo(f"wrote {line(str(file))}", err=True)


def _write(file: Path, text: str) -> None:
    """Put `text` into a file of mode 0600, whole or not at all, or into what is no file: a pipe.

    A link stays one. No folder is made: its name is more likely a mistake.
    """
    if file.exists() and not file.is_file():
        file.write_text(text, encoding="utf-8")
        return
    place = file.resolve()
    place.parent.stat()
    platform.write_private(place, text)


def _asked(server: Connection, act: Any, source: Source) -> "Applied":
    """What the server answers; an error about an object in the file names its line."""
    try:
        answer: Applied = server.run(act)
    except GPUStackError as error:
        kind, index = error.detail.get("kind"), error.detail.get("index")
        if not isinstance(kind, str) or not isinstance(index, int):
            raise
        raise source.wrong([kind, index], str(error)) from None
    return answer


def _agreed(file: Path) -> bool:
    if str(file) == "-" or not sys.stdin.isatty():
        raise Invalid("nobody can be asked here: say --yes")
    return click.confirm("Do this?", err=True)


def show(applied: "Applied") -> None:
    for change in applied.changes:
        for text in lines(change):
            click.echo(text)
    if not applied.changes:
        click.echo("nothing to change", err=True)


def lines(change: "ObjectChange") -> Iterator[str]:
    """A change for people, one line for the object and one for each field."""
    kind = change.kind.removesuffix("s")
    rolls = " (its instances are replaced one by one)" if change.rolls else ""
    yield line(f"{_SIGNS[change.action]} {kind} {change.name}{rolls}")
    for name, field in change.fields.items():
        if change.action == "create":
            yield f"    {line(f'{name}: {_words(field.after)}')}"
        else:
            yield f"    {line(f'{name}: {_words(field.before)} -> {_words(field.after)}')}"


def _words(value: Any) -> str:
    import json

    return json.dumps(value, ensure_ascii=False)


def _count(applied: "Applied") -> str:
    number = len(applied.changes)
    return f"{number} change" + "s" * (number != 1)
