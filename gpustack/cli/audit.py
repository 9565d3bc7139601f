"""`gpustack audit`: list, verify."""

import asyncio
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gpustack.cli.connection import Connection, connected, connection
from gpustack.cli.lock_file import running_node
from gpustack.cli.own_database import settings_of, take
from gpustack.cli.tables import as_json, local_time, show
from gpustack.config import load
from gpustack.errors import GPUStackError
from gpustack.lib.platform import default_data_dir

if TYPE_CHECKING:
    from gpustack.client import Client
    from gpustack.schemas.audit import Audited, AuditEntry


@click.group()
def audit() -> None:
    """Look at who changed what."""


@audit.command("list")
@click.option(
    "--limit", type=click.IntRange(1), default=100, show_default=True, metavar="N",
    help="This many of the newest.",
)  # fmt: skip
@as_json
@connected
def list_entries(server: Connection, limit: int, as_json: bool) -> None:
    """List administrative changes, the newest first."""

    async def act(client: "Client") -> "list[AuditEntry]":
        return await client.audit.list(limit=limit)

    show(
        server.run(act),
        ("ID", "WHEN", "WHO", "WITH", "FROM", "ACTION", "KIND", "NAME", "CHANGED"),
        lambda e: (
            e.id, local_time(e.at), e.username or "-", _credential(e), e.peer or "-", e.action,
            e.kind, e.name, _changes(e),
        ),
        as_json=as_json,
    )  # fmt: skip


def _credential(entry: "AuditEntry") -> str:
    return f"{entry.credential_kind} {entry.credential_name}".strip() or "-"


def _changes(entry: "AuditEntry") -> str:
    said = [
        f"{field}: {json.dumps(change.before)} -> {json.dumps(change.after)}"
        for field, change in entry.changed.items()
    ]
    return "; ".join([*said, *([entry.remark] if entry.remark else [])])


@audit.command()
@click.option("--config-file", metavar="FILE", help="YAML file that the server is started with.")
@connected
def verify(server: Connection, config_file: str | None) -> None:
    """Check that every entry is as it was written and none is missing.

    Works while the server runs and, on its own machine, while it does not. The last hash, kept
    elsewhere, is what shows later that nobody wrote the whole log anew.
    """
    place = server.data_dir
    if place is not None and config_file:
        flags = {"config_file": config_file}
        if place != default_data_dir():
            flags["data_dir"] = str(place)
        place = load.data_dir(flags, os.environ)
        server = connection(None, None, place)
    if place is not None and running_node(place) is None:
        found = _directly(place, config_file)
    else:
        found = server.run(lambda client: client.audit.verify())
    if found.problem is not None:
        raise GPUStackError(f"audit log: entry {found.problem.id}: {found.problem.why}")
    if not found.entries:
        click.echo("the audit log is empty")
        return
    click.echo(f"entries {found.first_id} to {found.last_id} are as they were written")
    click.echo(f"the last one's hash: {found.hash}")


def _directly(data_dir: Path, config_file: str | None) -> "Audited":
    given = {"data_dir": str(data_dir)} | ({"config_file": config_file} if config_file else {})
    return asyncio.run(_verified(take(settings_of(given), "audit verify")))


async def _verified(url: str) -> "Audited":
    from gpustack.server.db import audit_log
    from gpustack.server.db.database import Database

    db = Database(url)
    try:
        async with db.read() as session:
            return await audit_log.verify(session)
    finally:
        await db.close()
