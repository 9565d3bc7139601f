"""`gpustack instances`: list, logs."""

import codecs
import sys
from contextlib import aclosing
from typing import TYPE_CHECKING

import click

from gpustack.cli.connection import Connection, connected
from gpustack.cli.tables import as_json, show
from gpustack.errors import NotFound
from gpustack.lib.text import plain

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
@click.option("--tail", type=click.IntRange(0), metavar="N", help="This many lines from the end.")
@connected
def logs(server: Connection, instance: str, follow: bool, tail: int | None) -> None:
    """Print the log of INSTANCE's engine; INSTANCE is a name or an id."""

    # A terminal would obey what an engine logged; files get every byte.
    shown = sys.stdout is not None and sys.stdout.isatty()
    decoder = codecs.getincrementaldecoder("utf-8")("replace")

    async def act(client: "Client") -> None:
        every = await client.instances.list()
        found = next((i for i in every if instance in (i.name, str(i.id))), None)
        if found is None:
            raise NotFound(f"no instance is called {instance}")
        async with aclosing(client.instances.logs(found.id, tail=tail, follow=follow)) as chunks:
            async for chunk in chunks:
                click.echo(plain(decoder.decode(chunk)) if shown else chunk, nl=False)

    server.run(act)
