"""`gpustack workers`: list, label, cordon, drain, uncordon."""

from typing import TYPE_CHECKING

import click

from gpustack.cli.connection import Connection, connected
from gpustack.cli.tables import as_json, show
from gpustack.cli.words import line
from gpustack.errors import Invalid
from gpustack.lib.net import url_host
from gpustack.lib.units import gib, seconds

if TYPE_CHECKING:
    from gpustack.client import Client
    from gpustack.schemas.workers import Worker


@click.group()
def workers() -> None:
    """List workers, label them, take them out of service."""


@workers.command("list")
@as_json
@connected
def list_workers(server: Connection, as_json: bool) -> None:
    """List workers: machines, and what they have."""

    async def act(client: "Client") -> "list[Worker]":
        return await client.workers.list()

    show(
        server.run(act),
        ("ID", "NAME", "ADDRESS", "STATE", "SCHEDULING", "CPUS", "RAM", "GPUS", "VERSION", "LABELS",
         "WHY"),
        lambda w: (
            w.id, w.name, f"{url_host(w.ip)}:{w.port}", w.state, _scheduling(w), *_facts(w),
            w.version, _labels(w), "; ".join(filter(None, (w.state_message, w.scheduling_reason))),
        ),
        as_json=as_json,
    )  # fmt: skip


def _scheduling(worker: "Worker") -> str:
    if worker.scheduling != "draining":
        return worker.scheduling
    return f"draining, {len(worker.leaving)} left" if worker.leaving else "drained"


def _labels(worker: "Worker") -> str:
    return ",".join(f"{key}={value}" for key, value in sorted(worker.labels.items())) or "-"


_reason = click.option(
    "--reason", metavar="TEXT", help="Why, for whoever sees it; by default what was said before."
)


@workers.command()
@click.argument("name")
@_reason
@connected
def cordon(server: Connection, name: str, reason: str | None) -> None:
    """Let no new instances come to the worker called NAME; what runs there stays."""

    async def act(client: "Client") -> None:
        worker = await client.workers.by_name(name)
        await client.workers.cordon(worker.id, reason)
        click.echo(f"{line(name)} takes no new instances", err=True)

    server.run(act)


@workers.command()
@click.argument("name")
@connected
def uncordon(server: Connection, name: str) -> None:
    """Let new instances come to the worker called NAME again; a drain of it ends."""

    async def act(client: "Client") -> None:
        worker = await client.workers.by_name(name)
        await client.workers.uncordon(worker.id)
        click.echo(f"{line(name)} takes new instances", err=True)

    server.run(act)


@workers.command()
@click.argument("name")
@_reason
@click.option("--wait", is_flag=True, help="Return once nothing is left on it.")
@click.option("--timeout", metavar="DURATION", help="With --wait: give up after, such as 30m.")
@connected
def drain(
    server: Connection, name: str, reason: str | None, wait: bool, timeout: str | None
) -> None:
    """Have all instances leave the worker called NAME, and let no new ones come.

    Each ends once another in its place answers elsewhere; what fits nowhere else stays. With
    --wait, the status is 1 when what is left cannot move.
    """
    try:
        timeout_s = None if timeout is None else seconds(timeout)
    except ValueError as error:
        raise Invalid(f"--timeout: {error}") from None
    if timeout_s is not None and not wait:
        raise Invalid("--timeout is for --wait")

    async def act(client: "Client") -> None:
        worker = await client.workers.by_name(name)
        worker = await client.workers.drain(worker.id, reason)
        if wait:
            from gpustack.cli.drains import until_drained

            await until_drained(
                client, worker, lambda words: click.echo(line(words), err=True), timeout_s=timeout_s
            )
        if wait or not worker.leaving:
            click.echo(f"{line(name)} is drained: nothing is left on it", err=True)
        else:
            click.echo(f"{line(name)} is being drained, {len(worker.leaving)} left", err=True)

    server.run(act)


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
    devices: object = len(status.gpu_devices)
    if unwell := sum(bool(device.problems) for device in status.gpu_devices):
        devices = f"{devices} ({unwell} unhealthy)"
    return (status.cpu_count, gib(status.memory_total_bytes), devices)
