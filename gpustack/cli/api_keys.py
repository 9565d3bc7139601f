"""`gpustack api-keys`: create."""

from typing import TYPE_CHECKING

import click

from gpustack.cli.connection import Connection, connected
from gpustack.errors import Invalid
from gpustack.lib.units import seconds

if TYPE_CHECKING:
    from gpustack.client import Client
    from gpustack.schemas.credentials import ApiKeyCreated


@click.group("api-keys")
def api_keys() -> None:
    """Create API keys."""


@api_keys.command()
@click.argument("name")
@click.option("--description", metavar="TEXT")
@click.option("--expires-in", metavar="DURATION", help="Such as 12h or 30d; by default never.")
@connected
def create(server: Connection, name: str, description: str | None, expires_in: str | None) -> None:
    """Create an API key called NAME and print it. It is shown this once."""
    try:
        lifetime_s = None if expires_in is None else max(1, round(seconds(expires_in)))
    except ValueError as error:
        raise Invalid(f"--expires-in: {error}") from None

    async def act(client: "Client") -> "ApiKeyCreated":
        from gpustack.schemas.credentials import ApiKeyCreate

        key = ApiKeyCreate(name=name, description=description, expires_in=lifetime_s)
        return await client.api_keys.create(key)

    click.echo(server.run(act).value)
