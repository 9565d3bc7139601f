"""`gpustack token`: create, list, delete, rotate."""

import shlex
from typing import TYPE_CHECKING

import click

from gpustack.cli.connection import Connection, connected, host_in
from gpustack.cli.tables import as_json, local_time, show
from gpustack.errors import Invalid
from gpustack.lib.net import is_loopback
from gpustack.lib.units import seconds

if TYPE_CHECKING:
    from gpustack.client import Client
    from gpustack.schemas.credentials import ClusterToken, JoinToken, JoinTokenCreated


@click.group()
def token() -> None:
    """Let workers join: make tokens, rotate the cluster's."""


@token.command()
@click.option("--expires-in", metavar="DURATION", default="24h", show_default=True,
              help="Such as 30m or 7d.")  # fmt: skip
@click.option("--reusable", is_flag=True, help="For any number of workers; by default for one.")
@click.option("--description", metavar="TEXT")
@click.option("--url", metavar="URL", help="The server as the worker reaches it.")
@connected
def create(
    server: Connection, expires_in: str, reusable: bool, description: str | None, url: str | None
) -> None:
    """Make a token and print the command with which a worker joins. It is shown this once."""
    try:
        lifetime_s = max(1, round(seconds(expires_in)))
    except ValueError as error:
        raise Invalid(f"--expires-in: {error}") from None
    if url is not None:
        host_in(url, "--url")

    async def act(client: "Client") -> "JoinTokenCreated":
        from gpustack.schemas.credentials import JoinTokenCreate

        return await client.join_tokens.create(
            JoinTokenCreate(description=description, reusable=reusable, expires_in=lifetime_s)
        )

    made = server.run(act)
    place = url or (server.url if _is_elsewhere(server) else made.server_url)
    command = ["gpustack", "start", "--server-url", place, "--token", made.value]
    tls = made.server_fingerprint if place.startswith("https:") else None
    # Elsewhere a proxy may answer, with a key of its own.
    is_known = host_in(place) == host_in(made.server_url)
    # Many authorities' customers change keys at each renewal: a pinned one would lock workers out.
    if tls and is_known and not made.server_is_vouched_for:
        command += ["--server-fingerprint", tls]
    click.echo(shlex.join(command))
    who = "any number of workers" if reusable else "one worker"
    click.echo(f"for {who}, until {local_time(made.expires_at)}; shown this once", err=True)
    if tls:
        hint = "" if is_known else f"; if it is the server itself that answers at {place}, add it"
        click.echo(f"the server's key has --server-fingerprint {tls}{hint}", err=True)
    if is_loopback(host_in(place)):
        click.echo(f"other machines do not reach {place}: give --url", err=True)


def _is_elsewhere(server: Connection) -> bool:
    """Whether the URL is one that other machines may use too."""
    return server.data_dir is None and not is_loopback(host_in(server.url))


@token.command("list")
@as_json
@connected
def list_tokens(server: Connection, as_json: bool) -> None:
    """List tokens, without what is secret of them. The cluster's own is not among them."""

    async def act(client: "Client") -> "list[JoinToken]":
        return await client.join_tokens.list()

    show(
        server.run(act),
        ("ID", "TOKEN", "FOR", "EXPIRES", "USED BY", "DESCRIPTION"),
        lambda one: (
            one.id, f"{one.prefix}_…", "any" if one.reusable else "one", local_time(one.expires_at),
            "-" if one.worker_id is None else f"worker {one.worker_id}", one.description or "-",
        ),
        as_json=as_json,
    )  # fmt: skip


@token.command()
@click.argument("token_id", type=click.IntRange(min=1), metavar="ID")
@connected
def delete(server: Connection, token_id: int) -> None:
    """Delete the token with this ID. Workers that have joined with it go on."""

    async def act(client: "Client") -> None:
        await client.join_tokens.delete(token_id)

    server.run(act)
    click.echo(f"deleted token {token_id}", err=True)


@token.command()
@connected
def rotate(server: Connection) -> None:
    """Replace the cluster's own token and print the new one. Workers that have joined go on."""

    async def act(client: "Client") -> "ClusterToken":
        return await client.rotate_cluster_token()

    made = server.run(act)
    click.echo(made.value)
    if made.is_option:
        click.echo(
            "this server was started with --token, GPUSTACK_TOKEN or token in its config file: its "
            "next start makes that one the cluster's again. Change it there, or take it out",
            err=True,
        )
