"""`gpustack instances`: list, logs."""

import codecs
import sys
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gpustack.cli.connection import Connection, connected
from gpustack.cli.tables import as_json, show
from gpustack.errors import Invalid, NotFound
from gpustack.lib.text import plain, split_sequence

if TYPE_CHECKING:
    from gpustack.client import Client
    from gpustack.schemas.instances import Instance


@click.group()
def instances() -> None:
    """List instances, read their logs."""


@instances.command("list")
@as_json
@connected
def list_instances(server: Connection, as_json: bool) -> None:
    """List instances: the copies of each model, where they run and how they are."""

    async def act(client: "Client") -> "list[Instance]":
        return await client.instances.list()

    show(
        server.run(act),
        ("ID", "NAME", "MODEL", "WORKER", "STATE", "RESTARTS", "WHY"),
        lambda i: (
            i.id, i.name, i.model_name, i.worker_name or "-", i.state, i.restart_count, _why(i)
        ),
        as_json=as_json,
    )  # fmt: skip


def _why(instance: "Instance") -> str:
    reasons = [f"{r.worker}: {r.message}" if r.worker else r.message for r in instance.reasons]
    return "; ".join(reasons) or instance.state_message


@instances.command()
@click.argument("instance")
@click.option("--follow", "-f", is_flag=True, help="Go on with what is added.")
@click.option("--tail", type=click.IntRange(-1), metavar="N", help="This many lines from the end; "
              "-1: all. Default: 1000, or all with --since or --output.")  # fmt: skip
@click.option("--previous", "-p", count=True,
              help="Of the run before; -pp of the one before that, and so on.")  # fmt: skip
@click.option("--since", metavar="TIME|DURATION",
              help="Such as 10m, or 2026-01-31T12:00:00Z.")  # fmt: skip
@click.option("--output", "-o", type=click.Path(dir_okay=False, allow_dash=True), metavar="FILE",
              help="Write every byte to FILE.")  # fmt: skip
@connected
def logs(
    server: Connection,
    instance: str,
    follow: bool,
    tail: int | None,
    previous: int,
    since: str | None,
    output: str | None,
) -> None:
    """Print the log of INSTANCE's engine.

    INSTANCE is a name or an id, or the name of a model that has one instance.
    """
    tail = -1 if tail is None and output is not None else tail

    async def act(client: "Client") -> None:
        found = _of(instance, await client.instances.list())
        asked = client.instances.logs(
            found.id, tail=tail, follow=follow, previous=previous, since=since
        )
        async with aclosing(asked) as chunks:
            first = await anext(chunks, b"")  # a refusal leaves the file as it was
            with _sink(output) as write:
                write(first)
                async for chunk in chunks:
                    write(chunk)

    server.run(act)


def _of(name: str, every: "list[Instance]") -> "Instance":
    found = [one for one in every if name in (one.name, str(one.id))]
    found = found or [one for one in every if name == one.model_name]
    if not found:
        raise NotFound(f"no instance is called {name}, nor a model that has one")
    if len(found) > 1:
        names = ", ".join(one.name for one in found)
        raise Invalid(f"model {name} has {len(found)} instances: name one of {names}")
    return found[0]


@contextmanager
def _sink(output: str | None) -> Iterator[Callable[[bytes], object]]:
    """Where a log goes: byte for byte, but on a terminal, which would obey what an engine said."""
    if output is not None and output != "-":
        try:
            file = Path(output).open("wb")
        except OSError as error:
            raise Invalid(f"--output {output} cannot be written: {error.strerror}") from None
        with file:
            yield file.write
        return
    if output is not None or sys.stdout is None or not sys.stdout.isatty():
        yield partial(click.echo, nl=False)
        return
    decoder, held = codecs.getincrementaldecoder("utf-8")("replace"), ""

    def write(chunk: bytes) -> None:
        nonlocal held
        text, held = split_sequence(held + decoder.decode(chunk))
        click.echo(plain(text, colours=True), nl=False)

    try:
        yield write
    finally:
        click.echo("\x1b[0m", nl=False)  # the terminal is the user's again
