"""`gpustack events`: what happened."""

from typing import TYPE_CHECKING

import click

from gpustack.cli.connection import Connection, connected
from gpustack.cli.tables import as_json, local_time, show

if TYPE_CHECKING:
    from gpustack.client import Client
    from gpustack.schemas.events import By, Event


@click.command()
@click.argument("object", required=False)
@click.option(
    "--limit", type=click.IntRange(1), default=100, show_default=True, metavar="N",
    help="This many of the newest.",
)  # fmt: skip
@as_json
@connected
def events(server: Connection, object: str | None, limit: int, as_json: bool) -> None:
    """List what happened, why and by whom, the newest first.

    OBJECT is the name of a model (its instances are meant too), an instance or a worker, also of
    one that is gone.
    """

    async def act(client: "Client") -> "list[Event]":
        return await client.events.list(name=object, limit=limit)

    show(
        server.run(act),
        ("WHEN", "TIMES", "KIND", "NAME", "WHAT", "BY", "WHY"),
        lambda e: (
            local_time(e.last_at), e.count, e.kind, e.name, e.type, by(e.by), e.message
        ),
        as_json=as_json,
    )  # fmt: skip


def by(who: "By") -> str:
    return f"{who.kind} {who.name}".rstrip()
