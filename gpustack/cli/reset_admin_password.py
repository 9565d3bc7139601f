"""`gpustack reset-admin-password`: the way back in for whoever owns the data directory."""

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gpustack.cli.here import here, place
from gpustack.cli.lock_file import AlreadyRuns, running_node
from gpustack.cli.own_database import no_server_yet, settings_of, take
from gpustack.cli.words import line
from gpustack.errors import SettingsError

if TYPE_CHECKING:
    from gpustack.client import Client

#: How long a server that starts is waited for.
START_TIMEOUT_S = 60.0


@click.command("reset-admin-password")
@here
def reset_admin_password(**given: str | None) -> None:
    """Give the first administrator a new password, print it this once, and end its sessions.

    Works while the server runs and while it does not. Start options come from the environment and
    from --config-file as for `gpustack start`.
    """
    data_dir = place(given)
    flags = {key: value for key, value in given.items() if value is not None}
    done = None
    while done is None:
        done = _through_server(data_dir) if _serves(data_dir) else _directly(flags)
    username, password = done
    click.echo(password)
    click.echo(f"for user {line(username)}; it must be changed at the next login", err=True)


def _serves(data_dir: Path) -> bool:
    """Whether a server runs there, and has started; False: no node runs.

    Raises:
        SettingsError: a worker runs there, or a server that takes too long to start.
    """
    deadline = time.monotonic() + START_TIMEOUT_S
    while (node := running_node(data_dir)) is not None:
        if not isinstance(node.get("port"), int):
            raise SettingsError(
                f"the node on data directory {data_dir} is a worker: run this on its server"
            )
        if node.get("ready"):
            return True
        if time.monotonic() > deadline:
            raise SettingsError(
                f"the server on data directory {data_dir} is still starting: try again; see its log"
            )
        time.sleep(0.05)
    return False


def _through_server(data_dir: Path) -> tuple[str, str]:
    from gpustack.cli.connection import connection

    async def act(client: "Client") -> tuple[str, str]:
        me = await client.users.me()
        return me.username, await client.users.reset_password(me.id) or ""

    return connection(None, None, data_dir).run(act)


def _directly(flags: dict[str, str]) -> tuple[str, str] | None:
    """None: a node has started meanwhile."""
    from gpustack.server.auth.passwords import hash_now
    from gpustack.server.db.bootstrap import new_password

    try:
        url = take(settings_of(flags), "reset-admin-password")
    except AlreadyRuns:
        return None
    password = new_password()
    return asyncio.run(_replace(url, hash_now(password))), password


async def _replace(url: str, password_hash: str) -> str:
    from gpustack.schemas.credentials import CredentialKind
    from gpustack.schemas.events import ActorKind
    from gpustack.server.db.acting import Actor, acting
    from gpustack.server.db.database import Database
    from gpustack.server.db.users import first_admin, set_password

    owner = Actor(
        ActorKind.USER,
        credential_kind=CredentialKind.LOCAL,
        credential_name="the data directory, without a server",
    )
    db = Database(url)
    try:
        with acting(owner):
            async with db.write() as session:
                if (user := await first_admin(session)) is None:
                    raise no_server_yet("there is no administrator")
                await set_password(session, user, password_hash, must_change=True)
                return user.username
    finally:
        await db.close()
