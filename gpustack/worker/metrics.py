"""What a worker's metrics port says: its engines by state, and what each uses."""

import asyncio
import socket
from collections.abc import Iterable

import psutil

from gpustack.errors import Unauthorized
from gpustack.forward import metrics
from gpustack.forward.listener import Exchange
from gpustack.forward.metrics import Metric
from gpustack.worker.control import Control
from gpustack.worker.reconcile import Phase
from gpustack.worker.supervisor.records import Record, Records

_ENGINE = ("instance",)


async def serve(
    sock: socket.socket, control: Control, records: Records, *, force_auth: bool
) -> None:
    """Answer at `sock` until cancelled."""

    async def gathered() -> list[Metric]:
        return await gather(control, records)

    await metrics.serve(sock, gathered, _admit, force_auth=force_auth)


async def gather(control: Control, records: Records) -> list[Metric]:
    """The metrics of now."""
    states: dict[tuple[str, ...], float] = dict.fromkeys(((phase,) for phase in Phase), 0)
    for phase in control.phases():
        states[phase,] += 1
    by_state = Metric("gpustack_engines", "Engines by state.", ("state",), states)
    return [by_state, *await asyncio.to_thread(_used, list(records.all()))]


async def _admit(_: Exchange) -> None:
    raise Unauthorized(
        "A worker's metrics are for its own machine: workers do not know API keys yet."
    )


def _used(records: Iterable[Record]) -> list[Metric]:
    restarts: dict[tuple[str, ...], float] = {}
    memory: dict[tuple[str, ...], float] = {}
    for record in records:
        engine = (record.instance_name,)
        restarts[engine] = record.restart_count
        if record.is_alive and record.pid is not None:
            memory[engine] = _resident_bytes(record.pid)
    return [
        Metric("gpustack_engine_restarts", "Restarts of an instance here.", _ENGINE, restarts),
        Metric(
            "gpustack_engine_memory_bytes",
            "Resident memory of an engine's processes; shared pages count in each.",
            _ENGINE,
            memory,
        ),
    ]


def _resident_bytes(pid: int) -> float:
    total = 0
    try:
        first = psutil.Process(pid)
        for process in (first, *first.children(recursive=True)):
            total += process.memory_info().rss
    except psutil.Error:
        pass  # it has just ended
    return total
