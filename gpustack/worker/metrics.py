"""What a worker's metrics port says: its engines, its host and its devices, and what each uses."""

import asyncio
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence

import psutil

from gpustack.errors import Unauthorized
from gpustack.forward import metrics
from gpustack.forward.listener import Exchange
from gpustack.forward.metrics import Metric
from gpustack.schemas.workers import Device, WorkerStatus
from gpustack.worker.control import Control
from gpustack.worker.detectors.detection import Detection
from gpustack.worker.reconcile import Phase
from gpustack.worker.supervisor.records import Record, Records

_ENGINE = ("instance",)
_DEVICE = ("type", "index", "name", "uuid")
_NODE = "gpustack:worker_node_"


async def serve(
    sock: socket.socket,
    control: Control,
    records: Records,
    detection: Detection,
    *,
    force_auth: bool,
) -> None:
    """Answer at `sock` until cancelled. Host and devices are as the last look saw them."""

    async def gathered() -> list[Metric]:
        return await gather(control, records, detection)

    await metrics.serve(sock, gathered, _admit, force_auth=force_auth)


async def gather(control: Control, records: Records, detection: Detection) -> list[Metric]:
    """The metrics of now."""
    states: dict[tuple[str, ...], float] = dict.fromkeys(((phase,) for phase in Phase), 0)
    for engine in control.observed().values():
        states[engine.phase,] += 1
    by_state = Metric("gpustack_engines", "Engines by state.", ("state",), states)
    seen = detection.status
    about = [] if seen is None else machine(seen)
    return [by_state, *await asyncio.to_thread(_used, list(records.all())), *about]


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


def machine(status: WorkerStatus) -> list[Metric]:
    """What the last look saw of the host and its devices."""
    return [*_host(status), *_devices(status.gpu_devices)]


def _host(status: WorkerStatus) -> Iterator[Metric]:
    """By the names that GPUStack 2 has for them."""
    yield _one("cpu_cores", "Processors that may be used.", status.cpu_count)
    yield _one("cpu_utilization_rate", "Percent.", status.cpu_percent)
    yield _one("memory_total_bytes", "Of the host, or the container.", status.memory_total_bytes)
    yield _one("memory_used_bytes", "Of the host, or the container.", status.memory_used_bytes)
    yield _one("uptime_seconds", "Of the host.", status.uptime_s)
    for name, value in (("total", "total_bytes"), ("used", "used_bytes")):
        yield Metric(
            f"{_NODE}filesystem_{name}_bytes",
            "Of the file systems of data and cache.",
            ("mountpoint",),
            {(disk.mount_point,): getattr(disk, value) for disk in status.disks},
        )


def _devices(devices: Sequence[Device]) -> Iterator[Metric]:
    """By the names that GPUStack 2 has for them, but for the last."""
    rows: dict[tuple[str, ...], Device] = {
        (one.type, str(one.index), one.name, one.uuid): one for one in devices
    }

    def each(name: str, meaning: str, value: Callable[[Device], float | None]) -> Metric:
        values = {labels: value(one) for labels, one in rows.items()}
        known = {labels: number for labels, number in values.items() if number is not None}
        return Metric(f"{_NODE}{name}", meaning, _DEVICE, known)

    yield each("gpu_utilization_rate", "Percent.", lambda one: one.utilization_percent)
    yield each("gpu_temperature_celsius", "Of a device.", lambda one: one.temperature_celsius)
    yield each("gpu_power_used_watts", "Drawn by a device.", lambda one: one.power_watts)
    yield each("gram_total_bytes", "Memory of a device.", lambda one: one.memory_total_bytes)
    yield each("gram_used_bytes", "In use by whatever.", lambda one: one.memory_used_bytes)
    yield each("gpu_healthy", "1: it has no problem.", lambda one: float(not one.problems))


def _one(name: str, meaning: str, value: float) -> Metric:
    return Metric(f"{_NODE}{name}", meaning, (), {(): value})


def _resident_bytes(pid: int) -> float:
    total = 0
    try:
        first = psutil.Process(pid)
        for process in (first, *first.children(recursive=True)):
            total += process.memory_info().rss
    except psutil.Error:
        pass  # it has just ended
    return total
