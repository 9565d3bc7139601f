"""`gpustack workers`: list."""

from typing import TYPE_CHECKING

import click

from gpustack.cli.connection import Connection, connected
from gpustack.cli.tables import as_json, show
from gpustack.lib.units import gib

if TYPE_CHECKING:
    from gpustack.client import Client
    from gpustack.schemas.workers import Worker


@click.group()
def workers() -> None:
    """List workers."""


@workers.command("list")
@as_json
@connected
def list_workers(server: Connection, as_json: bool) -> None:
    """List workers: machines, and what they have."""

    async def act(client: "Client") -> "list[Worker]":
        return await client.workers()

    show(
        server.run(act),
        ("ID", "NAME", "ADDRESS", "STATE", "CPUS", "RAM", "GPUS", "VERSION", "WHY"),
        lambda w: (
            w.id, w.name, f"{w.address}:{w.port}", w.state, *_facts(w), w.version, w.state_message
        ),
        as_json=as_json,
    )  # fmt: skip


def _facts(worker: "Worker") -> tuple[object, object, object]:
    status = worker.status
    if status is None:
        return ("-", "-", "-")
    return (status.cpu_count, gib(status.memory_total_bytes), len(status.gpu_devices))
