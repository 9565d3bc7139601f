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
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice(["*", "inference", "management", "metrics"]),
    help="What it is for; may be given several times. By default all.",
)
@click.option(
    "--model", "models", multiple=True, metavar="NAME", help="It runs no other models. Repeatable."
)
@connected
def create(
    server: Connection,
    name: str,
    description: str | None,
    expires_in: str | None,
    scopes: tuple[str, ...],
    models: tuple[str, ...],
) -> None:
    """Create an API key called NAME and print it. It is shown this once."""
    try:
        lifetime_s = None if expires_in is None else max(1, round(seconds(expires_in)))
    except ValueError as error:
        raise Invalid(f"--expires-in: {error}") from None

    async def act(client: "Client") -> "ApiKeyCreated":
        from gpustack.schemas.credentials import ApiKeyCreate, Scope

        key = ApiKeyCreate(
            name=name,
            description=description,
            expires_in=lifetime_s,
            scope=[Scope(one) for one in scopes or ("*",)],
            allowed_model_names=[*models] or None,
        )
        return await client.api_keys.create(key)

    click.echo(server.run(act).value)
