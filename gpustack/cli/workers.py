"""`gpustack workers`: list, label."""

from typing import TYPE_CHECKING

import click

from gpustack.cli.connection import Connection, connected
from gpustack.cli.tables import as_json, show
from gpustack.cli.words import line
from gpustack.errors import Invalid
from gpustack.lib.net import url_host
from gpustack.lib.units import gib

if TYPE_CHECKING:
    from gpustack.client import Client
    from gpustack.schemas.workers import Worker


@click.group()
def workers() -> None:
    """List workers, label them."""


@workers.command("list")
@as_json
@connected
def list_workers(server: Connection, as_json: bool) -> None:
    """List workers: machines, and what they have."""

    async def act(client: "Client") -> "list[Worker]":
        return await client.workers.list()

    show(
        server.run(act),
        ("ID", "NAME", "ADDRESS", "STATE", "CPUS", "RAM", "GPUS", "VERSION", "LABELS", "WHY"),
        lambda w: (
            w.id, w.name, f"{url_host(w.ip)}:{w.port}", w.state, *_facts(w), w.version, _labels(w),
            w.state_message,
        ),
        as_json=as_json,
    )  # fmt: skip


def _labels(worker: "Worker") -> str:
    return ",".join(f"{key}={value}" for key, value in sorted(worker.labels.items())) or "-"


@workers.command()
@click.argument("name")
@click.argument("changes", nargs=-1, required=True, metavar="KEY=VALUE|KEY-…")
@connected
def label(server: Connection, name: str, changes: tuple[str, ...]) -> None:
    """Label the worker called NAME: KEY=VALUE sets a label, KEY- takes it away."""

    async def act(client: "Client") -> "Worker":
        from gpustack.schemas.workers import WorkerUpdate

        worker = await client.workers.by_name(name)
        update = WorkerUpdate(labels=labelled(worker, changes), generation=worker.generation)
        return await client.workers.update(worker.id, update)

    click.echo(f"labels of {line(name)}: {line(_labels(server.run(act)))}", err=True)


def labelled(worker: "Worker", changes: tuple[str, ...]) -> dict[str, str]:
    """The labels from administrators once `changes` are made.

    Raises:
        Invalid: one is no change, or takes away what is not there or is the worker's own.
    """
    labels = dict(worker.admin_labels)
    for change in changes:
        key, equals, value = change.partition("=")
        if equals:
            labels[key] = value
        elif not change.endswith("-"):
            raise Invalid(f"want KEY=VALUE or KEY-, got {change!r}")
        elif labels.pop(change[:-1], None) is None:
            own = "is the worker's own" if change[:-1] in worker.labels else "is not there"
            raise Invalid(f"label {change[:-1]} of {worker.name} {own}")
    return labels


def _facts(worker: "Worker") -> tuple[object, object, object]:
    status = worker.status
    if status is None:
        return ("-", "-", "-")
    return (status.cpu_count, gib(status.memory_total_bytes), len(status.gpu_devices))
