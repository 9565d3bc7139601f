"""`gpustack groups`: list, create, delete; who is in them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from gpustack.cli.connection import Connection, connected
from gpustack.cli.tables import as_json, show
from gpustack.cli.words import line
from gpustack.errors import NotFound

if TYPE_CHECKING:
    from gpustack.client import Client
    from gpustack.schemas.access import Group, GroupMember


@click.group()
def groups() -> None:
    """List, create and delete groups of users, say who is in them."""


@groups.command("list")
@as_json
@connected
def list_groups(server: Connection, as_json: bool) -> None:
    """List groups: users to whom models are granted together."""

    async def act(client: "Client") -> "list[Group]":
        return await client.groups.list()

    show(
        server.run(act),
        ("ID", "NAME", "MEMBERS", "DESCRIPTION"),
        lambda g: (g.id, g.name, g.members, g.description or ""),
        as_json=as_json,
    )


@groups.command()
@click.argument("name")
@click.option("--description", metavar="TEXT")
@connected
def create(server: Connection, name: str, description: str | None) -> None:
    """Create a group called NAME."""

    async def act(client: "Client") -> None:
        from gpustack.schemas.access import GroupCreate

        await client.groups.create(GroupCreate(name=name, description=description))

    server.run(act)
    click.echo(f"group {line(name)} is there", err=True)


@groups.command()
@click.argument("name")
@as_json
@connected
def members(server: Connection, name: str, as_json: bool) -> None:
    """List the users in group NAME."""

    async def act(client: "Client") -> "list[GroupMember]":
        return await client.groups.members((await client.groups.by_name(name)).id)

    show(
        server.run(act),
        ("ID", "USERNAME", "FULL NAME"),
        lambda m: (m.id, m.username, m.full_name or ""),
        as_json=as_json,
    )


@groups.command()
@click.argument("name")
@click.argument("users", nargs=-1, required=True, metavar="USER…")
@connected
def add(server: Connection, name: str, users: tuple[str, ...]) -> None:
    """Put users into group NAME: all of them or none."""

    async def act(client: "Client") -> None:
        group = await client.groups.by_name(name)
        await client.groups.add(group.id, await user_ids(client, users))

    server.run(act)


@groups.command()
@click.argument("name")
@click.argument("users", nargs=-1, required=True, metavar="USER…")
@connected
def remove(server: Connection, name: str, users: tuple[str, ...]) -> None:
    """Take users out of group NAME."""

    async def act(client: "Client") -> None:
        group = await client.groups.by_name(name)
        for user_id in await user_ids(client, users):
            await client.groups.remove(group.id, user_id)

    server.run(act)


@groups.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME…")
@connected
def delete(server: Connection, names: tuple[str, ...]) -> None:
    """Delete groups, and what was granted to them; their members stay users."""

    async def act(client: "Client") -> None:
        found = [await client.groups.by_name(name) for name in names]  # all of them, or none
        for group in found:
            await client.groups.delete(group.id)
            click.echo(f"group {line(group.name)} is deleted", err=True)

    server.run(act)


async def user_ids(client: "Client", names: Sequence[str]) -> list[int]:
    """The ids of users.

    Raises:
        NotFound: one is not there.
    """
    ids = []
    for name in names:
        found = await client.users.list(username=name)
        if not found:
            raise NotFound(f"no user is called {name}")
        ids.append(found[0].id)
    return ids


async def group_ids(client: "Client", names: Sequence[str]) -> list[int]:
    """The ids of groups.

    Raises:
        NotFound: one is not there.
    """
    return [(await client.groups.by_name(name)).id for name in names]
